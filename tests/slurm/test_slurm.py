"""The Slurm launcher on a real Slurm: queued again when preempted, retried, cancelled, joined across two nodes."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

pytest.importorskip("submitit", reason="the Slurm launcher needs submitit (pip install jaxmoe[slurm])")
pytestmark = pytest.mark.slow

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIG = REPOSITORY / "tests" / "experiments" / "sweeps" / "tiny.py"


class Sweep:
    """`experiments.sweep` on the cluster, for one workdir."""

    def __init__(self, folder, slurm, compiled):
        self.workdir = folder / "study"
        self.marks = folder
        self.environment = {
            **os.environ, "SLURM_CONF": str(slurm), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY),
            "JAXMOE_TEST_MARKS": str(folder), "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip

    def __call__(self, *arguments, check=0):
        command = [sys.executable, "-m", "experiments.sweep", f"--config={CONFIG}", f"--workdir={self.workdir}"]
        done = subprocess.run(
            [*command, "--launcher=slurm", "--slurm.time=5", "--slurm.cpus_per_task=1", *arguments],
            cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == check, done.stdout + done.stderr
        return done

    def status(self, *arguments):
        return {member["name"]: member for member in json.loads(self(*arguments, "--json", "status").stdout)}

    def until(self, ready, *arguments, seconds=300):
        """Waits until `ready(status)`; returns that status."""
        deadline = time.monotonic() + seconds
        while not ready(status := self.status(*arguments)):
            queue = self.queue()
            assert time.monotonic() < deadline, (status, self.logs(), queue)
            time.sleep(0.5)
        return status

    def queue(self):
        return self.slurm("squeue", "--noheader", "--array", "--format=%i %t %r").stdout

    def slurm(self, *command):
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)

    def jobs(self):
        return json.loads((self.workdir / "logs" / "slurm.json").read_text())

    def logs(self):
        return "".join(path.read_text()[-3000:] for path in self.workdir.glob("logs/submitit/*.out"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def sweep(slurm, compiled, tmp_path):
    one = Sweep(tmp_path, slurm, compiled)
    yield one
    subprocess.run(["scancel", "--user=root"], env=one.environment, check=False)


def test_members_are_queued_again_when_preempted_or_failed_and_can_be_cancelled(sweep):
    """E2 is told to save, as before its time is over, E4's node fails; both start again, and E2 is cancelled then."""
    longer = ("--config.members.E2.train.steps=1000000", "--config.study.held_fixed.tokens=0.99999")
    sweep.environment["JAXMOE_TEST_FAILS"] = "E4"
    told = sweep(*longer, "launch").stderr
    jobs = sweep.jobs()
    assert told.splitlines()[0].startswith(f"E2: job {jobs['E2']}, log ")
    assert [number.split("_")[1] for number in jobs.values()] == ["0", "1"]
    assert f"E2: queued or running as job {jobs['E2']}, skipped" in sweep(*longer, "launch").stderr

    sweep.until(lambda status: status["E2"]["state"] == "running", *longer)
    sweep.slurm("scancel", "--signal=USR2", jobs["E2"])
    ended = sweep.until(lambda status: status["E2"]["starts"] == 2 and status["E4"]["state"] == "done", *longer)
    assert (sweep.marks / "E4.failed").exists()
    assert ended["E4"]["step"] == 12

    sweep.until(lambda status: jobs["E4"] not in sweep.queue(), *longer)
    assert sweep(*longer, "cancel").stdout == f"E2 (job {jobs['E2']}): cancelled\n"
    cancelled = sweep.until(lambda status: status["E2"]["state"] == "preempted" and not sweep.queue(), *longer)
    assert cancelled["E2"]["error"] is None, "it had the time to save"
    assert sweep(*longer, "cancel").stdout == "nothing is queued or running\n"


def test_the_processes_of_two_nodes_find_each_other(sweep):
    """Nodes n1 and n2 have names that nothing resolves; their address comes from Slurm."""
    sweep.environment["JAXMOE_TEST_JOIN"] = "yes"
    sweep("--slurm.nodes=2", "--parallel=1", "--slurm.setup=export JAXMOE_TEST_SETUP=1", "launch")
    deadline = time.monotonic() + 300
    while len(found := list(sweep.marks.glob("process.*"))) < 2 or sweep.queue():
        assert time.monotonic() < deadline, (sweep.logs(), sweep.queue())
        time.sleep(0.5)
    assert {path.name for path in found} == {"process.0", "process.1"}
    assert all(path.read_text().startswith("2 at 127.0.0.1:") for path in found)
