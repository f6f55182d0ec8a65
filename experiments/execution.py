"""What the commands that train have in common: the study that is asked for, and training it to an exit status."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import ml_collections

from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError
from jaxmoe.exit_status import FAILED, RESUMABLE

if TYPE_CHECKING:
    from jaxmoe.scaling.study import Study
    from jaxmoe.training import ProgressReporter


def read_study(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> Study:
    """The study of a configuration, checked.

    Args:
      config: of the `--config` flag.
      overridden: the dotted keys that the command line set.

    Raises:
      ConfigError: a mistake in it, or an override without effect.
    """
    from jaxmoe.scaling.study import Study

    study = Study.from_config_dict(config)
    _refuse_overrides_without_effect(config, overridden)
    study.check()
    return study


def run_to_status(
    study: Study,
    workdir: str,
    *,
    member: str | None = None,
    resume: str = "auto",
    strict_restore: bool = False,
    command: str | None = None,
    progress: ProgressReporter | None = None,
) -> int:
    """Trains a study as this command does; returns the exit status, and says what it means.

    A second SIGTERM or SIGINT ends the process at once.

    Args:
      study: its members.
      workdir: its folder, local or gs://.
      member: train this one alone.
      resume, strict_restore, command, progress: as for `jaxmoe.scaling.run_study`.
    """
    from jaxmoe.ending import ending_together
    from jaxmoe.exclusive import HeldElsewhereError
    from jaxmoe.processes import is_first
    from jaxmoe.scaling.runner import run_study
    from jaxmoe.training import StopRequest, TrainingError, reuse_freed_memory

    log_to_terminal()
    # Before JAX starts its threads.
    with ending_together(TrainingError), reuse_freed_memory(), StopRequest(second="exit") as stop:
        try:
            outcome = run_study(
                study, workdir, only=member, resume=resume, strict_restore=strict_restore, progress=progress,
                command=command, stop=stop,
            )  # fmt: skip
        except HeldElsewhereError as error:
            print(f"not now: {error}", file=sys.stderr)
            return RESUMABLE
    failed = 2 if outcome.mistaken else FAILED
    if not is_first():
        return {"resumable": RESUMABLE, "failed": failed, "done": 0}[outcome.status]
    if outcome.status == "resumable":
        said = f"preempted ({stop.requested}), resumable: nothing is lost. Run the same command again to go on"
        print(f"{said} ({workdir}).")
        return RESUMABLE
    if outcome.status == "failed":
        print(f"failed; what is done is kept. Run the same command again to go on ({workdir}):\n{outcome}")
        return failed
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


def _has(section: ml_collections.ConfigDict, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(section, ml_collections.ConfigDict) or part not in section:
            return False
        section = section[part]
    return True
