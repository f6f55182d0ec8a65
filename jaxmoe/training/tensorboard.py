"""TensorBoard's event files, written as they come.

tensorboardX has writers of its own, which hand events to a thread through a queue of bounded length: when a full disk
ends that thread, the next events block for good, and training with them. Here an event is on its way to the disk when
`write` returns; a full disk is put up with, and `flush` says so. Its protocol buffers and checksum are tensorboardX's.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping

from etils import epath

from jaxmoe.training.appending import AppendedFile


class EventFile:
    """A new event file, and with it a new session of the run in TensorBoard.

    Args:
      directory: of the run's event files, local; made if it is not there.
      first_step: TensorBoard forgets what earlier files say of this step and later ones.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(self, directory: epath.PathLike, first_step: int):
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary, self._checksum = event_pb2.Event, summary_pb2.Summary, masked_crc32c
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(directory / name)
        self._append(file_version="brain.Event:2")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(step=first_step, session_log=started)

    def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
        """Adds the scalars of a step, by tag."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(step=step, summary=self._summary(value=values))

    def flush(self) -> None:
        """Returns when everything written is on disk."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        self._file.close()

    def _append(self, **fields) -> None:
        """One record: length, checksum of the length, event, checksum of the event."""
        content = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(content))
        parts = length, struct.pack("<I", self._checksum(length)), content, struct.pack("<I", self._checksum(content))
        self._file.append(b"".join(parts))
