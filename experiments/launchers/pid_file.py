"""Files that name a process and are locked as long as it lives, so that nothing is ever sent to another one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import IO

from jaxmoe.config import ConfigError


class PidFile:
    """The process of one purpose, such as the job of a member, on this machine.

    The lock belongs to the open file, which a child inherits, and ends with the last process that has it open.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)

    def process(self) -> int | None:
        """The process that lives; None if none does."""
        if not self.path.exists():
            return None
        with self.path.open("r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read().strip() or 0) or None
        return None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Names this process for the `with` block.

        Raises:
          ConfigError: another one is there.
        """
        with self.locked() as file:
            self.name(file, os.getpid())
            yield

    @contextlib.contextmanager
    def locked(self) -> Iterator[IO[str]]:
        """The file, locked, to be given to a child.

        Raises:
          ConfigError: another process has it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path.stem}: process {self.process()} is at work already; wait for it, or `cancel`."
                ) from None
            yield file

    @staticmethod
    def name(file: IO[str], process: int) -> None:
        """Writes the number of a process into its file."""
        file.seek(0)
        file.truncate()
        file.write(str(process))
        file.flush()
