"""Faults of storage, told apart by whether what failed may succeed later."""

from __future__ import annotations

import errno
import re

_NO_SPACE_CODES = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_WORDS = ("no space left", "enospc", "disk quota exceeded")

_PASSING_CODES = (
    *_NO_SPACE_CODES, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOBUFS,
    errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN,
)  # fmt: skip
_PASSING_STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL")
_PASSING_CLIENTS = ("aiohttp", "gcsfs", "google", "requests", "urllib3")


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NO_SPACE_CODES:
            return True
        if any(words in str(error).lower() for words in _NO_SPACE_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_storage_fault(error: BaseException | None) -> bool:
    """Whether an error says that storage is out of order for a while: what failed may succeed later.

    Of a full disk, a network that is down, and an object store that does not answer or answers 429 or 5xx, that is
    true; of a folder that is not there or may not be written to, it is not.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if is_no_space(error) or _is_passing(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if type(error).__name__ == "JaxRuntimeError":  # of a device; it looks like one of TensorStore's
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING_CODES
    if type(error).__module__.split(".")[0] in _PASSING_CLIENTS:
        status = getattr(error, "code", None) or getattr(error, "status", None)  # None: no answer at all
        return status is None or int(status) in (408, 429) or int(status) >= 500
    text = str(error)
    of_the_system = re.search(r"OS error (\d+)", text)  # TensorStore has errors of the system as text
    if of_the_system is not None:
        return int(of_the_system[1]) in _PASSING_CODES
    return text.startswith(_PASSING_STATUSES)


def first_line(error: BaseException) -> str:
    """An error in one line, by what caused it where it is a bare `Exception`, as Orbax wraps what it meets."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
