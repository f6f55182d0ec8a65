"""Keeping freed memory in the process, so that a step on CPU does not fetch its buffers from the system anew."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

# Parameters of mallopt(3), and their defaults.
_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD = -1, 128 * 1024
_MMAP_THRESHOLD, _LARGE, _DEFAULT_MMAP_THRESHOLD = -3, 2**20, 2**25  # what the default has risen to in such programs
_MMAP_MAX, _DEFAULT_MMAP_MAX = -4, 65536
_ARENA_MAX = -8
_NEVER = (1 << 31) - 1

_ROOM = 128 * 2**20

_depth = 0
"""How many blocks of `reuse_freed_memory` are open."""

_room: int | None = None
"""Where the room for the writing of checkpoints is that `open_room` frees."""


@contextlib.contextmanager
def reuse_freed_memory() -> Iterator[bool]:
    """Has the C library keep what is freed for the next allocation, until the outermost such block ends.

    XLA on CPU allocates the temporary buffers of a computation when it starts and frees them when it ends. The GNU
    C library takes large ones from the system every time, and every page of them then costs a fault: over 8,000 in a
    step of the laptop recipe, a quarter of its time. The process holds on to its largest size in the meantime.

    Threads that first allocate inside the block share the main heap, for good: heaps of their own are given back to
    the system whenever they are empty. A program that opens the block before JAX starts its threads, as
    `experiments.run` does, has no such faults at all.

    Yields:
      Whether that is in effect: not where the C library is another one, nor where the environment configures its
      allocator (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    global _depth, _room
    library = _configurable()
    if library is None:
        yield False
        return
    library.mallopt(_ARENA_MAX, 1)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    if _room is None:
        _room = library.malloc(ctypes.c_size_t(_ROOM))
    _depth += 1
    try:
        yield True
    finally:
        _depth -= 1
        if _depth == 0:
            open_room()
            library.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
            library.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
            library.malloc_trim(0)


def open_room() -> None:
    """Frees a room in the heap, set aside when `reuse_freed_memory` begins and never written to, for a first save.

    The buffers of a write, 64 MB or a little more, would else be made in the largest hole of the heap, which is that of
    a step's temporary buffers, and the step beside the write would need another: as much as the state, or more.
    """
    global _room
    room, _room = _room, None
    if room is not None:
        ctypes.CDLL(None).free(ctypes.c_void_p(room))


@contextlib.contextmanager
def give_back_freed_memory() -> Iterator[None]:
    """Has the C library give large buffers back to the system as they are freed, also in `reuse_freed_memory`.

    For what is done once and holds many large buffers one after another, such as reading a checkpoint: the heap keeps
    their places between what stays, a third of the state in a restore of 640 MB.
    """
    library = _configurable()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
    try:
        yield
    finally:
        if library is not None:
            library.mallopt(_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD)
            if _depth:
                library.mallopt(_MMAP_MAX, 0)
                library.mallopt(_TRIM_THRESHOLD, _NEVER)


def _configurable() -> ctypes.CDLL | None:
    """The GNU C library, unless it is another one or the environment configures its allocator."""
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return None
    return _glibc()


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    return library if hasattr(library, "gnu_get_libc_version") else None
