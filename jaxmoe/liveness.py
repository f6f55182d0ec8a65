"""Signs of life: whatever takes long tells that it moves, and a watchdog hears it, if one is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Something moved, such as a batch of an evaluation or a block of text that was tokenized."""
    if _listeners:
        _listeners[-1]()


@contextlib.contextmanager
def heard_by(listener: Callable[[], None]) -> Iterator[Callable[[], None] | None]:
    """Within the block `beat` calls `listener`; gives the one that it called before, if any."""
    before = _listeners[-1] if _listeners else None
    _listeners.append(listener)
    try:
        yield before
    finally:
        _listeners.remove(listener)
