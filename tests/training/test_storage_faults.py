"""A run whose storage fails: an object store that is out, or out for good, and a disk that is full."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import pytest

from jaxmoe.config import to_dict
from jaxmoe.storage import as_path
from jaxmoe.training import CheckpointError, NoSpaceLeftError, ProgressReporter, train

_PROGRAM = """
import asyncio, json, sys, types
import gcsfs.retry
from experiments.flags import leave
from jaxmoe.config import RunConfig, from_dict
from jaxmoe.storage import as_path
from jaxmoe.training import ProgressReporter, TrainingError, train

# The pauses of gcsfs between its own six attempts, 32 s in all, are shorter, as are the outages.
gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds * float(sys.argv[4])))

class Held(ProgressReporter):  # after a step, until it gets a line
    def advance(self, step, *args):
        print(step, flush=True)
        if step == int(sys.argv[3]):
            sys.stdin.readline()

run = from_dict(RunConfig, json.loads(sys.argv[1]))
try:
    result = train(run, as_path(sys.argv[2]), progress=Held(terminal=False))
except TrainingError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps({"status": result.status, "step": result.step, "loss": result.loss}))
leave(0)
"""


class Run:
    """A run in a process of its own, whose storage is behind a proxy, and the step that it has reached.

    After step `held_after` it waits for `go_on`. The pauses of gcsfs are `pauses` of what they are.
    """

    def __init__(self, run, directory: str, storage, *, held_after: int = 0, pauses: float = 0.1):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "STORAGE_EMULATOR_HOST": storage.url, "TENSORSTORE_GCS_HTTP_URL": storage.url,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(to_dict(run)), directory, str(held_after), str(pauses)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._step, self.last_line, self.errors = 0, "", ""
        self._threads = [threading.Thread(target=self._follow), threading.Thread(target=self._collect)]
        for thread in self._threads:
            thread.start()

    def _follow(self):
        for line in self.process.stdout:
            self.last_line = line
            if line.strip().isdigit():
                self._step = int(line)

    @property
    def step(self) -> int:
        """The last that was looked at."""
        return self._step

    def _collect(self):
        self.errors = self.process.stderr.read()

    def reaches(self, step: int):
        while self.step < step:
            assert self.process.poll() is None, self.errors
            time.sleep(0.01)

    def go_on(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ends(self) -> int:
        status = self.process.wait(timeout=300)
        for thread in self._threads:
            thread.join()
        return status


def steps_saved(directory) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("outage", "rate"),
    [pytest.param(3.0, 0.02, id="3s"), pytest.param(30.0, 0.05, id="30s", marks=pytest.mark.slow)],
)
def test_an_outage_is_survived_with_every_checkpoint(
    tiny_run, replace_train, faulty_storage, bucket, tmp_path, outage, rate
):
    """Only 503 for a while; then a request now and then is cut off or slow. The log is that of an undisturbed run."""
    if outage > 3 and not os.environ.get("JAXMOE_LONG_OUTAGE"):
        pytest.skip("set JAXMOE_LONG_OUTAGE=1 for 30 s without storage")
    run = replace_train(tiny_run, steps=60, checkpoint_every=20, keep_checkpoints=9, log_every=1)
    remote = Run(run, f"{bucket}/outage-{outage}", faulty_storage, held_after=18, pauses=outage / 30)
    remote.reaches(18)
    faulty_storage.rate, over = 1.0, time.monotonic() + outage
    remote.go_on()
    remote.reaches(31)  # beyond that of the checkpoint that cannot be written
    time.sleep(max(0.0, over - time.monotonic()))
    faulty_storage.faults, faulty_storage.rate = ["delay", "reset"], rate
    assert remote.ends() == 0, remote.errors
    assert json.loads(remote.last_line)["status"] == "done"
    assert [passed for line, passed in faulty_storage.requests].count(False) > 1
    local = tmp_path / "local"
    train(run, local)
    directory = as_path(f"{bucket}/outage-{outage}")
    assert steps_saved(directory) == [20, 40, 60]
    assert (directory / "metrics.jsonl").read_bytes() == (local / "metrics.jsonl").read_bytes()


def test_storage_that_stays_away_ends_the_run_after_the_missed_saves(
    tiny_run, replace_train, faulty_storage, bucket
):
    """The last step that is safe is named, and run again it goes on from there to the end."""
    run = replace_train(
        tiny_run, steps=60, checkpoint_every=10, keep_checkpoints=9, max_missed_saves=1, storage_patience_seconds=1.0,
    )  # fmt: skip
    path = f"{bucket}/away"
    first = Run(run, path, faulty_storage, held_after=12)
    while not (as_path(path) / "checkpoints" / "10" / "commit_success.txt").exists():
        assert first.process.poll() is None, first.errors
        time.sleep(0.1)
    faulty_storage.rate = 1.0
    first.go_on()
    assert first.ends() == 1
    assert "missed the checkpoint of step" in first.errors
    faulty_storage.rate = 0.0
    assert "the last good one is of step 10. Run again to go on from there." in first.errors
    again = Run(run, path, faulty_storage)
    assert again.ends() == 0, again.errors
    assert steps_saved(as_path(path)) == list(range(10, 61, 10))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class AtStep(ProgressReporter):
    """Does something when a step is reported."""

    def __init__(self, actions):
        super().__init__(terminal=False)
        self._actions = dict(actions)

    def advance(self, step, *args):
        if step in self._actions:
            self._actions.pop(step)()


def await_checkpoint(directory: pathlib.Path, step: int) -> None:
    while not (directory / "checkpoints" / str(step)).exists():
        time.sleep(0.01)


def fill(folder: pathlib.Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**16, 2**8, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_line(
    tiny_run, replace_train, small_disk, tmp_path, caplog
):
    """The checkpoint of step 12 is missed; when there is space again, those of later steps and all of the log come."""
    run = replace_train(tiny_run, log_every=1, keep_checkpoints=9)
    plain = tmp_path / "plain"
    train(run, plain)
    directory = small_disk / "run"

    def fill_after_checkpoint():
        await_checkpoint(directory, 6)
        fill(small_disk)

    actions = {8: fill_after_checkpoint, 20: (small_disk / "filler").unlink}
    assert train(run, directory, progress=AtStep(actions)).status == "done"
    assert "missed the checkpoint of step 12" in caplog.text
    assert steps_saved(directory) in ([6, 18, 24], [6, 24])  # by when the next attempt is made
    assert (directory / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()


def test_a_disk_that_stays_full_stops_the_run_with_the_last_step_named(tiny_run, replace_train, small_disk, caplog):
    run = replace_train(tiny_run, checkpoint_every=4, max_missed_saves=1, storage_patience_seconds=1.0)
    directory = small_disk / "run"

    def fill_after_checkpoint():
        await_checkpoint(directory, 4)
        fill(small_disk)

    with pytest.raises(NoSpaceLeftError, match="no space left at .*; last good checkpoint: step 4; free space and run"):
        train(run, directory, progress=AtStep({6: fill_after_checkpoint}))
    assert caplog.text.count("missed the checkpoint of step") == 2
    (small_disk / "filler").unlink()
    assert train(run, directory).status == "done"


def test_a_write_that_fails_for_good_ends_the_run_at_the_next_step(tiny_run, tmp_path):
    """Here because the folder of the checkpoints is no folder any more."""

    def spoil():
        await_checkpoint(tmp_path, 6)
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("")

    with pytest.raises(CheckpointError, match="step 12 could not be written to .*checkpoints: NotADirectoryError"):
        train(tiny_run, tmp_path, progress=AtStep({10: spoil}))
