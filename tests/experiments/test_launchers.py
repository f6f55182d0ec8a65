"""What a launcher decides and writes, without training: retries, shares of the machine, manifests."""

import json
import os
import re
import signal
import time

import pytest
import yaml
from etils import epath

from experiments.launchers import gke, job, local, pinning, slurm, tpu
from experiments.launchers.job import Attempts, Job
from experiments.launchers.pid_file import PidFile
from jaxmoe.config import ConfigError
from jaxmoe.scaling.status import read_status


@pytest.mark.parametrize(
    ("ends", "outcomes"),
    [
        ([(0, 9)], ["done"]),
        ([(2, 0)], ["failed"]),
        ([(1, 3), (-9, 5), (1, 5)], ["again", "again", "failed"]),
        ([(75, 3), (75, 5), (75, 7), (75, 9), (0, 9)], ["again", "again", "again", "again", "done"]),
        ([(75, 3), (75, 3), (75, 3), (75, 3)], ["again", "again", "again", "failed"]),
        ([(75, 3), (1, 3), (75, 5), (1, 6), (1, 6)], ["again", "again", "again", "again", "failed"]),
    ],
)
def test_preemption_is_no_failure_as_long_as_the_job_gets_on(ends, outcomes):
    """Two retries: exit statuses and steps, and what follows."""
    attempts = Attempts(retries=2)
    assert [attempts.after(status, step) for status, step in ends] == outcomes


def test_an_end_by_the_runtime_of_one_of_several_processes_is_a_preemption():
    """By SIGABRT; a process that is alone aborts for reasons of its own."""
    for status in (-signal.SIGABRT, 134):
        assert job.as_preempted(status, processes=2) == job.PREEMPTED
        assert job.as_preempted(status, processes=1) == status
    assert job.as_preempted(-signal.SIGKILL, processes=2) == -signal.SIGKILL
    assert job.as_preempted(1, processes=2) == 1


def test_an_exit_is_explained(tmp_path):
    log = tmp_path / "log"
    log.write_text("E8: step 3/9\nerror: the disk is full\n\n")
    assert job.explain_exit(1, log) == "exit status 1: error: the disk is full"
    assert job.explain_exit(-signal.SIGKILL, log) == "killed by SIGKILL"
    assert job.explain_exit(1, tmp_path / "none") == "exit status 1"


# --------------------------------------------------------------------------------------------- shares


def test_jobs_get_equal_shares(monkeypatch):
    monkeypatch.setattr(pinning.os, "sched_getaffinity", lambda process: set(range(1, 9)))
    two, other = pinning.shares(2, "cuda:0,1,2,3")
    assert (two.cores, other.cores) == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert two.environment() == {"NPROC": "4", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert other.environment() == {"NPROC": "4", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert pinning.shares(2, "tpu:0,1,2,3")[1].environment() == {
        "NPROC": "4",
        "TPU_VISIBLE_CHIPS": "2,3",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,2,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    assert str(other) == "cores 5,6,7,8, cuda 2,3"


@pytest.mark.parametrize(
    ("parallel", "devices", "message"),
    [
        (9, "none", "--parallel=9, but there are 8 cores; choose 1..8"),
        (4, "cuda:0,1", "--parallel=4, but there are 2 cuda devices; choose 1..2"),
        (1, "tpu:0,1,2", "leaves 3 of 3 TPU chips to each job; 1, 2, 4 or 8"),
        (1, "gpu:0", "--devices=gpu:0; auto, none, cuda:0,1,2,3 or tpu:0,1,2,3 is needed"),
    ],
)
def test_what_cannot_be_shared_is_refused(parallel, devices, message, monkeypatch):
    monkeypatch.setattr(pinning.os, "sched_getaffinity", lambda process: set(range(8)))
    with pytest.raises(ConfigError, match=message):
        pinning.shares(parallel, devices)


def test_visible_gpus_are_respected(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(pinning.os, "sched_getaffinity", lambda process: {0, 1})
    assert [share.devices for share in pinning.shares(2)] == [(5,), (7,)]


# ------------------------------------------------------------------------------------- on this machine

RUN = """
import json, os, pathlib, signal, sys, time
arguments = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
starts = pathlib.Path("starts")
with starts.open("a") as file:
    file.write(json.dumps([arguments["member"], sorted(os.sched_getaffinity(0)), os.environ["NPROC"]]) + "\\n")
count = sum(json.loads(line)[0] == arguments["member"] for line in starts.read_text().splitlines())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
for wish in arguments["behave"].split(",")[count - 1:][:1]:
    print(f"start {count} of {arguments['member']}: {wish}", flush=True)
    if wish == "wait":
        time.sleep(60)
    if wish == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(wish))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Jobs of a stand-in for experiments.run, which ends as its `behave` says: an exit status for each start."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "run.py").write_text(RUN)
    (tmp_path / "experiments" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)

    def make(**behaviours):
        return [
            Job(member, str(tmp_path / "study"), (f"--member={member}", f"--behave={behave}"))
            for member, behave in behaviours.items()
        ]

    return make


def test_jobs_are_retried_recorded_and_pinned(stub, tmp_path):
    """A fails and then succeeds, B is killed once, C has a mistake, D fails for good, E is preempted once."""
    told = []
    shares = [pinning.Share(cores=(core,)) for core in sorted(os.sched_getaffinity(0))[:2]]
    launcher = local.LocalLauncher(tmp_path / "logs", shares, 1, told.append)
    outcomes = launcher.launch(stub(A="1,0", B="die,0", C="2,0", D="3,4,0", E="75,0"))
    assert outcomes == {"A": "done", "B": "done", "C": "failed", "D": "failed", "E": "done"}
    starts = [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert sorted(member for member, *_ in starts) == list("AABBCDDEE")
    assert {tuple(cores) for _, cores, _ in starts} == {share.cores for share in shares}
    assert {threads for *_, threads in starts} == {"1"}
    status = {member: read_status(epath.Path(tmp_path / "study" / member)) for member in "ABCD"}
    assert status["B"]["error"] == "killed by SIGKILL"
    assert status["C"]["error"] == "exit status 2: start 1 of C: 2"
    assert status["D"]["error"] == "exit status 4: start 2 of D: 4"
    assert {one["state"] for one in status.values()} == {"failed"}
    assert "D: failed (exit status 3), failure 1 of at most 2; it is started again" in told
    log = (tmp_path / "logs" / "A.log").read_text()
    assert "start 1 of A: 1" in log
    assert "start 2 of A: 0" in log


def test_a_launcher_that_was_killed_leaves_jobs_that_are_found(stub, tmp_path):
    """They keep a second launcher from starting them again, and can be cancelled."""
    (job,) = stub(A="wait,0")
    launcher = local.LocalLauncher(tmp_path / "logs", pinning.shares(1, "none"), 0, lambda _: None)
    launcher._start(job, 0)
    process = launcher._running[0].process
    while "start 1" not in (tmp_path / "logs" / "A.log").read_text():
        time.sleep(0.05)
    with pytest.raises(ConfigError, match=f"A: process {process.pid}, which an earlier launcher started"):
        local.LocalLauncher(tmp_path / "logs", pinning.shares(1, "none"), 0, print).launch([job])
    assert local.cancel(tmp_path / "logs", ["A"]) == [f"A (process {process.pid})"]
    assert process.wait() == 75
    assert local.cancel(tmp_path / "logs", ["A"]) == []


def test_a_process_file_names_who_lives(tmp_path):
    file = PidFile(tmp_path / "launcher.pid")
    assert file.process() is None
    with file.hold():
        assert file.process() == os.getpid()
        with pytest.raises(ConfigError, match=f"launcher: process {os.getpid()} is at work already"), file.hold():
            pass
    assert file.process() is None


# ------------------------------------------------------------------------------------------------- GKE

E8 = Job("E8", "gs://bucket/study", ("--config=a.py", "--workdir=gs://bucket/study", "--member=E8"))


@pytest.mark.parametrize(
    ("text", "accelerator", "machine", "chips_per_host", "hosts", "xpk"),
    [
        ("v5p:4x4x4", "tpu-v5p-slice", "ct5p-hightpu-4t", 4, 16, "v5p-4x4x4"),
        ("v5p:2x2x1", "tpu-v5p-slice", "ct5p-hightpu-4t", 4, 1, "v5p-2x2x1"),
        ("v4:4x8x8", "tpu-v4-podslice", "ct4p-hightpu-4t", 4, 64, "v4-4x8x8"),
        ("v5e:16x16", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", 4, 64, "v5litepod-16x16"),
        ("v5e:1x1", "tpu-v5-lite-podslice", "ct5lp-hightpu-1t", 1, 1, None),
        ("v6e:2x4", "tpu-v6e-slice", "ct6e-standard-4t", 4, 2, "v6e-2x4"),
        ("v6e:1x1", "tpu-v6e-slice", "ct6e-standard-1t", 1, 1, "v6e-1x1"),
        ("tpu7x:4x4x8", "tpu7x", "tpu7x-standard-4t", 4, 32, "tpu7x-4x4x8"),
    ],
)
def test_topologies_have_the_machines_of_gke(text, accelerator, machine, chips_per_host, hosts, xpk):
    found = tpu.parse_topology(text)
    assert (found.accelerator, found.machine, found.chips_per_host) == (accelerator, machine, chips_per_host)
    assert (found.topology, found.hosts, found.xpk_type) == (text.split(":")[1], hosts, xpk)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p:4x4x5", "v5p has no topology '4x4x5'. Known: v5p:2x2x1, .* multiple of 4, up to 8960 chips"),
        ("v5p:8x4x4", "A <= B <= C"),
        ("v5p:64x64x64", "up to 8960 chips"),
        ("v6e:3x3", "Known: v6e:1x1, v6e:2x2, v6e:2x4, v6e:4x4, v6e:4x8, v6e:8x8, v6e:8x16, v6e:16x16"),
        ("v5:4x4x4", "unknown TPU generation 'v5'. Did you mean 'v5p'.*v4:2x2x1.*v5e:1x1.*v5p.*v6e.*tpu7x"),
        ("v5p", "v5p has no topology ''"),
    ],
)
def test_an_unknown_topology_is_refused_with_those_that_are_known(text, message):
    with pytest.raises(ConfigError, match=message):
        tpu.parse_topology(text)


def options(topology="v5p:4x4x4", **values):
    return gke.GkeOptions(slice=tpu.parse_topology(topology), image="registry/image:1", **values)


def test_a_jobset_has_what_gke_and_jobset_read():
    """Field by field, through YAML and back."""
    made = gke.jobset(E8, "study-e8", "study", options(slices=2, service_account="writer"), retries=3)
    manifest = yaml.safe_load(yaml.safe_dump(made, sort_keys=False))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"] == {
        "name": "study-e8",
        "namespace": "default",
        "labels": {"kueue.x-k8s.io/queue-name": "jaxmoe", "jaxmoe/study": "study"},
        "annotations": {
            "jaxmoe/member": "E8",
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
        },
    }
    assert manifest["spec"]["failurePolicy"] == {
        "maxRestarts": 3 + 10,
        "rules": [
            {
                "name": "mistake",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["exit code 2 matching FailJob rule"],
            },
            {
                "name": "preempted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
        ],
    }
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert (replicated["name"], replicated["replicas"]) == ("slice", 2)
    spec = replicated["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (16, 16, "Indexed")
    assert spec["backoffLimit"] == 0
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["FailJob"] * 3
    assert [rule.get("onExitCodes") for rule in spec["podFailurePolicy"]["rules"]] == [
        {"containerName": "train", "operator": "In", "values": [2]},
        {"containerName": "train", "operator": "In", "values": [75]},
        None,
    ]
    assert spec["podFailurePolicy"]["rules"][2]["onPodConditions"] == [{"type": "DisruptionTarget"}]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy demands it"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["serviceAccountName"] == "writer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert (container["name"], container["image"]) == ("train", "registry/image:1")
    assert container["command"] == ["python", "-m", "experiments.run", *E8.arguments]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}


def test_a_slice_of_one_host_shares_its_node_pool():
    manifest = gke.jobset(E8, "study-e8", "study", options("v6e:2x2"), retries=0)
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" not in manifest["metadata"]["annotations"]
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["parallelism"] == 1
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 0, "there is no other host to lose"


def test_only_a_preemption_is_started_again_without_end():
    """As JobSet and the Job controller read the manifest: the rule that each end of a pod meets first.

    A host that aborts is one of several whose neighbour is lost, or runs a broken program: both are counted.
    """
    spec = gke.jobset(E8, "study-e8", "study", options(lost_hosts=5), retries=2)["spec"]
    pod_rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]

    def after(status, evicted=False):
        met = [
            rule
            for rule in pod_rules
            if status in rule.get("onExitCodes", {"values": []})["values"] or (evicted and "onPodConditions" in rule)
        ]
        reason = "PodFailurePolicy" if met else "BackoffLimitExceeded"
        message = f"Container train for pod a/b failed with exit code {status} matching FailJob rule at index 0"
        for rule in spec["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(one, message) for one in patterns):
                return rule["action"]
        return "counted"

    assert {status: after(status) for status in (1, 2, 75, 134, 137)} == {
        1: "counted", 2: "FailJobSet", 75: "RestartJobSetAndIgnoreMaxRestarts", 134: "counted", 137: "counted",
    }  # fmt: skip
    assert after(137, evicted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert spec["failurePolicy"]["maxRestarts"] == 2 + 5


def test_kueue_has_room_for_as_many_members_as_run_at_a_time():
    flavor, cluster_queue, local_queue = gke.kueue(options(slices=2, namespace="team", queue="moe"), parallel=3)
    assert {one["apiVersion"] for one in (flavor, cluster_queue, local_queue)} == {"kueue.x-k8s.io/v1beta2"}
    assert [one["kind"] for one in (flavor, cluster_queue, local_queue)] == [
        "ResourceFlavor", "ClusterQueue", "LocalQueue",
    ]  # fmt: skip
    assert flavor["spec"]["nodeLabels"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    (group,) = cluster_queue["spec"]["resourceGroups"]
    assert group["coveredResources"] == ["google.com/tpu"]
    assert group["flavors"] == [
        {"name": flavor["metadata"]["name"], "resources": [{"name": "google.com/tpu", "nominalQuota": 3 * 2 * 64}]}
    ]
    assert local_queue["metadata"] == {"name": "moe", "namespace": "team"}
    assert local_queue["spec"] == {"clusterQueue": cluster_queue["metadata"]["name"]}


def test_the_xpk_command_names_the_slice_and_the_restarts():
    command = gke.xpk_command(E8, "study-e8", options(cluster="pod", zone="us-east5-a"))
    assert command[:3] == ["xpk", "workload", "create"]
    flags = dict(part.removeprefix("--").split("=", 1) for part in command[3:])
    assert flags == {
        "workload": "study-e8",
        "cluster": "pod",
        "zone": "us-east5-a",
        "tpu-type": "v5p-4x4x4",
        "num-slices": "1",
        "docker-image": "registry/image:1",
        "max-restarts": "100",
        "restart-on-exit-codes": "1,75,134",
        "termination-grace-period-seconds": "300",
        "command": "python -m experiments.run --config=a.py --workdir=gs://bucket/study --member=E8",
    }
    assert gke.xpk_command(E8, "study-e8", options("v5e:2x2", cluster="pod")) is None
    assert gke.xpk_command(E8, "study-e8", options()) is None


def test_kubernetes_names_are_short_lower_case_and_different():
    names = gke.object_names("My.Study", ["E8-seed0", "e8-seed0", "E16", "x" * 80])
    assert names["E16"] == "my-study-e16"
    assert len(set(names.values())) == 4
    for name in names.values():
        assert len(name) <= 40
        assert name == name.lower()
        assert name.replace("-", "").isalnum()
    assert gke.object_names("7b", ["E8"]) == {"E8": "study-7b-e8"}


# ----------------------------------------------------------------------------------------------- Slurm


def test_what_is_asked_of_slurm():
    asked = slurm.SlurmOptions(partition="gpu", time=60, nodes=2, gpus_per_node=8).parameters("jaxmoe-study", 3)
    assert asked == {
        "name": "jaxmoe-study", "timeout_min": 60, "nodes": 2, "tasks_per_node": 1, "gpus_per_node": 8,
        "stderr_to_stdout": True, "slurm_array_parallelism": 3, "slurm_signal_delay_s": 120,
        "slurm_additional_parameters": {"requeue": True}, "slurm_partition": "gpu",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="--slurm.signal_delay=120 s, but a job may run for 60 s"):
        slurm.SlurmOptions(time=1)
    with pytest.raises(ConfigError, match="--slurm.nodes=2, but the local executor has one"):
        slurm.SlurmOptions(executor="local", nodes=2)


def test_processes_meet_at_an_address_that_resolves(monkeypatch, tmp_path):
    """The node's name if it is one; else what Slurm knows of it."""
    assert slurm.coordinator_address("localhost", 5000) == f"localhost:{65536 - 4096 + 904}"
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho NodeName=n1 NodeAddr=127.0.0.1 NodeHostName=vm Port=6818\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.coordinator_address("n1.invalid", 1) == "127.0.0.1:61441"
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho NodeName=n1 NodeAddr=n1.invalid\n")
    with pytest.raises(RuntimeError, match="node n1.invalid has no address that this node can resolve"):
        slurm.coordinator_address("n1.invalid", 1)
