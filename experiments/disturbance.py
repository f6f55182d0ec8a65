"""A member trained in a process of its own that is killed at a chosen moment."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import random
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Literal

from experiments.end_state import newest_checkpoint, unfinished_checkpoint
from experiments.execution import run_to_status
from experiments.flags import leave
from jaxmoe.training import ProgressReporter

if TYPE_CHECKING:
    from jaxmoe.scaling import Study

Moment = Literal["training", "saving", "starting"]

_MOMENTS: tuple[Moment, ...] = ("training", "saving", "starting")
_LAST_SHARE = 0.9
"""Kills are meant for the first nine tenths of a run: near the end it may be over before its kill comes."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A kill to come.

    Attributes:
      signal: such as `KILL`.
      moment: while a step is `training`; while a checkpoint is `saving`, the first after `step`; or between the
        process's readiness and its first step, `starting`.
      step: not before it.
      delay: how long after that moment has come, as a share of the time that a step or a start takes.
    """

    signal: str
    moment: Moment
    step: int
    delay: float


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill that fell.

    Attributes:
      plan: that it follows.
      seen: last step that the process had reported; None if it had reported none.
      status: exit status of the process, negative if the signal ended it.
      unfinished: name of the checkpoint whose writing it cut off; None if it cut off none.
      newest: step of the newest complete checkpoint now, from which the next process goes on; None: the beginning.
      start: seconds from the process's readiness to its first step; None if there was none.
    """

    plan: Plan
    seen: int | None
    status: int
    unfinished: str | None
    newest: int | None
    start: float | None


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of an undisturbed run: from a process's readiness to its first step, of a step, and of everything."""

    start: float
    step: float
    whole: float


def plan_kills(kills: int, steps: int, signals: Sequence[str], seed: int) -> list[Plan]:
    """Random moments of a run in the order in which they come; every signal and kind of moment has its turn.

    A checkpoint that is being written is cut off by KILL where that is one of the signals; the others would let it be
    finished.
    """
    draw = random.Random(seed)
    places = sorted(draw.randint(1, max(1, int(_LAST_SHARE * steps))) for _ in range(kills))
    moments = itertools.cycle(draw.sample(_MOMENTS, len(_MOMENTS)))
    turns = itertools.cycle(draw.sample(list(signals), len(signals)))
    plans = []
    for step, moment in zip(places, moments):
        cut_off = moment == "saving" and "KILL" in signals
        plans.append(Plan("KILL" if cut_off else next(turns), moment, step, draw.random()))
    return plans


class MemberProcess:
    """Trains a member as `python -m experiments.run --member=...` does, and reports its steps here.

    Args:
      study, member, workdir: what to train, and the study's folder.
      log: a file for what it prints.
    """

    def __init__(self, study: Study, member: str, workdir: str, log: pathlib.Path):
        context = multiprocessing.get_context("spawn")  # a fresh interpreter: JAX does not survive a fork
        self._reports, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_train, args=(study, member, workdir, theirs, log))
        self._process.start()
        theirs.close()
        self.ready_at: float | None = None
        self.first_step_at: float | None = None
        self.seen: int | None = None

    @property
    def start(self) -> float | None:
        """Seconds from its readiness to its first step; None before that."""
        return None if self.first_step_at is None else self.first_step_at - self.ready_at

    def wait_until(self, reached: Callable[[], bool], poll_seconds: float | None = None) -> bool:
        """Returns when `reached()`, asked after every report and every `poll_seconds`, is true; False at the end."""
        while not reached():
            try:
                if self._reports.poll(poll_seconds):
                    self._note(*self._reports.recv())
            except (EOFError, OSError):  # between two reports, or within one
                return False
        return True

    def finish(self) -> int:
        """Waits for the end; returns the exit status, negative for the signal that caused it."""
        self.wait_until(lambda: False)
        self._process.join()
        return self._process.exitcode

    def send(self, name: str) -> None:
        """Sends a signal, such as `KILL`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.Signals[f"SIG{name}"])

    def __enter__(self) -> MemberProcess:
        return self

    def __exit__(self, *exception) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def _note(self, step: int | None) -> None:
        now = time.monotonic()
        if step is None:
            self.ready_at = now
            return
        if self.first_step_at is None:
            self.first_step_at = now
        self.seen = step


def train_to_end(study: Study, member: str, workdir: str, log: pathlib.Path) -> tuple[int, Pace | None]:
    """Trains a member until it is done; the exit status, and how long what took if any step was trained."""
    started = time.monotonic()
    with MemberProcess(study, member, workdir, log) as process:
        status = process.finish()
    ended = time.monotonic()
    if process.start is None:
        return status, None
    step = (ended - process.first_step_at) / process.seen
    return status, Pace(start=process.start, step=step, whole=ended - started)


def train_until_killed(study: Study, member: str, workdir: str, log: pathlib.Path, plan: Plan, pace: Pace) -> Kill:
    """Trains a member, from wherever it is, until the moment of a kill has come.

    Returns:
      What the kill found and left. Where the process ended by itself before its moment, the status says so.
    """
    directory = os.path.join(workdir, member)
    with MemberProcess(study, member, workdir, log) as process:
        if _moment_came(process, plan, directory):
            unit = {"starting": pace.start, "training": 2 * pace.step, "saving": pace.step}[plan.moment]
            time.sleep(plan.delay * unit)
            process.send(plan.signal)
        status = process.finish()
    return Kill(
        plan=plan,
        seen=process.seen,
        status=status,
        # What an earlier kill had left is cleared away before the first step.
        unfinished=None if process.seen is None else unfinished_checkpoint(directory),
        newest=newest_checkpoint(directory),
        start=process.start,
    )


def _moment_came(process: MemberProcess, plan: Plan, directory: str) -> bool:
    """Waits for the moment; False if the process ended before it."""
    if plan.moment == "starting":
        return process.wait_until(lambda: process.ready_at is not None)
    if not process.wait_until(lambda: process.seen is not None and process.seen >= plan.step):
        return False
    if plan.moment == "training":
        return True
    return process.wait_until(lambda: unfinished_checkpoint(directory) is not None, poll_seconds=0.002)


class _Reporting(ProgressReporter):
    """Sends None when the study is about to start, and the number of each step that is done."""

    def __init__(self, reports: Connection):
        super().__init__(terminal=False)
        self._send = reports.send

    def study(self, total_steps: int, done: int = 0) -> None:
        super().study(total_steps, done)
        self._send((None,))

    def advance(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        super().advance(step, loss, tokens_per_second)
        self._send((step,))


def _train(study: Study, member: str, workdir: str, reports: Connection, log: pathlib.Path) -> None:
    """The life of a `MemberProcess`."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = run_to_status(study, workdir, member=member, progress=_Reporting(reports))
    leave(status)
