"""Stopping on request: SIGTERM and SIGINT end a run after the step that is under way."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within `with StopRequest() as stop:`, the first SIGTERM or SIGINT sets `stop.requested`.

    A second SIGINT (Ctrl-C twice) raises KeyboardInterrupt at once. The handlers that were there before are put
    back at the end. Outside the main thread signals cannot be caught; then nothing is ever requested.
    """

    def __init__(self):
        self.requested: str | None = None
        """Name of the signal, such as `SIGTERM`; None as long as there was none."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
