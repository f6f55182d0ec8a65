"""What happens when a checkpoint cannot be written: again, missed, or the end."""

import errno
import logging
import threading

import pytest

from jaxmoe.storage_faults import is_storage_fault
from jaxmoe.training import CheckpointError, NoSpaceLeftError
from jaxmoe.training import saving as saving_module
from jaxmoe.training.saving import Saver


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(saving_module, "_FIRST_PAUSE", 0.01)


class Storage:
    """Fails so many times, and remembers what was written."""

    def __init__(self, failures: int = 0, error: Exception | None = None):
        self.failures, self.error = failures, error or ConnectionResetError("reset by peer")
        self.attempts, self.written = [], []

    def of(self, step: int):
        def write():
            self.attempts.append(step)
            if self.failures > 0:
                self.failures -= 1
                raise self.error
            self.written.append(step)

        return lambda: write


def saver(**options) -> Saver:
    return Saver("/runs/a", 10, **{"max_missed": 2, "patience": 5.0, **options})


def test_written_again_until_it_succeeds(caplog):
    storage, writer = Storage(failures=3), saver()
    assert writer.save(20, storage.of(20))
    writer.wait()
    assert storage.attempts == [20] * 4
    assert (storage.written, writer.last_step) == ([20], 20)
    assert caplog.text.count("the checkpoint of step 20 could not be written to /runs/a (ConnectionResetError") == 3


def until_it_failed(storage, writer):
    while not storage.attempts or writer._job.begun is not None:
        threading.Event().wait(0.001)


def test_the_next_takes_the_place_of_one_that_fails(caplog, monkeypatch):
    """It is missed, with a warning; a success begins the count anew."""
    monkeypatch.setattr(saving_module, "_FIRST_PAUSE", 60.0)
    writer = saver(max_missed=1)
    for step in (20, 40, 60):
        storage = Storage(failures=1)
        writer.save(step, storage.of(step))
        until_it_failed(storage, writer)
        good = Storage()
        writer.save(step + 10, good.of(step + 10))
        writer.wait()
        assert (storage.written, good.written, writer.last_step) == ([], [step + 10], step + 10)
        assert f"missed the checkpoint of step {step} in /runs/a: ConnectionResetError" in caplog.text
    assert caplog.text.count("(1 in a row, 1 are put up with; newest there: step") == 3


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionResetError("gone"), CheckpointError, "step 40 could .*gone; the last good one is of step 10. Run"),
        (OSError(errno.ENOSPC, "No space left"), NoSpaceLeftError, "no space left at /runs/a; .* step 10; free"),
    ],
)
def test_too_many_missed_in_a_row_stop_the_run(monkeypatch, error, kind, message):
    monkeypatch.setattr(saving_module, "_FIRST_PAUSE", 60.0)
    storage, writer = Storage(failures=99, error=error), saver(max_missed=2)
    for step in (20, 30, 40):
        storage.attempts.clear()
        writer.save(step, storage.of(step))
        until_it_failed(storage, writer)
    with pytest.raises(kind, match=message):
        writer.save(50, storage.of(50))
    assert storage.attempts == [40]


def test_at_the_end_it_waits_no_longer_than_its_patience():
    storage, writer = Storage(failures=10**9), saver(patience=0.1)
    writer.save(20, storage.of(20))
    with pytest.raises(CheckpointError, match="step 20 could not .*; the last good one is of step 10"):
        writer.wait()


def test_one_that_hangs_does_not_hold_up_training_for_ever(caplog):
    """The next is missed, and the one under way is still written when storage answers."""
    answers, writer, next_one = threading.Event(), saver(patience=0.1), Storage()
    assert writer.save(20, lambda: answers.wait)
    assert not writer.save(30, next_one.of(30))
    assert "missed the checkpoint of step 30 in /runs/a: that of step 20 has been on its way for" in caplog.text
    answers.set()
    writer.wait()
    assert writer.last_step == 20
    assert writer.save(40, next_one.of(40))
    writer.wait()
    assert next_one.written == [40]


def test_what_is_no_fault_of_storage_is_raised_at_the_next_step():
    storage, writer = Storage(failures=1, error=KeyError("a mistake")), saver()
    writer.raise_if_failed()
    writer.save(20, storage.of(20))
    while writer._job is not None:
        threading.Event().wait(0.001)
    with pytest.raises(CheckpointError, match="step 20 could not .* /runs/a: KeyError: 'a mistake'; the last"):
        writer.raise_if_failed()
    writer.raise_if_failed()  # once
    assert storage.attempts == [20]


def test_abandoned_it_makes_no_further_attempt(monkeypatch, caplog):
    monkeypatch.setattr(saving_module, "_FIRST_PAUSE", 60.0)
    storage, writer = Storage(failures=9), saver()
    with caplog.at_level(logging.ERROR):
        writer.save(20, storage.of(20))
        until_it_failed(storage, writer)
        writer.abandon()
    assert storage.attempts == [20]


class HttpError(Exception):
    def __init__(self, code):
        super().__init__(f"answer {code}")
        self.code = code


HttpError.__module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("slow"), True),
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EIO, "broken"), True),
        (FileNotFoundError(errno.ENOENT, "no folder"), False),
        (PermissionError(errno.EACCES, "not yours"), False),
        (HttpError(503), True),
        (HttpError(429), True),
        (HttpError(403), False),
        (ValueError("UNAVAILABLE: CURL error Couldn't connect to server"), True),
        (ValueError("INTERNAL: Error writing file [OS error 28: ENOSPC]"), True),
        (ValueError("INTERNAL: Error writing file [OS error 13: EACCES]"), False),
        (ValueError("INVALID_ARGUMENT: wrong"), False),
        (KeyError("x"), False),
    ],
    ids=repr,
)
def test_faults_that_may_pass(error, passing):
    assert is_storage_fault(error) is passing
    wrapped = Exception("in Orbax")
    wrapped.__cause__ = error
    assert is_storage_fault(wrapped) is passing


def test_a_required_checkpoint_waits_for_a_slow_one_before_it():
    """The last of a run is not missed because the one before it takes long."""
    slow, storage, writer = threading.Event(), Storage(), saver(patience=0.05)

    def slowly():
        assert slow.wait(10)
        storage.written.append(20)

    assert writer.save(20, lambda: slowly)
    assert not writer.save(30, storage.of(30))
    threading.Timer(0.3, slow.set).start()
    assert writer.save(40, storage.of(40), required=True)
    writer.wait()
    assert storage.written == [20, 40]
