"""Where members stand, as their run directories say."""

import dataclasses
import json
import os
import signal
import socket
import time

import pytest
from etils import epath

from jaxmoe.config import config_hash
from jaxmoe.exclusive import exclusive
from jaxmoe.scaling import Study
from jaxmoe.scaling.heartbeat import Heartbeat, record_end
from jaxmoe.scaling.status import SILENCE_SECONDS, member_status, read_status
from jaxmoe.training import ProgressReporter, StopRequest

MEMBER = Study.from_config_dict({
    "study": {"name": "tiny"},
    "model": {"vocab_size": 288, "width": 16, "num_layers": 1, "num_heads": 2, "max_sequence_length": 16,
              "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 8}},
    "data": {"tokenizer": "symbols", "sources": {"reasoning": {"kind": "reasoning"}}},
    "train": {"steps": 20, "batch_size": 4, "sequence_length": 16},
    "members": {"E4": {}},
}).member("E4")  # fmt: skip


@pytest.fixture
def progress():
    reporter = ProgressReporter(open(os.devnull, "w"), terminal=False)  # noqa: SIM115
    reporter.member("E4", 20, 3)
    return reporter


def stands(folder, **changes):
    """State, step and error; `changes` go into status.json first."""
    path = folder / "E4" / "status.json"
    if changes:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    status = member_status(folder, MEMBER)
    return status.state, status.step, status.error


def heartbeat(folder, progress, stop=None):
    before, progress.latest = progress.latest, None
    beat = Heartbeat(folder / "E4", progress, stop or StopRequest())
    progress.latest = before
    return beat


def test_a_member_is_followed_from_start_to_end(tmp_path, progress):
    assert stands(tmp_path) == ("waiting", 0, None)
    with heartbeat(tmp_path, progress) as beat:
        assert stands(tmp_path) == ("running", 3, None)
        progress.advance(7, 2.5, 1000.0)
        beat.ended("failed", "the disk is full")
    assert stands(tmp_path) == ("failed", 7, "the disk is full")
    with heartbeat(tmp_path, progress) as beat:
        assert stands(tmp_path) == ("running", 7, "the disk is full"), "the last error stays until it is done"
        beat.ended("preempted")
    assert stands(tmp_path) == ("preempted", 7, "the disk is full")
    (tmp_path / "E4" / "DONE").write_text(
        json.dumps({"step": 20, "loss": 1.5, "config_hash": config_hash(MEMBER.config)})
    )
    status = member_status(tmp_path, MEMBER)
    assert (status.state, status.step, status.loss, status.error, status.starts) == ("done", 20, 1.5, None, 2)
    assert status.tokens_per_second == 1000.0


def test_done_of_another_configuration_is_not_done(tmp_path):
    longer = dataclasses.replace(MEMBER.config, seed=5)
    (tmp_path / "E4").mkdir()
    (tmp_path / "E4" / "DONE").write_text(json.dumps({"step": 20, "loss": 1.5, "config_hash": config_hash(longer)}))
    assert stands(tmp_path) == ("waiting", 0, None)


def test_a_process_that_is_gone_is_not_running(tmp_path, progress):
    with heartbeat(tmp_path, progress) as beat:
        now = read_status(epath.Path(tmp_path / "E4"))["heartbeat"]
        assert stands(tmp_path)[0] == "running"
        state, step, error = stands(tmp_path, process=2**22 + 1)
        assert (state, step) == ("failed", 3)
        assert error.startswith(f"process {2**22 + 1} on {socket.gethostname()} ended without a word")
        assert stands(tmp_path, host="elsewhere")[0] == "running", "of another machine its heartbeat tells"
        assert stands(tmp_path, heartbeat=now - SILENCE_SECONDS - 5)[0] == "failed"
        with exclusive(tmp_path / "E4"):
            assert stands(tmp_path)[0] == "running", "its lock tells more"
        beat.ended("preempted")


def test_one_that_is_killed_after_it_was_told_to_stop_is_preempted(tmp_path, progress):
    """As by a cluster that does not wait until it has saved; what had been told to the start before does not count."""
    with StopRequest(second="exit") as stop, heartbeat(tmp_path, progress, stop) as beat:
        signal.raise_signal(signal.SIGTERM)
        while not read_status(epath.Path(tmp_path / "E4"))["stopping"]:
            time.sleep(0.01)
        assert stands(tmp_path)[0] == "running", "it saves"
        state, step, error = stands(tmp_path, process=2**22 + 1)
        assert (state, step) == ("preempted", 3)
        assert "was told to stop (SIGTERM) and killed before it had saved" in error
        beat.ended("preempted")
    with heartbeat(tmp_path, progress) as beat:
        assert stands(tmp_path, process=2**22 + 1)[0] == "failed"
        beat.ended("preempted")


def test_an_interrupted_member_can_go_on(tmp_path, progress):
    with pytest.raises(KeyboardInterrupt), heartbeat(tmp_path, progress):
        raise KeyboardInterrupt
    assert stands(tmp_path) == ("preempted", 3, None)


def test_another_process_that_was_refused_leaves_the_status_alone(tmp_path, progress):
    with heartbeat(tmp_path, progress) as beat:
        with exclusive(tmp_path / "E4"):
            with heartbeat(tmp_path, progress) as second:
                second.ended("failed", "in use")
            record_end(tmp_path / "E4", "failed", "in use")
            assert stands(tmp_path) == ("running", 3, None)
        beat.ended("preempted")


def test_a_failure_is_recorded_for_those_who_could_not(tmp_path, progress):
    """What a process said itself stays; a process that was killed said nothing."""
    record_end(tmp_path / "E4", "failed", "killed by SIGKILL", since=0.0)
    assert stands(tmp_path) == ("failed", 0, "killed by SIGKILL")
    with heartbeat(tmp_path, progress) as beat:
        record_end(tmp_path / "E4", "failed", "killed by SIGKILL", since=0.0)
        assert stands(tmp_path) == ("failed", 3, "killed by SIGKILL")
        beat.ended("failed", "the loss is not finite")
    record_end(tmp_path / "E4", "failed", "exit status 1", since=0.0)
    assert stands(tmp_path) == ("failed", 3, "the loss is not finite")
    assert read_status(epath.Path(tmp_path / "E4"))["starts"] == 2


def test_a_bucket_tells_the_same(bucket, progress):
    folder = epath.Path(bucket) / "status"
    with Heartbeat(folder / "E4", progress, StopRequest()) as beat:
        assert member_status(folder, MEMBER).state == "running"
        progress.advance(9, 2.0)
        beat.ended("failed", "no")
    status = member_status(folder, MEMBER)
    assert (status.state, status.step, status.loss, status.error) == ("failed", 9, 2.0, "no")
