"""A sign of life in the run directory: what a member is doing, how far it is, and what went wrong last."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from etils import epath

from jaxmoe.run_files import STATUS_FILE
from jaxmoe.scaling.status import HEARTBEAT_SECONDS, State, in_use, read_status
from jaxmoe.storage import write_json

if TYPE_CHECKING:
    from jaxmoe.training import ProgressReporter, StopRequest

_LOOK_SECONDS = 0.5


class Heartbeat:
    """Within the `with` block `status.json` says `running`, with a new heartbeat every `HEARTBEAT_SECONDS`.

    A request to stop is written down as soon as it is heard, since the process may be killed before it has saved:
    then whoever asked does not wait for longer, and nothing failed.

    Leaving the block without `ended` is a failure if by an error, and else, as after a second Ctrl-C or when another
    process of the run is lost, a stop. Nothing is written where another process is training in the directory, and a
    file that cannot be written stops nothing: where the storage is gone, training says so.

    Args:
      directory: of the run, local or gs://.
      progress: asked for how far the member is.
      stop: by which the process learns that it is to stop.
      write: whether this process is the one that writes for its member.
    """

    def __init__(
        self, directory: epath.PathLike, progress: ProgressReporter, stop: StopRequest, *, write: bool = True
    ):
        self._directory, self._progress, self._before = epath.Path(directory), progress, progress.latest
        self._stop, self._write_at_all = stop, write
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._contents: dict[str, Any] = {}

    def __enter__(self) -> Heartbeat:
        self._write_at_all = self._write_at_all and not in_use(self._directory)
        if self._write_at_all:
            before = read_status(self._directory)
            self._contents = {
                "state": "running",
                "step": before.get("step"),
                "loss": before.get("loss"),
                "tokens_per_second": None,
                "starts": before.get("starts", 0) + 1,
                "error": before.get("error"),
                "stopping": None,
                **_here(),
            }
            self._write()
            self._thread.start()
        return self

    def ended(self, state: State, error: str | None = None) -> None:
        """The member is not trained any more; `error` of a failed one. Earlier errors stay until it is done."""
        self._over.set()
        if not self._write_at_all:
            return
        self._thread.join()
        if state == "failed" and in_use(self._directory):
            return  # it failed because another process came first
        self._contents["state"] = state
        if state in ("failed", "done"):
            self._contents["error"] = error
        self._write()

    def __exit__(self, *exception) -> None:
        from jaxmoe.ending import lost_another  # loads JAX, which launchers do without

        error = exception[1]
        if self._over.is_set():
            return
        if isinstance(error, Exception) and not lost_another(error):
            self.ended("failed", f"{type(error).__name__}: {error}")
        else:
            self.ended("preempted")

    def _beat(self) -> None:
        due = time.monotonic() + HEARTBEAT_SECONDS
        while not self._over.wait(_LOOK_SECONDS):
            heard = self._stop.heard
            if heard != self._contents["stopping"] or time.monotonic() >= due:
                self._contents["stopping"] = heard
                self._write()
                due = time.monotonic() + HEARTBEAT_SECONDS

    def _write(self) -> None:
        latest = self._progress.latest
        if latest is not None and latest is not self._before:  # else it is of the member before
            self._contents |= {"step": latest.step, "loss": latest.loss, "tokens_per_second": latest.tokens_per_second}
        _write_status(self._directory, self._contents)


def record_end(
    directory: epath.PathLike, state: State, error: str | None = None, *, since: float | None = None
) -> None:
    """Writes into `status.json` how a member ended, on behalf of a process that could not say so itself.

    Args:
      directory: of the run.
      state: `failed`, or `preempted`.
      error: of a failed one, for people; None keeps the last.
      since: seconds since 1970 at which the process was started; what it wrote itself after that stays. None: it
        did not get as far as writing.
    """
    directory = epath.Path(directory)
    if in_use(directory):
        return
    written = read_status(directory)
    if since is not None and written and written["state"] != "running" and written["heartbeat"] >= since:
        return
    starts = written.get("starts", 0) + (not written or written["state"] != "running")
    ended = {"state": state, "error": error or written.get("error"), "starts": starts}
    _write_status(directory, {**written, **ended, **_here()})


def _here() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid()}


def _write_status(directory: epath.Path, contents: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, ValueError):
        write_json(directory / STATUS_FILE, {**contents, "heartbeat": time.time()})
