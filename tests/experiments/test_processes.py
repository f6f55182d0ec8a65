"""Several processes on loopback train one study: the run of one process, and it goes on in one."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from experiments.end_state import differences, newest_checkpoint
from experiments.launchers.job import PREEMPTED, as_preempted
from jaxmoe.scaling.status import read_status

CONFIG = """
def get_config():
    return {
        "study": {"name": "pair"},
        "model": {
            "vocab_size": 288, "width": 16, "num_layers": 2, "num_heads": 2, "max_sequence_length": 64,
            "init_std": 0.1, "first_dense_layers": 1,
            "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 16},
        },
        "data": {
            "tokenizer": "symbols",
            "sources": {
                "knowledge": {"kind": "knowledge", "entities": 40, "test_entities": 8},
                "reasoning": {"kind": "reasoning", "problems": 40, "test_problems": 8},
            },
        },
        "train": {
            "steps": 60, "batch_size": 8, "sequence_length": 16, "learning_rate": 1e-3, "log_every": 1,
            "checkpoint_every": 20,
        },
        "evaluation": {"points": 10, "examples": 8, "validation_rows": 8, "batch_size": 8},
        "members": {"E4": {}},
    }
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("config") / "pair.py"
    path.write_text(CONFIG)
    return path


class Run(subprocess.Popen):
    """A process that says what it says into a file: a pipe that nobody reads just now would stop it when it is full."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        super().__init__(command, env=environment, stdout=self._said, stderr=subprocess.STDOUT)

    def said(self) -> str:
        """All of it, once it has ended."""
        with self._said:
            self._said.seek(0)
            return self._said.read()


def start(config: pathlib.Path, workdir: pathlib.Path, *flags: str, devices: int) -> Run:
    """`experiments.run` in a process with so many devices."""
    xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "experiments.run", f"--config={config}", f"--workdir={workdir}", *flags]
    return Run(command, {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla})


def ended(*processes: Run) -> list[int]:
    """Their exit statuses; what they said, if pytest shows it."""
    try:
        for process in processes:
            process.wait(timeout=400)
    finally:
        for number, process in enumerate(processes):
            process.kill()
            process.wait()
            print(f"process {number}:", process.said(), sep="\n")
    return [process.returncode for process in processes]


def start_two(config: pathlib.Path, workdir: pathlib.Path, *flags: str) -> list[Run]:
    """Two processes with two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    ours = (f"--coordinator_address={address}", "--num_processes=2", "--mesh=expert=2", *flags)
    return [start(config, workdir, *ours, f"--process_id={process}", devices=2) for process in range(2)]


def metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "E4" / "metrics.jsonl").read_text().splitlines()]


def assert_close(found, expected):
    """Numbers to 1e-3 (rounding that 60 steps of training have spread), all else equal."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for here, there in zip(found, expected, strict=True):
        for name, value in there.items():
            assert here[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (there["step"], name)


@pytest.fixture(scope="module")
def of_one(config, tmp_path_factory) -> pathlib.Path:
    """The folder of the study as one process with one device trains it."""
    workdir = tmp_path_factory.mktemp("one")
    assert ended(start(config, workdir, devices=1)) == [0]
    return workdir


def test_two_processes_train_the_run_of_one_and_one_goes_on_with_it(config, of_one, tmp_path):
    """Stopped by a signal to one of them, at the same step; then one process goes on. Metrics and records agree."""
    processes = start_two(config, tmp_path)
    evaluated = tmp_path / "E4" / "records" / "validation-knowledge-test-00000006.json"
    while not evaluated.exists() and processes[0].poll() is None:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert ended(*processes) == [75, 75]
    steps = [line["step"] for line in metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert 6 <= len(steps) < 60

    assert ended(start(config, tmp_path, devices=1)) == [0]
    assert_close(metrics(tmp_path), metrics(of_one))
    names = sorted(path.name for path in (of_one / "E4" / "records").iterdir())
    assert sorted(path.name for path in (tmp_path / "E4" / "records").iterdir()) == names
    for name in names:
        here, there = (json.loads((folder / "E4" / "records" / name).read_text()) for folder in (tmp_path, of_one))
        if "loss" in there:
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-3), name


def test_when_one_process_is_killed_the_other_ends_and_both_started_again_end_as_undisturbed(
    config, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = (
        "--config.train.steps=16", "--config.train.checkpoint_every=4", "--config.evaluation.points=1",
        "--config.evaluation.generate=False", "--lost_after_seconds=10",
    )  # fmt: skip
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "killed"
    assert ended(*start_two(config, undisturbed, *flags)) == [0, 0]

    processes = start_two(config, workdir, *flags)
    while not (workdir / "E4" / "checkpoints" / "4").exists() and processes[0].poll() is None:
        time.sleep(0.01)
    processes[1].kill()
    ends = ended(*processes)
    # By the connection that broke or, where nothing is read from that just then, by the silence.
    assert [as_preempted(status, processes=2) for status in ends] == [PREEMPTED, -signal.SIGKILL]
    status = read_status(workdir / "E4")
    assert status["state"] == ("preempted" if ends[0] == PREEMPTED else "running"), "which launchers correct"
    assert newest_checkpoint(workdir / "E4") < 16

    assert ended(*start_two(config, workdir, *flags)) == [0, 0]
    assert not any(differences(undisturbed / "E4", workdir / "E4").values())
