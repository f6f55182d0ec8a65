"""A study of two members that train for eight steps, for tests of running one."""

import copy
import os
import signal

from jaxmoe.scaling import Study
from jaxmoe.training import ProgressReporter

CONFIG = {
    "study": {"name": "tiny", "title": "Tiny", "held_fixed": {"tokens": 0.0}},
    "model": {
        "vocab_size": 280, "width": 16, "num_layers": 1, "num_heads": 2, "max_sequence_length": 16, "init_std": 0.1,
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 8, "capacity_factor": 0.5},
    },
    "data": {
        "tokenizer": "symbols",
        "sources": {
            "knowledge": {"kind": "knowledge", "entities": 50, "test_entities": 8},
            "reasoning": {"kind": "reasoning", "problems": 50, "test_problems": 8, "corruption": 0.2},
        },
    },
    "train": {"steps": 8, "batch_size": 4, "sequence_length": 16, "learning_rate": 1e-2, "log_every": 1,
              "checkpoint_every": 2},
    "evaluation": {"points": 2, "examples": 8, "batch_size": 8, "validation_rows": 8},
    "members": {"first": {}, "second": {"train": {"learning_rate": 2e-2}}},
}  # fmt: skip


def study_of(**values):
    """The study with entries set by dotted path, `__` for the dots."""
    config = copy.deepcopy(CONFIG)
    for path, value in values.items():
        *sections, last = path.split("__")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Study.from_config_dict(config)


def contents(folder):
    """Every file that a run writes for good, except what tells the time."""
    keep = [*folder.glob("*/metrics.jsonl"), *folder.glob("*/records/*.json"), *folder.glob("*/DONE")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in keep}


class Stopping(ProgressReporter):
    """Asks the run to stop as a scheduler would, once a member has done `step` steps."""

    def __init__(self, member, step):
        super().__init__(terminal=False)
        self.where, self.at, self.now = member, step, None

    def member(self, name, total, done=0):
        super().member(name, total, done)
        self.now = name

    def advance(self, step, *args, **kwargs):
        super().advance(step, *args, **kwargs)
        if (self.now, step) == (self.where, self.at):
            os.kill(os.getpid(), signal.SIGTERM)
