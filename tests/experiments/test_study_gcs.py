"""A study in a bucket: trained, stopped, resumed and reported on with gs:// as its only state."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from etils import epath

from experiments.flags import load_config
from jaxmoe.scaling import Study, results_table, run_study
from jaxmoe.storage import as_path
from jaxmoe.training import ProgressReporter

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIG = '''
import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.study = {"name": "remote", "title": "Remote"}
    config.model = {
        "vocab_size": 288, "width": 16, "num_layers": 1, "num_heads": 2, "max_sequence_length": 16, "init_std": 0.1,
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 8},
    }
    config.data = {"tokenizer": "bytes", "sources": {
        "sums": {"kind": "reasoning", "problems": 50, "test_problems": 8},
        "text": {"kind": "text", "paths": ("gs://bucket/corpus/*.txt",), "test_fraction": 0.0},
    }}
    config.train = {"steps": 8, "batch_size": 4, "sequence_length": 16, "log_every": 1, "checkpoint_every": 2}
    config.evaluation = {"points": 2, "examples": 8, "validation_rows": 8}
    config.members = {"E2": {"model": {"moe": {"num_experts": 2}}}, "E4": {}}
    return config
'''


class Stopping(ProgressReporter):
    """Asks to stop, as a scheduler would, once the first member has done five steps."""

    def __init__(self):
        super().__init__(terminal=False)

    def advance(self, step, *args, **kwargs):
        super().advance(step, *args, **kwargs)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def command(module, *arguments):
    """Runs a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def config_file(bucket, tmp_path_factory):
    """A study of two members, one of whose sources lies in the bucket too."""
    for name in ("a", "b"):
        (epath.Path(bucket) / "corpus" / f"{name}.txt").write_text(f"document {name} says nothing at length")
    path = tmp_path_factory.mktemp("config") / "remote.py"
    path.write_text(CONFIG)
    return path


def logs_and_records(folder):
    """Every file that does not tell the time."""
    files = [path for pattern in ("*/metrics.jsonl", "*/records/*.json", "*/DONE") for path in folder.glob(pattern)]
    return {os.fspath(path.relative_to(folder)): path.read_text() for path in files}


def test_a_study_in_a_bucket_is_stopped_resumed_and_reported_on(bucket, config_file, tmp_path):
    """It ends with the very files that an undisturbed study on this disk has."""
    study = Study.from_config_dict(load_config(str(config_file)))
    remote = epath.Path(bucket) / "study"
    stopped = run_study(study, remote, progress=Stopping())
    assert [member.status for member in stopped.members] == ["resumable", "pending"]
    assert not (remote / "E2" / "DONE").exists()

    arguments = (f"--config={config_file}", f"--workdir={remote}")
    done = command("run", *arguments)
    assert "E2: 8 steps, going on after step" in done.stderr
    assert f"done: {remote}" in done.stdout
    run_study(study, tmp_path / "study")
    assert logs_and_records(remote) == logs_and_records(tmp_path / "study")
    assert len(results_table(remote)) == 4
    assert command("run", *arguments).stderr.count("done before, skipped") == 2

    page = command("report", f"--workdir={remote}").stdout.strip().removeprefix("report: ")
    assert page == f"{remote}/report/index.html"
    assert "Remote" in as_path(page).read_text()
    listed = (remote / "report" / "files.txt").read_text().split()
    assert {path.name for path in (remote / "report").iterdir()} == {*listed, "files.txt"}
    unfinished = [path for pattern in (".*", "*/.*", "*/*/.*") for path in remote.glob(pattern)]
    assert not unfinished


def test_the_quickstart_in_a_bucket_is_preempted_and_goes_on(bucket):
    """SIGTERM at its first step: status 75 and a word that it is resumable; the same command goes on from there."""
    arguments = (
        sys.executable, "-m", "experiments.run", "--config=experiments/configs/quickstart.py", "--member=E2",
        f"--workdir={bucket}/quickstart", "--config.train.steps=300", "--config.evaluation.points=1",
        "--config.evaluation.examples=64", "--config.evaluation.validation_rows=64",
        "--config.data.sources.knowledge.entities=200",
    )  # fmt: skip
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("E2: step ") for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, out + err
    assert f"preempted (SIGTERM), resumable: nothing is lost. Run the same command again to go on ({bucket}" in out
    directory = as_path(bucket) / "quickstart" / "E2"
    (saved,) = [int(path.name) for path in (directory / "checkpoints").iterdir()]

    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300)
    assert f"E2: 300 steps, going on after step {saved}" in done.stderr
    assert f"done: {bucket}/quickstart" in done.stdout
    log = (as_path(directory) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(10, 301, 10))
