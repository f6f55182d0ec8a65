"""Stopped by signals and started again, a run writes the same bytes as one that was left alone.

Kills at random moments, SIGKILL included: tests/experiments/test_chaos.py.
"""

import json
import os
import subprocess
import sys

import pytest

from jaxmoe.config import to_dict

_PROGRAM = """
import json, os, signal, sys, threading, time
sys.modules["tensorboardX"] = None
import jax
from experiments.flags import leave
from jaxmoe.config import RunConfig, from_dict
from jaxmoe.training import ProgressReporter, StopRequest, train

class Signalling(ProgressReporter):
    \"\"\"Sends this process SIGTERM at a step.\"\"\"

    def advance(self, step, *args, **kwargs):
        super().advance(step, *args, **kwargs)
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
            if again == "in a save":
                os.rename = terminate_instead
            if again == "in a device":
                stuck = jax.jit(lambda x: jax.pure_callback(terminate_and_hang, x, x))
                jax.block_until_ready(stuck(jax.numpy.zeros(())))

def terminate_and_hang(array):
    \"\"\"What a device computes that never answers; the second signal comes meanwhile.\"\"\"
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while True:
        time.sleep(1)

complete = os.rename

def terminate_instead(source, target):
    \"\"\"Instead of the rename that completes a checkpoint: the second signal, and a disk that hangs.\"\"\"
    if str(target).startswith(f"{sys.argv[2]}/checkpoints/40"):  # which is still being written, perhaps
        return complete(source, target)
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(1)

run = from_dict(RunConfig, json.loads(sys.argv[1]))
at, again = json.loads(sys.argv[3])
with StopRequest(second="exit") as stop:
    result = train(run, sys.argv[2], progress=Signalling(terminal=False), stop=stop)
print(json.dumps({"status": result.status, "step": result.step, "loss": result.loss}))
leave(0)
"""


@pytest.fixture(scope="module")
def start(tiny_run, replace_train):
    """Starts the run in a directory, in a process of its own that may signal itself."""
    run = replace_train(tiny_run, steps=240, log_every=1, checkpoint_every=20, warmup_steps=4)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(to_dict(run))]

    def start(directory, at=None, again=None) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, str(directory), json.dumps([at, again])],
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


def test_terminated_is_resumable(start, undisturbed, tmp_path):
    """SIGTERM: the step is finished and saved, and the run goes on from it to the same end."""
    stopped = finish(start(tmp_path, at=50))
    assert stopped["status"] == "resumable"
    assert 50 <= stopped["step"] < 60
    assert (tmp_path / "checkpoints" / str(stopped["step"])).is_dir()
    assert lines_written(tmp_path) == stopped["step"]
    assert finish(start(tmp_path)) == undisturbed[0]
    assert (tmp_path / "metrics.jsonl").read_bytes() == undisturbed[1]


def test_a_second_signal_exits_at_once_and_loses_nothing_that_was_finished(start, undisturbed, tmp_path):
    """It comes while the checkpoint that the first one asked for is being written, and storage hangs."""
    process = start(tmp_path, at=50, again="in a save")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert "stopped at once by a second signal (SIGTERM)" in err
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {name for name in names if name.isdigit()} == {"20", "40"}
    assert any(name.startswith("5") for name in names), "the one that was being written"
    assert lines_written(tmp_path) >= 50
    assert finish(start(tmp_path)) == undisturbed[0]
    assert (tmp_path / "metrics.jsonl").read_bytes() == undisturbed[1]


def test_a_second_signal_is_heard_while_a_device_hangs(start, tmp_path):
    """The main thread waits in compiled code, where no handler of Python's runs."""
    process = start(tmp_path, at=30, again="in a device")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert "stopped at once by a second signal (SIGTERM)" in err
    assert lines_written(tmp_path) >= 29
