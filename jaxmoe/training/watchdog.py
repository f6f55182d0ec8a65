"""A watchdog: ends a process in which nothing has moved for too long, so that a scheduler can start it again.

A device, another host or a network file system that hangs leaves the main thread waiting in compiled code, where no
exception reaches it. A thread of its own notices, writes down where every thread stands, and leaves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import jax
from etils import epath

from jaxmoe.exit_status import RESUMABLE
from jaxmoe.liveness import heard_by
from jaxmoe.processes import alone, counted
from jaxmoe.storage import write_text

PATIENCE = 3
"""How many times the limit holds where XLA may be compiling, or storage is waited for."""

_LONGEST_POLL_SECONDS = 1.0
_SECONDS_TO_TELL = 10.0

_SECONDS_TO_ASK = 10.0


class Watchdog:
    """While it is open as a context manager, the process ends if nothing moves for `minutes`.

    It then writes the stacks of all threads to stderr and to `watchdog-<process>.txt` in the run directory, and exits
    with `jaxmoe.exit_status.RESUMABLE`; what a kill would leave is left. Until the first step, in an evaluation, and
    while a checkpoint is read, begun or finished, the limit is `PATIENCE` times as long. What moves inside of another
    watchdog that is opened meanwhile moves for this one, and so does what moves in another process of the run, which
    this one may be waiting for. Time in which the process itself is stopped, as by Ctrl-Z, does not count. A thread
    that hangs without ever letting go of Python's lock is not noticed.

    Args:
      directory: of the run.
      minutes: the limit; None never ends anything.
    """

    def __init__(self, directory: epath.PathLike, minutes: float | None):
        self._report = epath.Path(directory) / f"watchdog-{jax.process_index()}.txt"
        self._seconds = None if minutes is None else 60 * minutes
        self._doing, self._patience = "starting", PATIENCE
        self._last_beat = object()
        self._hearing = contextlib.ExitStack()
        self._outer: Callable[[], None] | None = None
        self._closed = threading.Event()

    def step(self, number: int) -> None:
        """A training step has ended, and the next is to end within the limit."""
        self._doing, self._patience = f"after step {number}", 1
        self.beat()

    def beat(self) -> None:
        """Something moved."""
        self._last_beat = object()
        if self._outer is not None:
            self._outer()

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Within the block the limit is `PATIENCE` times as long.

        Args:
          doing: what goes on in it, for the report.
        """
        before = self._doing, self._patience
        self._doing, self._patience = doing, PATIENCE
        self.beat()
        try:
            yield
        finally:
            self._doing, self._patience = before
            self.beat()

    def __enter__(self) -> Watchdog:
        self._outer = self._hearing.enter_context(heard_by(self.beat))
        if self._seconds is not None:
            threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._hearing.close()
        self._closed.set()

    def _watch(self, seconds: float) -> None:
        poll = min(_LONGEST_POLL_SECONDS, seconds / 10)
        seen, quiet = None, 0.0
        others = None if alone() else _Others(min(_SECONDS_TO_ASK, seconds / 10))
        while not self._closed.wait(poll):
            if others is not None and others.moved(self._last_beat, poll):
                quiet = 0.0
            if self._last_beat is seen:
                quiet += poll  # not what the clock says: while the process is stopped, nothing can move
            else:
                seen, quiet = self._last_beat, 0.0
            if quiet > seconds * self._patience:
                self._end(quiet)

    def _end(self, quiet: float) -> None:
        text = (
            f"watchdog: nothing has moved for {quiet / 60:.3g} minutes ({self._doing}). This process ends with status "
            f"{RESUMABLE}; the same command goes on from the last checkpoint. Where every thread stood:\n\n{_stacks()}"
        )
        # What hangs may be the very disk or terminal that is written to.
        telling: list[Callable[[], object]] = [
            lambda: print(text, file=sys.__stderr__, flush=True),
            lambda: write_text(self._report, text),
        ]
        threads = [threading.Thread(target=tell, daemon=True) for tell in telling]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_SECONDS_TO_TELL)
        os._exit(RESUMABLE)


class _Others:
    """Whether anything moved in the other processes: all count what moved in them together.

    Args:
      seconds: between two questions.
    """

    def __init__(self, seconds: float):
        self._seconds, self._since, self._seen, self._count = seconds, 0.0, None, 0

    def moved(self, own: object, passed: float) -> bool:
        """Whether more was counted since the last question than this process's own beat.

        Args:
          own: the last beat of this process.
          passed: seconds since the last call.
        """
        self._since += passed
        if self._since < self._seconds:
            return False
        more = int(own is not self._seen)
        self._since, self._seen = 0.0, own
        count = counted("moved", more)
        if count is None:
            return False
        moved, self._count = count - more > self._count, count
        return moved


def _stacks() -> str:
    """The stack of every Python thread."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
