"""Stopping on request: SIGTERM and SIGINT end a run after the step that is under way; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Literal

from jaxtyping import Array

from jaxmoe.exit_status import RESUMABLE
from jaxmoe.processes import alone, highest

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within `with StopRequest() as stop:`, the first SIGTERM or SIGINT sets `stop.requested`.

    Where several processes train a run, a signal to any of them stops all, at the same point: `requested` is what they
    last agreed on, by `ask` and `learn`, or by `agree`, which all of them have to call.

    The handlers that were there before are put back at the end. Outside the main thread signals cannot be caught; then
    nothing is ever requested.

    Args:
      second: what a second signal does. `raise`: KeyboardInterrupt, as soon as Python code runs again, for programs
        and notebooks that live on. `exit`: the process ends at once with the status `jaxmoe.exit_status.RESUMABLE`,
        also where the main thread is waiting for a device or for storage; what was finished is on disk.
    """

    def __init__(self, *, second: Literal["raise", "exit"] = "raise"):
        self._signal: str | None = None
        self._heard: str | None = None
        self._agreed: str | None = None
        self._second = second
        self._previous: dict[signal.Signals, object] = {}
        self._wakeup: socket.socket | None = None
        self._previous_wakeup = -1

    @property
    def requested(self) -> str | None:
        """Name of the signal, such as `SIGTERM`; None as long as there was none."""
        return self._signal if alone() else self._agreed

    @property
    def heard(self) -> str | None:
        """Name of the signal that this process got, whether or not the others know of it.

        With `second="exit"` it is there at once; else as soon as Python code runs in the main thread.
        """
        return self._heard or self._signal

    def ask(self) -> Array | None:
        """Asks all processes whether one was signalled; the answer is for `learn`, and on its way meanwhile."""
        if alone():
            return None
        return highest(0 if self._signal is None else signal.Signals[self._signal].value)

    def learn(self, answer: Array | None) -> None:
        """Waits for the answer of `ask`: from now on `requested` is the same in all processes."""
        if answer is not None and self._agreed is None:
            number = int(answer)
            self._agreed = signal.Signals(number).name if number else None

    def agree(self) -> None:
        """`ask`, and `learn` the answer."""
        self.learn(self.ask())

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
        if self._signal is not None and self._second == "raise":
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    def _listen(self) -> None:
        """Has each signal's number written to a socket when it arrives, whatever the main thread does."""
        listening, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(listening,), name="signals", daemon=True).start()

    def _hear(self, listening: socket.socket) -> None:
        """Ends the process at the second of `_SIGNALS`; returns when the other end is closed."""
        with listening:
            while numbers := listening.recv(16):
                for number in filter(_SIGNALS.__contains__, numbers):
                    name = signal.Signals(number).name
                    if self._heard is None:
                        self._heard = name
                        continue
                    sys.stderr.write(
                        f"stopped at once by a second signal ({name}). What was finished is kept; run the same "
                        "command again to go on.\n"
                    )
                    os._exit(RESUMABLE)
