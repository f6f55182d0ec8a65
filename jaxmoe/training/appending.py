"""A local file that only grows, on a disk that may be full for a while."""

from __future__ import annotations

import logging
import os
import pathlib
import threading

from etils import epath

from jaxmoe.storage_faults import first_line, is_storage_fault

logger = logging.getLogger(__name__)


class AppendedFile:
    """A file that is appended to, by several threads. What cannot be written for the moment is held, in its order.

    Args:
      path: local; its folder must exist.
    """

    def __init__(self, path: epath.PathLike):
        self._path = pathlib.Path(path)
        self._file = self._path.open("ab", buffering=0)
        self._held = b""
        self._lock = threading.Lock()

    def append(self, content: bytes) -> None:
        """Adds bytes; a reader may see them from now on, and after `flush` they survive.

        Raises:
          OSError: they cannot be written, for another reason than that the disk is full or does not answer.
        """
        with self._lock:
            waiting = bool(self._held)
            self._held += content
            try:
                self._write()
            except OSError as error:
                if not is_storage_fault(error):
                    raise
                if not waiting:
                    logger.warning(
                        "%s cannot be written to (%s); its lines are held in memory", self._path, first_line(error)
                    )

    def flush(self) -> None:
        """Returns when everything is on disk.

        Raises:
          OSError: it is not; nothing is lost, and a later call tries again.
        """
        with self._lock:
            self._write()
        os.fsync(self._file.fileno())  # other threads may append meanwhile

    def close(self) -> None:
        """Writes what is held if the disk takes it, and closes; a second time does nothing."""
        if self._file.closed:
            return
        try:
            with self._lock:
                self._write()
        except OSError as error:
            if not is_storage_fault(error):
                raise
            logger.warning("the last lines of %s could not be written (%s)", self._path, first_line(error))
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._held:
            self._held = self._held[self._file.write(self._held) :]
