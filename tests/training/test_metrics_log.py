"""The log: what a line says, what a kill may leave behind, and what a full disk does."""

import errno
import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.storage_faults import is_no_space
from jaxmoe.training import metrics as metrics_module
from jaxmoe.training.errors import NoSpaceLeftError, explain_no_space
from jaxmoe.training.metrics import JsonLines, Throughput, metrics_line, plain_number


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_number_gives_the_same_float32_back(value):
    written = json.loads(json.dumps(plain_number(np.float32(value))))
    assert struct.pack("f", np.float32(written)) == struct.pack("f", np.float32(value))


def test_numbers_are_short_and_what_is_not_finite_is_null():
    assert json.dumps(plain_number(jnp.float32(0.1))) == "0.1"
    assert plain_number(jnp.int32(7)) == 7
    assert plain_number(np.float32("nan")) is None
    assert plain_number(np.float32("inf")) is None


def test_line_has_a_fixed_order_and_null_for_an_absent_source():
    metrics = {
        "tokens": np.float32(224), "skipped": np.int32(1), "learning_rate": np.float32(0.25),
        "source_loss": np.array([1.5, np.nan], np.float32), "loss": np.float32(1.5), "dead_experts": np.float32(2),
        "expert_load": np.ones((2, 4)), "skipped_in_a_row": np.int32(0),
    }  # fmt: skip
    line = metrics_line(12, metrics, ["facts", "sums"])
    assert json.dumps(line) == (
        '{"step": 12, "loss": 1.5, "learning_rate": 0.25, "loss/facts": 1.5, "loss/sums": null, '
        '"dead_experts": 2, "tokens": 224, "skipped": 1}'
    )


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 8}) + "\n" for step in steps)


@pytest.mark.parametrize("torn", ["", '{"step": 40, "lo', '{"step": 40, "loss": 5.0}', "\x00\x00", "null\n", "{}\n"])
@pytest.mark.parametrize(("keep_until", "kept"), [(0, ()), (20, (10, 20)), (29, (10, 20)), (99, (10, 20, 30))])
def test_reopening_cuts_what_comes_again(tmp_path, torn, keep_until, kept):
    """Lines after the checkpoint and a line that a kill tore are cut; what follows stands where they stood."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(10, 20, 30) + torn)
    log = JsonLines(path, keep_until)
    log.write({"step": 100, "loss": 12.5})
    log.flush()
    log.close()
    log.close()
    assert path.read_text() == lines(*kept, 100)
    assert list(tmp_path.iterdir()) == [path]


def test_whole_file_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(10, 20))
    before = path.stat().st_ino
    JsonLines(path, 20).close()
    assert path.stat().st_ino == before


def test_where_files_cannot_be_appended_to_they_are_rewritten_at_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_module, "is_remote", lambda path: True)
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(10, 20))
    log = JsonLines(path, 10)
    log.write({"step": 20, "loss": 2.5})
    assert path.read_text() == lines(10)
    log.flush()
    assert path.read_text() == lines(10, 20)
    log.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the platform has no /dev/full")
def test_lines_wait_for_a_full_disk_to_be_freed(tmp_path, caplog):
    """Each is held once, in order, with one warning; `flush` says that the disk is full."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(10))
    log = JsonLines(path, 10)
    file = log._file._file
    with open("/dev/full", "ab", buffering=0) as full:
        log._file._file = full
        for step in (20, 30):
            log.write({"step": step, "loss": step / 8})
        with (
            pytest.raises(NoSpaceLeftError, match=r"no space left at /runs/a; last good checkpoint: step 40; free"),
            explain_no_space("/runs/a", lambda: 40),
        ):
            log.flush()
    assert len(caplog.records) == 1
    log._file._file = file
    log.write({"step": 40, "loss": 5.0})
    log.flush()
    log.close()
    assert path.read_text() == lines(10, 20, 30, 40)


def test_full_disk_is_recognized_in_every_disguise():
    plain = OSError(errno.ENOSPC, "No space left on device")
    wrapped = ValueError("INTERNAL: write failed")
    wrapped.__cause__ = plain
    assert is_no_space(plain)
    assert is_no_space(wrapped)
    assert is_no_space(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_no_space(ValueError("UNKNOWN: Error writing file: [OS error 28: ENOSPC No space left on device]"))
    assert not is_no_space(OSError(errno.EACCES, "Permission denied"))


def test_throughput_counts_neither_pauses_nor_padding():
    """Steps of 1, 2 and 3 s with 60 tokens in 80 positions; 100 s of evaluation between them do not count."""
    throughput = Throughput(flops_per_token=1e3, positions=80)
    for now in (0.0, 1.0, 3.0):
        throughput.observe(now, 60)
    throughput.pause()
    for now in (103.0, 106.0):
        throughput.observe(now, 60)
    assert throughput.line(5) == {
        "step": 5,
        "step_seconds": 2.0,
        "tokens_per_second": 30.0,
        "positions_per_second": 40.0,
        "model_flops_per_second": 30e3,
    }
    assert throughput.line(6) is None
