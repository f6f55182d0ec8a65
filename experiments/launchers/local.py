"""Jobs on this machine, N at a time, each with its share of the cores or devices."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from experiments.launchers.job import PREEMPTED, Attempts, Job, describe_command, describe_exit, explain_exit
from experiments.launchers.pid_file import PidFile
from experiments.launchers.pinning import Share
from jaxmoe.config import ConfigError
from jaxmoe.scaling.heartbeat import record_end

_POLL_SECONDS = 0.2
_LAUNCHER = "launcher.pid"

Outcome = Literal["done", "failed", "resumable"]


@dataclasses.dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen
    slot: int
    started: float


class LocalLauncher:
    """Runs jobs until each is done or has failed for good.

    SIGTERM or SIGINT is passed on to the jobs; the call then waits until they have saved and ended.

    Args:
      logs: folder for `MEMBER.log` and the files by which `cancel` finds the processes.
      shares: one for each job at a time.
      retries: how often a failed job is started again.
      note: told what happens, a line at a time.
    """

    def __init__(self, logs: str | os.PathLike, shares: Sequence[Share], retries: int, note: Callable[[str], None]):
        self._logs, self._shares, self._retries, self._note = pathlib.Path(logs), shares, retries, note
        self._running: list[_Running] = []
        self._stopping = False

    def launch(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Runs them, in order; one that is started again goes to the end of the queue.

        Returns:
          How each ended, by member.

        Raises:
          ConfigError: another launcher, or a job that an earlier one left, is at work in the folder.
        """
        waiting = collections.deque(jobs)
        attempts = {job.member: Attempts(self._retries) for job in jobs}
        outcomes: dict[str, Outcome] = {}
        with PidFile(self._logs / _LAUNCHER).hold(), self._signals_passed_on():
            for job in jobs:
                self._require_unused(job)
            while self._running or (waiting and not self._stopping):
                free = sorted(set(range(len(self._shares))) - {running.slot for running in self._running})
                while free and waiting and not self._stopping:
                    self._start(waiting.popleft(), free.pop(0))
                time.sleep(_POLL_SECONDS)
                for running in [one for one in self._running if one.process.poll() is not None]:
                    self._running.remove(running)
                    outcome = self._ended(running, attempts[running.job.member])
                    if outcome == "again":
                        waiting.append(running.job)
                    else:
                        outcomes[running.job.member] = outcome
        return {job.member: outcomes.get(job.member, "resumable") for job in jobs}

    def _start(self, job: Job, slot: int) -> None:
        share = self._shares[slot]
        self._logs.mkdir(parents=True, exist_ok=True)
        with PidFile(self._logs / f"{job.member}.pid").locked() as pid_file, _pinned(share.cores):
            with (self._logs / f"{job.member}.log").open("ab") as log:
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {describe_command(job.command)}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, **share.environment()},
                    pass_fds=[pid_file.fileno()],
                    process_group=0,  # else Ctrl-C reaches it twice, from the terminal and from here
                )  # fmt: skip
            PidFile.name(pid_file, process.pid)
        self._running.append(_Running(job, process, slot, time.time()))
        self._note(f"{job.member}: started ({share}, process {process.pid})")
        if self._stopping:  # the signal came while it was being started
            process.send_signal(signal.SIGTERM)

    def _ended(self, running: _Running, attempts: Attempts) -> Literal["again", "done", "failed", "resumable"]:
        job, status = running.job, running.process.returncode
        log = self._logs / f"{job.member}.log"
        if self._stopping and status == -signal.SIGTERM:  # before it could listen, so nothing was begun
            status = PREEMPTED
        if status:
            state, error = ("preempted", None) if status == PREEMPTED else ("failed", explain_exit(status, log))
            record_end(job.directory, state, error, since=running.started)
        if self._stopping and status == PREEMPTED:
            self._note(f"{job.member}: stopped, and can go on")
            return "resumable"
        outcome = attempts.after(status, job.steps_done())
        if outcome == "done":
            self._note(f"{job.member}: done")
        elif outcome == "failed":
            self._note(f"{job.member}: failed, {describe_exit(status)}; see {log}")
        elif self._stopping:
            return "resumable"
        else:
            why = "preempted" if status == PREEMPTED else f"failed ({describe_exit(status)})"
            count = f", failure {attempts.failures} of at most {attempts.retries + 1}" if attempts.failures else ""
            self._note(f"{job.member}: {why}{count}; it is started again")
        return outcome

    def _require_unused(self, job: Job) -> None:
        process = PidFile(self._logs / f"{job.member}.pid").process()
        if process is not None:
            raise ConfigError(
                f"{job.member}: process {process}, which an earlier launcher started, is still at work; wait until it "
                "is done, or `cancel`."
            )

    @contextlib.contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def pass_on(number: int, frame: object) -> None:
            del number, frame
            self._stopping = True
            for running in self._running:
                running.process.send_signal(signal.SIGTERM)

        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def cancel(logs: str | os.PathLike, members: Sequence[str], *, wait_seconds: float = 600.0) -> list[str]:
    """Stops a launcher and its jobs, whichever shell they were started from, so that all of them can go on.

    Args:
      logs: folder that the launcher was given.
      members: whose jobs are stopped if the launcher is gone.
      wait_seconds: until all of them have ended.

    Returns:
      What was stopped, for people; empty if nothing was at work.

    Raises:
      ConfigError: something has not ended in time.
    """
    logs = pathlib.Path(logs)
    files = {"launcher": PidFile(logs / _LAUNCHER)}
    if files["launcher"].process() is None:  # jobs outlive a launcher that was killed
        files = {member: PidFile(logs / f"{member}.pid") for member in members}
    processes = {name: file.process() for name, file in files.items()}
    at_work = {name: process for name, process in processes.items() if process is not None}
    for process in at_work.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + wait_seconds
    while any(files[name].process() == process for name, process in at_work.items()):
        if time.monotonic() > deadline:
            raise ConfigError(f"{', '.join(at_work)}: still at work {wait_seconds:.0f} s after SIGTERM; see {logs}.")
        time.sleep(_POLL_SECONDS)
    return [f"{name} (process {process})" for name, process in at_work.items()]


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """Processes started in the `with` block get these cores, if any are named."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
