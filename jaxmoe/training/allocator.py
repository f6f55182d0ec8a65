"""Keeping freed memory in the process, so that a step on CPU does not fetch its buffers from the system anew."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

# Parameters of mallopt(3), and their defaults.
_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD = -1, 128 * 1024
_MMAP_MAX, _DEFAULT_MMAP_MAX = -4, 65536
_NEVER = (1 << 31) - 1


@contextlib.contextmanager
def reuse_freed_memory() -> Iterator[bool]:
    """Has the C library keep what is freed for the next allocation, until the block ends.

    XLA on CPU allocates the temporary buffers of a computation when it starts and frees them when it ends. The GNU
    C library takes large ones from the system every time, and every page of them then costs a fault: over 8,000 in a
    step of the laptop recipe, a quarter of its time. The process holds on to its largest size in the meantime.

    Yields:
      Whether that is in effect: not where the C library is another one, nor where the environment configures its
      allocator (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    library = _glibc()
    if library is None or any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        yield False
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield True
    finally:
        library.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        library.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
