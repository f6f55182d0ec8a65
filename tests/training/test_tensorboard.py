"""Event files hold what was written, and what a full disk has held up."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from jaxmoe.training.tensorboard import EventFile


def events_of(directory):
    """The events of every file, by the format's definition, checksums checked."""
    for path in sorted(directory.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            body = content[place + 12 : place + 12 + length]
            assert struct.unpack_from("<I", content, place + 8) == (masked_crc32c(content[place : place + 8]),)
            assert struct.unpack_from("<I", content, place + 12 + length) == (masked_crc32c(body),)
            yield Event.FromString(body)
            place += 16 + length


def test_scalars_come_back_with_their_steps(tmp_path):
    log = EventFile(tmp_path / "tensorboard", first_step=41)
    log.write(50, {"training/loss": 2.5, "training/tokens": 2000})
    log.write(60, {"training/loss": 1.25})
    log.flush()
    version, started, *written = events_of(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert (started.step, started.session_log.status) == (41, SessionLog.START)
    assert [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in written] == [
        (50, {"training/loss": 2.5, "training/tokens": 2000.0}),
        (60, {"training/loss": 1.25}),
    ]
    log.close()
    log.close()


def test_events_wait_for_a_full_disk_to_be_freed(tmp_path):
    log = EventFile(tmp_path / "tensorboard", first_step=1)
    file = log._file._file
    with open("/dev/full", "ab", buffering=0) as full:
        log._file._file = full
        log.write(1, {"training/loss": 1.0})
        with pytest.raises(OSError, match="No space left"):
            log.flush()
    log._file._file = file
    log.write(2, {"training/loss": 0.5})
    log.close()
    assert [event.step for event in events_of(tmp_path / "tensorboard")] == [0, 1, 1, 2]
