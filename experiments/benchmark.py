"""Measures speed and memory on the machine at hand.

    python -m experiments.benchmark train_step [--json]

Contenders run in one process and take turns; read the ratios, machines are noisy.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments.flags import fail
from jaxmoe.config import ConfigError, nearest

_JSON = flags.DEFINE_bool("json", False, "Print the result as JSON.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each contender.", lower_bound=1)

BENCHMARKS = {"train_step": "training step of the laptop recipe and against transformers on torch, start-up, memory"}


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark that the first argument names."""
    name = arguments[1] if len(arguments) > 1 else ""
    if name not in BENCHMARKS:
        listed = "\n".join(f"  {known}: {what}" for known, what in BENCHMARKS.items())
        fail(ConfigError(f"no benchmark {name!r}.{nearest(name, BENCHMARKS)}\nBenchmarks:\n{listed}"))
    module = importlib.import_module(f"experiments.benchmarks.{name}")
    result = module.run(rounds=_ROUNDS.value)
    print(json.dumps(result, indent=2) if _JSON.value else module.describe(result))
    return 0


if __name__ == "__main__":
    sys.exit(app.run(main))
