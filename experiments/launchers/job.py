"""A member's job: its command, and what its exit status means."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Literal

from etils import epath

from jaxmoe.exit_status import RESUMABLE
from jaxmoe.scaling.status import read_done, read_status

PREEMPTED = RESUMABLE
MISTAKE = 2
"""Exit status of a mistake in the configuration, which trying again does not mend."""
ABORTED = 128 + signal.SIGABRT
"""Exit status of an end by SIGABRT, as shells and containers have it."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One member, trained by `python -m experiments.run`.

    Attributes:
      member: its name.
      workdir: of the study.
      arguments: of `experiments.run`, without the program.
    """

    member: str
    workdir: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """To start it on this machine."""
        return [sys.executable, "-m", "experiments.run", *self.arguments]

    @property
    def directory(self) -> epath.Path:
        """Its run directory."""
        return epath.Path(self.workdir) / self.member

    def steps_done(self) -> int:
        """As its run directory says."""
        done = read_done(self.directory)
        return (read_status(self.directory).get("step") or 0) if done is None else done["step"]


@dataclasses.dataclass
class Attempts:
    """Decides whether a job is started again.

    A job that was preempted (exit status 75) is started again without that counting as a failure, as long as it gets
    on: one that stops at the same step as the time before failed. A mistake in the configuration (2) is not tried
    again; anything else is, up to `retries` times.

    Attributes:
      retries: how often a failed job is started again.
      failures: so far.
      step: at which it was preempted last.
    """

    retries: int
    failures: int = 0
    step: int | None = None

    def after(self, exit_status: int, step: int) -> Literal["done", "again", "failed"]:
        """What follows when the job ends.

        Args:
          exit_status: of the process; negative for the number of a signal that killed it.
          step: steps done by then.
        """
        if exit_status == 0:
            return "done"
        if exit_status == MISTAKE:
            return "failed"
        got_on = self.step is None or step > self.step
        if exit_status == PREEMPTED:
            self.step = step
            if got_on:
                return "again"
        self.failures += 1
        return "again" if self.failures <= self.retries else "failed"


def as_preempted(exit_status: int, processes: int) -> int:
    """An exit status, or `PREEMPTED` where JAX's runtime ended one of several processes since another one is lost.

    It does so by SIGABRT. Where the process has aborted for a reason of its own it comes to the same step again, which
    `Attempts` counts as a failure.

    Args:
      exit_status: of a process; negative for the number of a signal that killed it.
      processes: of the job.
    """
    return PREEMPTED if processes > 1 and exit_status in (-signal.SIGABRT, ABORTED) else exit_status


def describe_exit(exit_status: int) -> str:
    """An exit status for people, such as `killed by SIGKILL`."""
    if exit_status >= 0:
        return f"exit status {exit_status}"
    try:
        return f"killed by {signal.Signals(-exit_status).name}"
    except ValueError:
        return f"killed by signal {-exit_status}"


def explain_exit(exit_status: int, log: str | os.PathLike) -> str:
    """`describe_exit`, and what the process said last in its log if it ended by itself."""
    path = pathlib.Path(log)
    said = ""
    if exit_status > 0 and path.exists():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        said = next((line for line in reversed(lines) if line), "")
    return f"{describe_exit(exit_status)}: {said}" if said else describe_exit(exit_status)


def describe_command(command: Sequence[str]) -> str:
    """A command as it would be typed, with `python` for this interpreter."""
    return shlex.join(["python" if part == sys.executable else part for part in command])
