"""Two members that train in a second; what goes wrong, the environment says.

JAXMOE_TEST_MARKS names a folder. The first job that finds its member's name in JAXMOE_TEST_FAILS leaves a mark there
and ends as a broken node would; later ones find the mark. With JAXMOE_TEST_JOIN the processes of a job join each other,
say so there, and end.
"""

import os
import pathlib
import sys

import ml_collections

from experiments.selection import select_members


def get_config(selection=""):
    _misbehave()
    config = ml_collections.ConfigDict()
    config.study = {"name": "tiny", "title": "Tiny", "held_fixed": {"tokens": 0.0}}
    config.model = {
        "vocab_size": 288, "width": 16, "num_layers": 1, "num_heads": 2, "max_sequence_length": 16, "init_std": 0.1,
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 8},
    }  # fmt: skip
    config.data = {
        "tokenizer": "symbols", "sources": {"sums": {"kind": "reasoning", "problems": 50, "test_problems": 8}},
    }  # fmt: skip
    config.train = {"steps": 12, "batch_size": 4, "sequence_length": 16, "log_every": 10, "checkpoint_every": 1000}
    config.evaluation = {"points": 1, "examples": 8, "validation_rows": 8}
    config.members = {"E2": {"model": {"moe": {"num_experts": 2}}}, "E4": {}}
    return select_members(config, selection)


def _misbehave():
    members = [argument.partition("=")[2] for argument in sys.argv if argument.startswith("--member=")]
    if not members or "JAXMOE_TEST_MARKS" not in os.environ:
        return
    marks = pathlib.Path(os.environ["JAXMOE_TEST_MARKS"])
    mark = marks / f"{members[0]}.failed"
    if members[0] in os.environ.get("JAXMOE_TEST_FAILS", "").split(",") and not mark.exists():
        mark.touch()
        print("the node is on fire", flush=True)
        os._exit(1)
    if os.environ.get("JAXMOE_TEST_JOIN"):
        import jax

        jax.distributed.initialize()
        text = f"{jax.process_count()} at {os.environ['JAX_COORDINATOR_ADDRESS']}"
        (marks / f"process.{jax.process_index()}").write_text(text)
        jax.distributed.shutdown()
        os._exit(0)
