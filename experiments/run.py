"""Trains and evaluates the members of a study, resumably.

    python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Run it again and it goes on where it stopped; what is done is skipped. `--dry_run` counts and trains nothing.

    --mesh=fsdp_ep                  how the devices are used: a preset, and sizes (docs/distributed.md)
    --mesh=fsdp=4,expert=2

On TPU slices, under Slurm and on GKE the processes find each other; elsewhere each is started with
--coordinator_address=HOST:PORT --num_processes=N --process_id=I.

Exit status: 0 done, 2 a mistake in the configuration, 75 preempted and resumable (by SIGTERM or SIGINT, by the
watchdog because nothing moved, or because another process of the run is lost, for which JAX's runtime may also end it
by SIGABRT), 1 anything else.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ml_collections
from absl import flags

from experiments.execution import read_study, run_to_status
from experiments.flags import run_with_config
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError, parse_mesh, to_dict

if TYPE_CHECKING:
    from jaxmoe.scaling.study import Member

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study, local or gs://. Default: runs/<study name>.")
_MEMBER = flags.DEFINE_string("member", None, "Train only this member.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and count every member; train nothing.")
_JSON = flags.DEFINE_bool("json", False, "With --dry_run: print a JSON list, one object per member.")
_RESUME = flags.DEFINE_enum(
    "resume", "auto", ["auto", "force"],
    "`force` goes on in a folder whose configuration differs from this one; `auto` refuses and shows the difference.",
)
_STRICT_RESTORE = flags.DEFINE_bool(
    "strict_restore", False,
    "Stop where a checkpoint is damaged, and move nothing; else it is set aside and the one before it is taken.",
)
_MESH = flags.DEFINE_string("mesh", None, "Preset and sizes of the mesh, such as fsdp_ep,expert=4.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where several train together.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many they are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_LOST_AFTER = flags.DEFINE_integer(
    "lost_after_seconds", None, "Of several processes, one silent for so long is lost, and the others end (100).",
    lower_bound=5,
)  # fmt: skip


def main(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> int:
    """Runs the command; returns the exit status."""
    if _MESH.value is not None:
        config.mesh.update(to_dict(parse_mesh(_MESH.value)))
        overridden = (*overridden, "mesh")
    study = read_study(config, overridden)
    only = None if _MEMBER.value is None else study.member(_MEMBER.value).name
    if _DRY_RUN.value:
        members = [member for member in study.members if only in (None, member.name)]
        _check_vocabularies(members)
        print(json.dumps([member.summary() for member in members], indent=2) if _JSON.value else study.describe())
        return 0
    if _JSON.value:
        raise ConfigError("--json goes with --dry_run.")

    from jaxmoe.processes import LOST_AFTER_SECONDS, connect

    log_to_terminal()
    lost_after = _LOST_AFTER.value or LOST_AFTER_SECONDS
    connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, lost_after_seconds=lost_after)
    workdir = _WORKDIR.value or f"runs/{study.name}"
    command = shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])
    return run_to_status(
        study, workdir, member=only, resume=_RESUME.value, strict_restore=_STRICT_RESTORE.value, command=command
    )


def _check_vocabularies(members: Sequence[Member]) -> None:
    """Checks that every model has an embedding for each token, where the tokenizer's file is on this machine."""
    from jaxmoe.data import load_tokenizer, require_vocabulary
    from jaxmoe.storage import as_path

    tokenizers = dict.fromkeys(member.config.data.tokenizer for member in members)
    for spec in tokenizers:
        if spec.endswith((".json", ".model")) and not as_path(spec).exists():
            print(f"note: {spec} is not here, so the vocabulary was not checked against it.", file=sys.stderr)
        else:
            tokenizers[spec] = load_tokenizer(spec)
    for member in members:
        if tokenizers[member.config.data.tokenizer] is None:
            continue
        try:
            require_vocabulary(tokenizers[member.config.data.tokenizer], member.config.model.vocab_size)
        except ConfigError as error:
            raise ConfigError(f"member {member.name!r}: {error}") from error


if __name__ == "__main__":
    run_with_config(main)
