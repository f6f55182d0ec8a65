"""Does a member fit on devices that are not here, and how fast could it be? The compilers' answer, without a device.

    python -m experiments.fit_check --config=experiments/configs/paper_math.py:d512-E8-k2 --topology=v5p:4x4x4 \\
        --mesh=fsdp=8,expert=8
    python -m experiments.fit_check --config=paper_math.py --member=d2048-E128-k16 --topology=v5p:8x16x16 --slices=2 \\
        --mesh=data=2,fsdp=128,expert=16
    python -m experiments.fit_check --config=paper_math.py --member=d2048-E64-k4 --topology=h100:64 --search

Compiles the member's train step (or with `--what=decode` its decode step) with XLA's compiler for TPU or GPU and prints
memory against what a device has, operations executed against those of the model, what devices exchange, and a roofline
estimate of the step's time, which is no measurement (docs/fit_check.md has the formula). `--search` tries meshes,
micro-batches and remat policies, those first that should be fastest of what should fit, and prints the fastest that
fits. A train step compiles in one to three minutes on 2 cores. Of a member with GRPO (paper_grpo.py) the step is that
of the updates, and `--what=decode` that of its rollouts. Exit status: 0 it fits, 1 it does not, 2 a mistake.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a device that is here is not what the question is about

import ml_collections
from absl import flags

from experiments.flags import run_with_config
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError

if TYPE_CHECKING:
    from jaxmoe.scaling.fit import Fit

_MEMBER = flags.DEFINE_string("member", None, "Which member; not needed where the configuration has one.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Devices, for example v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, h100:64.")
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices, connected by the data-centre network.", lower_bound=1)
_MESH = flags.DEFINE_string("mesh", None, "As for experiments.run, `fsdp=8,expert=8`; default: the configuration's.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "decode"], "The step that is compiled.")
_ROWS = flags.DEFINE_integer(
    "rows", None, "decode: rows at a time. Default: one for each device; of GRPO a rollout's batch.", lower_bound=1
)
_LENGTH = flags.DEFINE_integer(
    "length", None, "decode: cached tokens of a row. Default: the longest; of GRPO a prompt's and response's.",
    lower_bound=1,
)  # fmt: skip
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, micro-batches and remat policies.")
_TRIES = flags.DEFINE_integer("tries", 6, "search: how many to compile.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> int:
    """Runs the command; returns the exit status."""
    from jaxmoe.config.mesh import parse_mesh
    from jaxmoe.scaling.fit import check_fit
    from jaxmoe.scaling.fit_report import describe_fit
    from jaxmoe.scaling.fit_search import search
    from jaxmoe.scaling.study import Study
    from jaxmoe.scaling.topologies import EXAMPLES, describe_topology

    log_to_terminal()
    study = Study.from_config_dict(config)
    if _MEMBER.value is None and len(study.members) > 1:
        raise ConfigError(f"--member is missing: {study.name} has {len(study.members)}; name one.")
    run = (study.members[0] if _MEMBER.value is None else study.member(_MEMBER.value)).config
    if _TOPOLOGY.value is None:
        raise ConfigError(f"--topology is missing; for example one of {', '.join(EXAMPLES)}.")
    topology = describe_topology(_TOPOLOGY.value, _SLICES.value)
    if _MESH.value is not None:
        run = dataclasses.replace(run, mesh=parse_mesh(_MESH.value))
    if run.mesh.slices != topology.slices:
        run = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, slices=topology.slices))
    if _SEARCH.value:
        if _WHAT.value != "train":
            raise ConfigError(f"--search is for the train step; --what={_WHAT.value} has no plans to try.")
        fits = search(run, topology, tries=_TRIES.value, told=_tell)
        best = fits[0]
    else:
        fits = [check_fit(run, topology, what=_WHAT.value, rows=_ROWS.value, length=_LENGTH.value)]
        best = fits[0]
    if _JSON.value:
        print(json.dumps([fit.summary() for fit in fits] if _SEARCH.value else best.summary(), indent=2))
    else:
        print(describe_fit(best))
    return 0 if best.fits else 1


def _tell(fit: Fit) -> None:
    """Says what a plan came to, while others are compiled."""
    from jaxmoe.scaling.fit_report import describe_fit

    print(describe_fit(fit, brief=True), file=sys.stderr)


if __name__ == "__main__":
    run_with_config(main)
