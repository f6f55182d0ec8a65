"""Measures speed and memory on the machine at hand.

    python -m experiments.benchmark train_step [--json]
    python -m experiments.benchmark moe [--json] [--device]
    python -m experiments.benchmark checkpoint [--json]
    python -m experiments.benchmark interop [--json]
    python -m experiments.benchmark tokenize [--json]
    python -m experiments.benchmark input [--json]
    python -m experiments.benchmark collectives [--json]

Contenders run in one process and take turns; read the ratios, machines are noisy.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence

from absl import flags

from experiments.flags import fail, run_command
from jaxmoe.config import ConfigError, nearest

_JSON = flags.DEFINE_bool("json", False, "Print the result as JSON.")
_DEVICE = flags.DEFINE_bool("device", False, "moe: measure the TPU or GPU of this machine, in bfloat16.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each contender.", lower_bound=1)

BENCHMARKS = {
    "train_step": "training step of the laptop recipe and against transformers on torch, start-up, memory",
    "tokenize": "`experiments.data tokenize` against the tokenizer library alone, both with two processes",
    "input": "input pipeline against the laptop step: tokens/s, threads, memory, with 2 and 40 sources",
    "collectives": "bytes that expert parallelism moves per token and layer, as compiled; nothing runs",
    "moe": "MoE layer against a dense MLP of the same active FLOPs; with --device, utilization of a TPU or GPU",
    "checkpoint": "what a save costs the step that starts it; memory of save and restore",
    "interop": "import of a checkpoint of transformers: throughput and host memory",
}


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark that the first argument names."""
    name = arguments[1] if len(arguments) > 1 else ""
    if name not in BENCHMARKS:
        listed = "\n".join(f"  {known}: {what}" for known, what in BENCHMARKS.items())
        fail(ConfigError(f"no benchmark {name!r}.{nearest(name, BENCHMARKS)}\nBenchmarks:\n{listed}"))
    if _DEVICE.value and name != "moe":
        fail(ConfigError(f"--device is of the benchmark moe; {name} has no such flag."))
    module = importlib.import_module(f"experiments.benchmarks.{name}")
    options = {"device": True} if _DEVICE.value else {}
    try:
        result = module.run(rounds=_ROUNDS.value, **options)
    except ConfigError as error:
        fail(error)
    print(json.dumps(result, indent=2) if _JSON.value else module.describe(result))
    return 0


if __name__ == "__main__":
    run_command(main)
