"""Stopping on request: SIGTERM and SIGINT end a run after the step that is under way; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Literal

from jaxmoe.exit_status import RESUMABLE

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within `with StopRequest() as stop:`, the first SIGTERM or SIGINT sets `stop.requested`.

    The handlers that were there before are put back at the end. Outside the main thread signals cannot be caught; then
    nothing is ever requested.

    Args:
      second: what a second signal does. `raise`: KeyboardInterrupt, as soon as Python code runs again, for programs
        and notebooks that live on. `exit`: the process ends at once with the status `jaxmoe.exit_status.RESUMABLE`,
        also where the main thread is waiting for a device or for storage; what was finished is on disk.
    """

    def __init__(self, *, second: Literal["raise", "exit"] = "raise"):
        self.requested: str | None = None
        """Name of the signal, such as `SIGTERM`; None as long as there was none."""
        self._second = second
        self._previous: dict[signal.Signals, object] = {}
        self._wakeup: socket.socket | None = None
        self._previous_wakeup = -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            if self._second == "exit":
                self._listen()
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            self._wakeup.close()
            self._wakeup = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested is not None and self._second == "raise":
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def _listen(self) -> None:
        """Has each signal's number written to a socket when it arrives, whatever the main thread does."""
        listening, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_exit_at_second_signal, args=(listening,), name="signals", daemon=True).start()


def _exit_at_second_signal(listening: socket.socket) -> None:
    """Ends the process at the second of `_SIGNALS`; returns when the other end is closed."""
    arrived = 0
    with listening:
        while numbers := listening.recv(16):
            for number in numbers:
                arrived += number in _SIGNALS
                if arrived == 2:
                    sys.stderr.write(
                        f"stopped at once by a second signal ({signal.Signals(number).name}). What was finished is "
                        "kept; run the same command again to go on.\n"
                    )
                    os._exit(RESUMABLE)
