"""A run directory is trained in by one process at a time, and a file that several write is written by one."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import IO

from etils import epath

from jaxmoe.config import ConfigError
from jaxmoe.storage import is_remote

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_SECONDS_TO_LOOK = 1.0
_SECONDS_OF_A_LEASE = 120.0
"""So long a lock of another host is waited for: file servers take back those of a host that is lost (NFS: 90 s)."""


class HeldElsewhereError(ConfigError):
    """A process on another host holds a run directory: it trains there, or its host is lost and its lock stayed."""


@contextlib.contextmanager
def exclusive(directory: epath.PathLike, doing: str = "training") -> Iterator[None]:
    """Holds a run directory for the `with` block, so that no second process writes to its logs and checkpoints.

    The lock is the system's and ends with the process, however that ends; the file that it is on stays. That of another
    host is waited for, since a file server needs a while to notice that a host is lost. Object stores have no such
    lock, nor do some network file systems, which is logged.

    Args:
      directory: of the run; made if it is not there.
      doing: what is done in it, for the message of another process.

    Raises:
      ConfigError: another process holds it; the message says which. HeldElsewhereError if on another host.
    """
    if is_remote(directory):
        yield
        return
    path = epath.Path(directory) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            _lock_or_wait(file, fcntl.LOCK_EX, path.parent, doing)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see that no other process works there.", path.parent, error)
        with contextlib.suppress(OSError):  # who holds it is a hint; a full disk shows itself elsewhere
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


@contextlib.contextmanager
def one_at_a_time(path: epath.PathLike) -> Iterator[None]:
    """Holds a lock file for the `with` block, waiting for whoever holds it now; see `exclusive` for where it cannot.

    Args:
      path: of the lock file, made if it is not there; it stays.
    """
    if is_remote(path):
        yield
        return
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked: %s", path, error)
        yield


def check_unused(directory: epath.PathLike, *, wait: bool = False) -> None:
    """Checks that no process is training in a run directory; leaves nothing behind.

    Args:
      directory: of the run.
      wait: for the lock of another host, as `exclusive` does.

    Raises:
      ConfigError: one is; the message says which. HeldElsewhereError if on another host.
    """
    path = epath.Path(directory) / LOCK_FILE
    if is_remote(directory) or not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        try:
            if wait:
                _lock_or_wait(file, fcntl.LOCK_SH, path.parent)
            else:
                _lock(file, fcntl.LOCK_SH)
        except BlockingIOError:
            raise _in_use(path.parent, file, doing="training") from None
        except OSError:
            return  # `exclusive` says so when training starts


def _lock_or_wait(file: IO[str], kind: int, directory: epath.Path, doing: str = "training") -> None:
    """Takes a lock; one of another host is waited for.

    Raises:
      ConfigError: it is held on this host, or HeldElsewhereError: for longer than that on another one.
    """
    try:
        _lock(file, kind)
    except BlockingIOError:
        held = _in_use(directory, file, doing)
        if not isinstance(held, HeldElsewhereError):
            raise held from None
        logger.warning("%s Waiting %.0f s, in case that host is lost.", held, _SECONDS_OF_A_LEASE)
        try:
            _lock(file, kind, _SECONDS_OF_A_LEASE)
        except BlockingIOError:
            raise _in_use(directory, file, doing) from None


def _lock(file: IO[str], kind: int, seconds: float = _SECONDS_TO_LOOK) -> None:
    """Takes a lock; whoever only looks whether it is held lets go of it at once, and is waited for.

    Raises:
      BlockingIOError: it is held for longer than `seconds`.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)


def _in_use(directory: epath.Path, file: IO[str], doing: str) -> ConfigError:
    """The error for a lock that is held, by what its file says of the holder."""
    file.seek(0)
    holder = file.read().strip() or "another process"
    _, _, host = holder.partition(" on ")
    kind = HeldElsewhereError if host not in ("", socket.gethostname()) else ConfigError
    return kind(f"{directory}: {holder} is {doing} in this folder now; wait until it is done, or take another folder.")
