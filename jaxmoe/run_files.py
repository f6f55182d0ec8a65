"""Names of what a run directory holds, for those who write it and those who only look."""

CONFIG_FILE = "config.json"
CHECKPOINT_DIRECTORY = "checkpoints"
METRICS_FILE = "metrics.jsonl"
THROUGHPUT_FILE = "throughput.jsonl"
STATUS_FILE = "status.json"
DONE_FILE = "DONE"
