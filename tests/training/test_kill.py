"""Killed at any moment and started again, a run writes the same bytes as one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest

from jaxmoe.config import to_dict

_PROGRAM = """
import json, os, signal, sys, threading, time
sys.modules["tensorboardX"] = None
from jaxmoe.config import RunConfig, from_dict
from jaxmoe.training import ProgressReporter, train

class Signalling(ProgressReporter):
    \"\"\"Sends this process a signal: at a step, or some time after it and by 20 steps later at last.\"\"\"

    def __init__(self, name, at, delay):
        super().__init__(terminal=False)
        self.number, self.at, self.delay = signal.Signals[name], at, delay

    def advance(self, step, *args, **kwargs):
        super().advance(step, *args, **kwargs)
        send = lambda: os.kill(os.getpid(), self.number)
        if step == self.at and self.delay:
            threading.Timer(self.delay, send).start()
        elif step == self.at + (20 if self.delay else 0):
            send()

run = from_dict(RunConfig, json.loads(sys.argv[1]))
name, at, delay = json.loads(sys.argv[3])
result = train(run, sys.argv[2], progress=Signalling(name, at, delay) if name else None)
print(json.dumps({"status": result.status, "step": result.step, "loss": result.loss}))
"""


@pytest.fixture(scope="module")
def start(tiny_run, replace_train, tmp_path_factory):
    """Starts the run in a directory, in a process of its own that may signal itself; compiled once for all."""
    run = replace_train(tiny_run, steps=240, log_every=1, checkpoint_every=20, warmup_steps=4)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", _PROGRAM, json.dumps(to_dict(run))]

    def start(directory, name=None, at=0, delay=0.0) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, str(directory), json.dumps([name, at, delay])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return (finish(start(directory)), (directory / "metrics.jsonl").read_bytes())


def lines_written(directory) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_again_and_again(start, undisturbed, tmp_path):
    """SIGKILL a little after a random number of further steps, wherever that is; then to the end."""
    randomness = random.Random(0)
    progress = 0
    for _ in range(4):
        process = start(tmp_path, "SIGKILL", progress + randomness.randint(5, 30), 0.02 * randomness.random())
        _, err = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, err
        checkpoints = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
        progress = max(checkpoints, default=0)
        assert lines_written(tmp_path) >= progress  # what a checkpoint has passed is on disk
    assert finish(start(tmp_path)) == undisturbed[0]
    assert (tmp_path / "metrics.jsonl").read_bytes() == undisturbed[1]


def test_terminated_is_resumable(start, undisturbed, tmp_path):
    """SIGTERM: the step is finished and saved, and the run goes on from it to the same end."""
    stopped = finish(start(tmp_path, "SIGTERM", 50))
    assert stopped["status"] == "resumable"
    assert 50 <= stopped["step"] < 60
    assert (tmp_path / "checkpoints" / str(stopped["step"])).is_dir()
    assert lines_written(tmp_path) == stopped["step"]
    assert finish(start(tmp_path)) == undisturbed[0]
    assert (tmp_path / "metrics.jsonl").read_bytes() == undisturbed[1]
