"""Writing checkpoints beside the training: one at a time, again where storage fails, and not for ever."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable

from jaxmoe.processes import alone, is_first, told_by_all
from jaxmoe.storage_faults import first_line, is_no_space, is_storage_fault
from jaxmoe.training.errors import CheckpointError, no_space_left

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_SAVERS = itertools.count()


@dataclasses.dataclass
class _Job:
    """A checkpoint that is being written.

    Attributes:
      number: how many there were before it.
      step: of the state.
      write: writes it; called again after a failure.
      begun: when the attempt under way began, in seconds of `time.monotonic`; None between two attempts.
      error: of the newest attempt that failed.
      given_up: no further attempt is to be made.
    """

    number: int
    step: int
    write: Callable[[], None]
    begun: float | None = dataclasses.field(default_factory=time.monotonic)
    error: Exception | None = None
    given_up: bool = False


class Saver:
    """Writes checkpoints in a thread of its own.

    What fails for reasons that may pass (`is_storage_fault`) is tried again, half a second later and then after
    twice as long each time, up to half a minute, until it succeeds or the next checkpoint is due, which then takes its
    place: one copy of the state is held, not two. A checkpoint that is given up so is missed. Any other failure is
    raised by the next call of any method.

    Of several processes each writes its part. The first decides when one is tried again or given up, an attempt
    succeeded if it did in all of them, and all call the same methods in the same order.

    Args:
      place: of the checkpoints, for messages.
      last_step: of the newest checkpoint there.
      max_missed: so many missed one after the other are put up with.
      patience: seconds that training waits for storage: at a save for the one before it to be written, and at the
        end for the last one once an attempt has failed.
    """

    def __init__(self, place: str, last_step: int | None, *, max_missed: int, patience: float):
        self.last_step = last_step
        self._place, self._max_missed, self._patience = place, max_missed, patience
        self._changed = threading.Condition()
        self._job: _Job | None = None
        self._failure: Exception | None = None
        self._missed, self._jobs, self._decisions = 0, 0, 0
        self._key = f"checkpoints/{next(_SAVERS)}"

    def save(self, step: int, begin: Callable[[], Callable[[], None]], *, required: bool = False) -> bool:
        """Has a checkpoint written, after the one before it if that is still under way.

        Args:
          step: of the state.
          begin: called now if the checkpoint can be begun; copies the state, and returns what writes it.
          required: as for the last step: wait as long as the one before it is being written.

        Returns:
          Whether it was begun; else storage has not answered for `patience` seconds, and it is missed.

        Raises:
          CheckpointError: a write failed for good, or too many were missed; NoSpaceLeftError if for want of space.
        """
        until = math.inf if required else time.monotonic() + self._patience
        with self._changed:
            under_way = self._decide(lambda job: job.begun is None or time.monotonic() >= until)
            job = self._job
            if under_way == "under way":
                seconds = time.monotonic() - (job.begun or until)
                reason = f"that of step {job.step} has been on its way for {seconds:.0f} s"
                self._miss(step, job.error or TimeoutError(reason), reason)
                return False
            if under_way == "failing":
                error = job.error or ConnectionError("another process could not write its part")
                self._give_up()
                self._miss(job.step, error, first_line(error))
            job = _Job(self._jobs, step, begin())
            self._job, self._jobs = job, self._jobs + 1
        threading.Thread(target=self._work, args=(job,), name=f"checkpoint-{step}", daemon=True).start()
        return True

    def raise_if_failed(self) -> None:
        """Raises what made a write fail for good; does not wait."""
        with self._changed:
            self._raise_failure()

    def wait(self) -> None:
        """Returns when the last write is complete.

        Raises:
          CheckpointError: it failed, and did so for `patience` seconds if the reason is one that may pass.
        """
        until = time.monotonic() + self._patience
        with self._changed:
            if self._decide(lambda job: job.error is not None and time.monotonic() >= until) != "done":
                job = self._job
                self._give_up()
                error = job.error or ConnectionError("another process could not write its part")
                raise self._explained(job.step, error) from error

    def abandon(self) -> None:
        """Makes no further attempt at what fails, and waits for none."""
        with self._changed:
            if self._job is not None:
                self._job.given_up = True
                self._changed.notify_all()

    def _decide(self, enough: Callable[[_Job], bool]) -> str:
        """Waits until there is no job, or, in the first process, there is enough of waiting for it.

        Returns:
          How the job stands: `done`, `failing` between two attempts, or `under way`.
        """
        if is_first():
            while self._job is not None and not enough(self._job):
                self._changed.wait(timeout=0.05)
        stands = "done" if self._job is None else "failing" if self._job.begun is None else "under way"
        if stands == "failing":
            self._job.given_up = True  # no attempt begins while the others are told
        if not alone():
            self._decisions += 1
            self._changed.release()  # what the thread is about does not wait for other processes
            try:
                stands = told_by_all(f"{self._key}/decision/{self._decisions}", stands)[0]
            finally:
                self._changed.acquire()
            while stands == "done" and self._job is not None:
                self._changed.wait(timeout=0.05)
        self._raise_failure()
        return stands

    def _give_up(self) -> None:
        if self._job is not None:
            self._job.given_up = True
            self._job = None
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure from failure.__cause__

    def _miss(self, step: int, error: Exception, reason: str) -> None:
        self._missed += 1
        logger.warning(
            "missed the checkpoint of step %d in %s: %s (%d in a row, %d are put up with; newest there: %s)",
            step, self._place, reason, self._missed, self._max_missed,
            "none" if self.last_step is None else f"step {self.last_step}",
        )  # fmt: skip
        if self._missed > self._max_missed:
            raise self._explained(step, error) from error

    def _explained(self, step: int, error: Exception) -> CheckpointError:
        if is_no_space(error):
            return no_space_left(self._place, self.last_step)
        kept = "there is none yet" if self.last_step is None else f"the last good one is of step {self.last_step}"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._place}: {first_line(error)}; {kept}. "
            "Run again to go on from there."
        )

    def _work(self, job: _Job) -> None:
        pause = _FIRST_PAUSE
        for attempt in itertools.count():
            key = f"{self._key}/{job.number}/{attempt}"
            if told_by_all(f"{key}/go", "" if job.given_up else "go")[0] != "go":
                return
            with self._changed:
                if alone() and job.given_up:
                    return
                job.begun = time.monotonic()
            error: Exception | None = None
            try:
                job.write()
            except Exception as caught:
                error = caught
            end = "written" if error is None else "again" if is_storage_fault(error) else "never"
            ends = told_by_all(f"{key}/end", end)
            if set(ends) != {"written"}:
                error = error or ConnectionError("another process could not write its part")
            with self._changed:
                job.begun, job.error = None, error
                if error is None:
                    self.last_step, self._missed = job.step, 0
                elif "never" in ends:
                    self._failure = self._explained(job.step, error)
                    self._failure.__cause__ = error
                if error is None or self._failure is not None or job.given_up:
                    if self._job is job:
                        self._job = None
                    self._changed.notify_all()
                    return
                logger.warning(
                    "the checkpoint of step %d could not be written to %s (%s); it is tried again in %.1f s",
                    job.step, self._place, first_line(error), pause,
                )  # fmt: skip
                self._changed.notify_all()
                self._changed.wait_for(lambda: job.given_up, timeout=pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
