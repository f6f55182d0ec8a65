"""`python -m experiments.sweep` as a user starts it."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from jaxmoe.storage import as_path

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIG = REPOSITORY / "tests" / "experiments" / "sweeps" / "tiny.py"


class Sweep:
    """The command, for one workdir; what is compiled is kept between its jobs."""

    def __init__(self, folder, compiled):
        self.workdir = folder / "study"
        self.marks = folder
        self.environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY), "JAXMOE_TEST_MARKS": str(folder),
            "JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        self.config = CONFIG

    def start(self, *arguments, quiet=False):
        command = [sys.executable, "-m", "experiments.sweep", f"--config={self.config}", f"--workdir={self.workdir}"]
        return subprocess.Popen(
            [*command, *arguments], cwd=REPOSITORY, env=self.environment, text=True,
            stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments, check=0):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == check, out + err
        return out, err

    def status(self, *arguments):
        return {member["name"]: member for member in json.loads(self(*arguments, "--json", "status")[0])}

    def until(self, ready, *arguments):
        """Waits until `ready(status)`; returns that status."""
        deadline = time.monotonic() + 400
        while not ready(status := self.status(*arguments)):
            assert time.monotonic() < deadline, (status, [log.read_text() for log in self.workdir.glob("logs/*.log")])
            time.sleep(0.8)
        return status


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def sweep(compiled, tmp_path):
    return Sweep(tmp_path, compiled)


@pytest.mark.slow
def test_a_family_survives_what_happens_to_its_jobs(sweep):
    """E2 is killed and E4's node fails, both start again; all are cancelled from elsewhere, and launched to the end.

    The two members train in one folder at a time, each with the log, lock and status of its own.
    """
    length = "--config.train.steps=2000"
    sweep.environment["JAXMOE_TEST_FAILS"] = "E4"
    cores = min(2, len(os.sched_getaffinity(0)))
    first = sweep.start(length, f"--parallel={cores}", "launch")
    sweep.until(lambda status: status["E2"]["state"] == "running", length)
    os.kill(int((sweep.workdir / "logs" / "E2.pid").read_text()), signal.SIGKILL)
    sweep.until(lambda status: (status["E2"]["state"], status["E2"]["starts"]) == ("running", 2), length)
    assert "launcher (process" in sweep(length, "cancel")[0]
    _, told = first.communicate(timeout=300)
    assert first.returncode == 75, told
    assert "E2: failed (killed by SIGKILL), failure 1 of at most 3; it is started again" in told
    assert "E4: failed (exit status 1), failure 1 of at most 3; it is started again" in told
    assert "stopped: E2" in told
    stopped = sweep.status(length)
    assert (stopped["E2"]["state"], stopped["E2"]["error"]) == ("preempted", "killed by SIGKILL")
    assert stopped["E4"]["state"] in ("preempted", "done")
    assert sweep(length, "cancel")[0] == "nothing is at work\n"

    out, _ = sweep(length, f"--parallel={cores}", "launch")
    assert out.startswith(f"done: {sweep.workdir}.")
    for member, one in sweep.status(length).items():
        assert (one["state"], one["step"], one["steps"], one["error"]) == ("done", 2000, 2000, None)
        lines = (sweep.workdir / member / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(10, 2001, 10))
    study = json.loads((sweep.workdir / "study.json").read_text())
    assert [member["name"] for member in study["members"]] == ["E2", "E4"]
    assert "experiments.sweep" in study["command"], "the jobs leave what started them"

    table, _ = sweep(length, "status")
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [["E2", "2000/2000"], ["E4", "2000/2000"]]
    assert sweep(length, "launch")[1].count("done before, skipped") == 2


@pytest.mark.slow
def test_submitit_s_local_executor_runs_the_slurm_jobs(sweep):
    """Told to save as Slurm does before the time is over, the job starts again and ends."""
    pytest.importorskip("submitit", reason="the Slurm launcher needs submitit (pip install jaxmoe[slurm])")
    where = ("--launcher=slurm", "--slurm.executor=local", "--slurm.time=10")
    length = ("--config.train.steps=2000",)
    sweep.config = f"{CONFIG}:E2"
    launch = sweep.start(*where, *length, "launch", quiet=True)  # the jobs inherit its output
    assert launch.wait(timeout=60) == 0
    sweep.until(lambda status: status["E2"]["state"] == "running", *length)
    controller = psutil.Process(int(json.loads((sweep.workdir / "logs" / "slurm.json").read_text())["E2"]))
    (task,) = controller.children()
    task.send_signal(signal.SIGUSR2)
    ended = sweep.until(lambda status: status["E2"]["state"] == "done", *length)
    assert ended["E2"]["starts"] == 2
    assert ended["E2"]["step"] == 2000
    with contextlib.suppress(psutil.NoSuchProcess):
        controller.wait(timeout=30)
    assert sweep(*where, *length, "cancel")[0] == "nothing is queued or running\n"


def test_a_dry_run_shows_the_jobs_and_starts_none(sweep):
    out, _ = sweep("--run_flags=--config.train.seed=1", "--resume=force", "--devices=none", "dry-run")
    (job,) = [line for line in out.splitlines() if line.startswith("E4: python -m experiments.run")]
    assert job.endswith(f"--workdir={sweep.workdir} --member=E4 --resume=force --config.train.seed=1")
    assert "job 1 of 1 at a time: cores 0" in out
    assert not sweep.workdir.exists()


def test_manifests_are_written_for_gke(bucket, compiled, tmp_path):
    sweep = Sweep(tmp_path, compiled)
    sweep.workdir = f"{bucket}/sweep"
    where = ("--launcher=gke", "--topology=v6e:4x4", "--gke.image=registry/image", "--gke.cluster=pod",
             f"--logs={tmp_path}")  # fmt: skip
    shown, _ = sweep(*where, "dry-run")
    assert "kind: JobSet" in shown
    assert not (tmp_path / "gke").exists()
    told, _ = sweep(*where, "launch")
    assert f"kubectl apply --filename={tmp_path}/gke/kueue.yaml --filename={tmp_path}/gke/E2.yaml" in told
    assert {path.name for path in (tmp_path / "gke").iterdir()} == {"kueue.yaml", "E2.yaml", "E4.yaml", "xpk.sh"}
    assert (tmp_path / "gke" / "xpk.sh").read_text().count("--tpu-type=v6e-4x4") == 2
    assert json.loads(as_path(f"{sweep.workdir}/study.json").read_text())["name"] == "tiny"
    assert {one["state"] for one in sweep.status().values()} == {"waiting"}
    told, _ = sweep("--launcher=gke", "cancel")
    assert "kubectl delete jobsets.jobset.x-k8s.io --namespace=default --selector=jaxmoe/study=tiny" in told
    _, told = sweep("--launcher=gke", "--gke.namespace=team", "--gke.apply", "cancel", check=2)
    assert "kubectl" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lunch",), "lunch is asked for; one of dry-run, launch, status or cancel is needed. Did you mean 'launch'"),
        ((), "nothing is asked for; one of dry-run, launch, status or cancel is needed"),
        (("--json", "launch"), "--json goes with status"),
        (("--launcher=gke", "launch"), "pods share no disk with this machine; give a gs:// folder"),
        (("--launcher=gke", "--workdir=gs://b/s", "launch"), "--topology is missing. Known: v4:2x2x1"),
        (
            ("--launcher=gke", "--workdir=gs://b/s", "--topology=v5p:4x4x4", "launch"),
            "--gke.image is missing; give a container image",
        ),
        (("--slurm.partion=gpu", "launch"), "Unknown command line flag 'slurm.partion'"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(sweep, arguments, message):
    _, told = sweep(*arguments, check=2)
    assert message in told
    assert "Traceback" not in told
    assert not sweep.workdir.exists()
