"""Records that storage could not take when they were made: written later, before any checkpoint that says they are."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from etils import epath

from jaxmoe.evaluation import Record, set_aside, write_records
from jaxmoe.storage_faults import first_line, is_storage_fault

logger = logging.getLogger(__name__)


class PendingRecords:
    """Writes a member's records, and keeps those for which there is no room just now.

    No checkpoint is written before all records of its step are, so that a run that is killed with records pending
    goes on from an earlier one, and makes them again.

    Args:
      directory: of the member.
      config_hash: of its configuration; records of another one are set aside before the first is written.
    """

    def __init__(self, directory: epath.PathLike, config_hash: str):
        self._directory, self._config_hash = epath.Path(directory), config_hash
        self._lock = threading.Lock()
        self._waiting: list[Record] = []
        self._cleared = False

    def add(self, records: Sequence[Record]) -> None:
        """Writes records, or keeps them, with a warning, where storage has no room or does not answer."""
        with self._lock:
            self._waiting.extend(records)
        try:
            self.write()
        except Exception as error:
            if not is_storage_fault(error):
                raise
            logger.warning(
                "%d records cannot be written to %s now (%s); they are written before the next checkpoint",
                len(self._waiting), self._directory, first_line(error),
            )  # fmt: skip

    def write(self, until: int | None = None) -> None:
        """Writes what is waiting, in any thread; returns at once where nothing is.

        Args:
          until: records of no later step than this; None: all.

        Raises:
          OSError: or what else storage says; what was not written goes on waiting.
        """
        with self._lock:
            due = [record for record in self._waiting if until is None or record["step"] <= until]
            if not due:
                return
            if not self._cleared:
                moved = set_aside(self._directory, self._config_hash)
                if moved:
                    where = self._directory.name
                    logger.info("%s: %d records of an earlier configuration are in earlier_records now", where, moved)
                self._cleared = True
            write_records(self._directory, due)
            self._waiting = [record for record in self._waiting if record not in due]
