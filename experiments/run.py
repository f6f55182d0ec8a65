"""Trains and evaluates the members of a study, resumably.

    python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Run it again and it goes on where it stopped; what is done is skipped. `--dry_run` counts and trains nothing.
Exit status: 0 done, 2 a mistake in the configuration, 75 stopped by a signal and resumable, 1 anything else.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ml_collections
from absl import flags

from experiments.flags import run_with_config
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError, nearest

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

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: schedulers restart it


def main(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> int:
    """Runs the command; returns the exit status."""
    from jaxmoe.scaling.study import Study

    study = Study.from_config_dict(config)
    _refuse_overrides_without_effect(config, overridden)
    study.check()
    if _MEMBER.value is not None and _MEMBER.value not in {member.name for member in study.members}:
        names = [member.name for member in study.members]
        raise ConfigError(f"--member={_MEMBER.value}: no such member.{nearest(_MEMBER.value, names)}")
    if _DRY_RUN.value:
        members = [member for member in study.members if _MEMBER.value in (None, member.name)]
        _check_vocabularies(members)
        print(json.dumps([member.summary() for member in members], indent=2) if _JSON.value else study.describe())
        return 0
    if _JSON.value:
        raise ConfigError("--json goes with --dry_run.")

    from jaxmoe.scaling.runner import run_study
    from jaxmoe.training import reuse_freed_memory

    log_to_terminal()
    workdir = _WORKDIR.value or f"runs/{study.name}"
    command = shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])
    with reuse_freed_memory():  # before JAX starts its threads
        outcome = run_study(
            study, workdir, only=_MEMBER.value, resume=_RESUME.value, strict_restore=_STRICT_RESTORE.value,
            command=command,
        )  # fmt: skip
    if outcome.status == "resumable":
        print(f"stopped by a signal; nothing is lost. Run the same command again to go on ({workdir}).")
        return RESUMABLE
    if outcome.status == "failed":
        print(f"failed; what is done is kept. Run the same command again to go on ({workdir}):\n{outcome}")
        return 1
    print(f"done: {workdir}. Next: python -m experiments.report --workdir={workdir}")
    return 0


def _refuse_overrides_without_effect(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> None:
    """A key that every member sets cannot be overridden for all; one that some set is overridden for the rest."""
    members = config.get("members", {})
    for key in overridden:
        if key.split(".")[0] in ("members", "study", "seeds") or not members:
            continue
        own = [name for name, member in members.items() if _has(member, key)]
        if len(own) == len(members):
            raise ConfigError(
                f"--config.{key} has no effect, since every member sets {key} itself; "
                f"override it for a member: --config.members.{own[0]}.{key}=..."
            )
        if own:
            print(f"note: --config.{key} does not reach {', '.join(own)}, which set {key} themselves.", file=sys.stderr)


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


def _has(section: ml_collections.ConfigDict, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(section, ml_collections.ConfigDict) or part not in section:
            return False
        section = section[part]
    return True


if __name__ == "__main__":
    sys.exit(run_with_config(main))
