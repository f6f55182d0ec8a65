"""Trains a whole family: every member of a study is a job, on this machine, on Slurm or on GKE.

    python -m experiments.sweep --config=quickstart.py --workdir=runs/quickstart --parallel=2 launch
    python -m experiments.sweep --config=quickstart.py --workdir=runs/quickstart status
    python -m experiments.sweep --config=my_study.py --workdir=/shared/runs/mine --launcher=slurm \\
        --slurm.partition=gpu --slurm.gpus_per_node=8 --slurm.time=720 launch
    python -m experiments.sweep --config=my_study.py --workdir=gs://bucket/mine --launcher=gke \\
        --topology=v5p:4x4x4 --gke.image=REGISTRY/IMAGE launch

dry-run checks and counts, and shows the jobs; launch starts those that are not done; status reads the run
directories alone, so it works from any machine; cancel stops the jobs so that they can go on.
Exit status of launch: 0 all is done, or handed to the scheduler; 1 a member failed for good; 75 stopped by a signal and
resumable; 2 a mistake in the configuration. docs/launching.md says more.
"""

from __future__ import annotations

import pathlib
import shlex
import sys
from collections.abc import Sequence

import ml_collections
from absl import flags

from experiments.execution import read_study
from experiments.flags import config_arguments, run_with_config
from experiments.launchers.job import PREEMPTED, Job, describe_command
from experiments.launchers.table import print_status
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError
from jaxmoe.scaling.status import MemberStatus, member_status
from jaxmoe.scaling.study import Member, Study
from jaxmoe.scaling.study_file import check_same_study, check_writable, write_study_file
from jaxmoe.storage import as_path, is_remote

ACTIONS = ("dry-run", "launch", "status", "cancel")

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study, local or gs://. Default: runs/<study name>.")
_LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "slurm", "gke"], "Where the jobs run.")
_RETRIES = flags.DEFINE_integer(
    "retries", 2, "How often a job that failed is started again; one that was preempted always is.", lower_bound=0
)
_PARALLEL = flags.DEFINE_integer(
    "parallel", None, "How many jobs at a time. Default: 1 with local, no limit of our own elsewhere.", lower_bound=1
)
_LOGS = flags.DEFINE_string(
    "logs", None, "Local folder for logs and launch files. Default: WORKDIR/logs, or runs/<study name>/logs if "
    "WORKDIR is gs://.",
)  # fmt: skip
_RESUME = flags.DEFINE_enum("resume", "auto", ["auto", "force"], "As in experiments.run, for every job.")
_RUN_FLAGS = flags.DEFINE_string("run_flags", "", "Further flags for every job's experiments.run, as typed there.")
_JSON = flags.DEFINE_bool("json", False, "With status: print a JSON list, one object per member.")
_DEVICES = flags.DEFINE_string(
    "devices", "auto", "local: the accelerators to share: auto, none, cuda:0,1,2,3 or tpu:0,1,2,3."
)
_SLURM_EXECUTOR = flags.DEFINE_enum(
    "slurm.executor", "slurm", ["slurm", "local"], "slurm: submit to the cluster, or try the jobs on this machine."
)
_SLURM_SETUP = flags.DEFINE_multi_string("slurm.setup", [], "slurm: a shell command before the job; may be repeated.")
_SLURM = {
    "partition": flags.DEFINE_string("slurm.partition", None, "slurm: as in sbatch."),
    "account": flags.DEFINE_string("slurm.account", None, "slurm: as in sbatch."),
    "qos": flags.DEFINE_string("slurm.qos", None, "slurm: as in sbatch."),
    "constraint": flags.DEFINE_string("slurm.constraint", None, "slurm: as in sbatch."),
    "time": flags.DEFINE_integer(
        "slurm.time", None, "slurm: limit of one job in minutes (240); it saves and is queued again.", lower_bound=1
    ),
    "nodes": flags.DEFINE_integer("slurm.nodes", None, "slurm: nodes of a member (1).", lower_bound=1),
    "gpus_per_node": flags.DEFINE_integer("slurm.gpus_per_node", None, "slurm: GPUs of each node."),
    "cpus_per_task": flags.DEFINE_integer("slurm.cpus_per_task", None, "slurm: cores of each node."),
    "mem_gb": flags.DEFINE_integer("slurm.mem_gb", None, "slurm: memory of each node."),
    "signal_delay": flags.DEFINE_integer(
        "slurm.signal_delay", None, "slurm: seconds before the limit at which a job saves (120).", lower_bound=1
    ),
}
_TOPOLOGY = flags.DEFINE_string("topology", None, "gke: TPU generation and topology of a slice, such as v5p:4x4x4.")
_GKE_IMAGE = flags.DEFINE_string("gke.image", None, "gke: container image with jaxmoe and the experiment file.")
_GKE_APPLY = flags.DEFINE_bool("gke.apply", False, "gke: have kubectl do it, instead of saying how.")
_GKE = {
    "slices": flags.DEFINE_integer("gke.slices", None, "gke: slices of a member (1).", lower_bound=1),
    "namespace": flags.DEFINE_string("gke.namespace", None, "gke: Kubernetes namespace (default)."),
    "queue": flags.DEFINE_string("gke.queue", None, "gke: Kueue's queue (jaxmoe)."),
    "service_account": flags.DEFINE_string("gke.service_account", None, "gke: that may write to the bucket."),
    "grace_seconds": flags.DEFINE_integer("gke.grace_seconds", None, "gke: between SIGTERM and SIGKILL (300)."),
    "lost_hosts": flags.DEFINE_integer(
        "gke.lost_hosts", None, "gke: hosts that a member of several may lose without notice (10).", lower_bound=0
    ),
    "cluster": flags.DEFINE_string("gke.cluster", None, "gke: for the xpk commands."),
    "project": flags.DEFINE_string("gke.project", None, "gke: for the xpk commands."),
    "zone": flags.DEFINE_string("gke.zone", None, "gke: for the xpk commands."),
}


def main(config: ml_collections.ConfigDict, overridden: tuple[str, ...], action: str) -> int:
    """Runs the command; returns the exit status."""
    log_to_terminal()
    study = read_study(config, overridden)
    if _JSON.value and action != "status":
        raise ConfigError("--json goes with status.")
    workdir = _WORKDIR.value or f"runs/{study.name}"
    if action == "status":
        print_status(_statuses(study, workdir), as_json=_JSON.value)
        return 0
    logs = pathlib.Path(_LOGS.value or (f"runs/{study.name}/logs" if is_remote(workdir) else f"{workdir}/logs"))
    launcher = {"local": _Local, "slurm": _Slurm, "gke": _Gke}[_LAUNCHER.value](study, workdir, logs)
    if action == "cancel":
        return launcher.cancel()
    launcher.prepare()
    states = {member.name: member.state for member in _statuses(study, workdir)}
    jobs = [_job(member, workdir) for member in study.members if states[member.name] != "done"]
    if action == "dry-run":
        print(study.describe(), end="\n\n")
        for member in study.members:
            if states[member.name] == "done":
                print(f"{member.name}: done before, would be skipped")
        for job in jobs:
            print(f"{job.member}: {describe_command(job.command)}")
        launcher.describe(jobs)
        return 0
    for member in study.members:
        if states[member.name] == "done":
            _note(f"{member.name}: done before, skipped")
    _write_study_file(study, workdir)
    return launcher.launch(jobs)


class _Local:
    """Jobs on this machine; `launch` returns when they have ended.

    Every launcher is made of a study, its workdir and the folder for logs. `cancel` needs no more; `prepare` comes
    before `describe` and `launch`.
    """

    def __init__(self, study: Study, workdir: str, logs: pathlib.Path):
        self._members = [member.name for member in study.members]
        self._workdir, self._logs = workdir, logs

    def prepare(self) -> None:
        """Divides this machine among the jobs at a time."""
        from experiments.launchers.pinning import shares

        self._shares = shares(_PARALLEL.value or 1, _DEVICES.value)

    def describe(self, jobs: Sequence[Job]) -> None:
        """Prints which share of this machine each of the jobs at a time would have."""
        del jobs
        for number, share in enumerate(self._shares, 1):
            print(f"job {number} of {len(self._shares)} at a time: {share}")

    def launch(self, jobs: Sequence[Job]) -> int:
        """Runs the jobs to their ends; returns the exit status."""
        from experiments.launchers.local import LocalLauncher

        outcomes = LocalLauncher(self._logs, self._shares, _RETRIES.value, _note).launch(jobs)
        left = [member for member, outcome in outcomes.items() if outcome == "resumable"]
        failed = [member for member, outcome in outcomes.items() if outcome == "failed"]
        if failed:
            _note(f"failed: {', '.join(failed)}; what is done is kept. Launch again to go on ({self._workdir}).")
            return 1
        if left:
            _note(f"stopped: {', '.join(left)}; nothing is lost. Launch again to go on ({self._workdir}).")
            return PREEMPTED
        print(f"done: {self._workdir}. Next: python -m experiments.report --workdir={self._workdir}")
        return 0

    def cancel(self) -> int:
        """Stops what is at work so that it can go on, and waits for it; returns the exit status."""
        from experiments.launchers.local import cancel

        stopped = cancel(self._logs, self._members)
        print("\n".join(f"{name}: stopped" for name in stopped) or "nothing is at work")
        return 0


class _Slurm:
    """Jobs of a Slurm cluster; `launch` returns when they are queued."""

    def __init__(self, study: Study, workdir: str, logs: pathlib.Path):
        from experiments.launchers.slurm import SlurmLauncher, SlurmOptions

        self._members = [member.name for member in study.members]
        self._options = SlurmOptions(
            executor=_SLURM_EXECUTOR.value,
            setup=tuple(_SLURM_SETUP.value),
            **{name: flag.value for name, flag in _SLURM.items() if flag.value is not None},
        )
        self._launcher = SlurmLauncher(logs, self._options, _RETRIES.value, f"jaxmoe-{study.name}")

    def prepare(self) -> None:
        """Nothing: Slurm itself says at launch what it refuses."""

    def describe(self, jobs: Sequence[Job]) -> None:
        """Prints what every job would ask of Slurm."""
        del jobs
        for name, value in self._options.parameters("", _PARALLEL.value).items():
            if value and name != "name":
                print(f"{name}: {value}")

    def launch(self, jobs: Sequence[Job]) -> int:
        """Queues the jobs; returns the exit status."""
        self._launcher.launch(jobs, _PARALLEL.value, _note)
        return 0

    def cancel(self) -> int:
        """Has Slurm stop what is queued or running; returns the exit status."""
        stopped = self._launcher.cancel(self._members)
        print("\n".join(f"{name}: cancelled" for name in stopped) or "nothing is queued or running")
        return 0


class _Gke:
    """Manifests for GKE, which kubectl is given with --gke.apply."""

    def __init__(self, study: Study, workdir: str, logs: pathlib.Path):
        self._study, self._workdir, self._logs = study, workdir, logs

    def prepare(self) -> None:
        """Checks what the manifests are made of."""
        from experiments.launchers.gke import GkeLauncher, GkeOptions
        from experiments.launchers.tpu import known, parse_topology

        if not is_remote(self._workdir):
            raise ConfigError(f"--workdir={self._workdir}: pods share no disk with this machine; give a gs:// folder.")
        if _TOPOLOGY.value is None:
            raise ConfigError(f"--topology is missing. Known: {known()}.")
        if not _GKE_IMAGE.value:
            raise ConfigError("--gke.image is missing; give a container image with jaxmoe and the experiment file.")
        options = GkeOptions(
            slice=parse_topology(_TOPOLOGY.value),
            image=_GKE_IMAGE.value,
            **{name: flag.value for name, flag in _GKE.items() if flag.value is not None},
        )
        self._launcher = GkeLauncher(self._logs / "gke", self._study.name, options, _RETRIES.value)

    def describe(self, jobs: Sequence[Job]) -> None:
        """Prints every file that `launch` would write."""
        for name, contents in self._files(jobs).items():
            print(f"\n# {name}\n{contents}", end="")

    def launch(self, jobs: Sequence[Job]) -> int:
        """Writes the manifests, and applies them if asked; returns the exit status."""
        self._launcher.launch(self._files(jobs), _GKE_APPLY.value, print)
        return 0

    def cancel(self) -> int:
        """Deletes the study's JobSets, or says how; needs neither a topology nor an image."""
        from experiments.launchers.gke import GkeOptions, cancel

        cancel(self._study.name, _GKE["namespace"].value or GkeOptions.namespace, _GKE_APPLY.value, print)
        return 0

    def _files(self, jobs: Sequence[Job]) -> dict[str, str]:
        members = [member.name for member in self._study.members]
        return self._launcher.render(jobs, members, _PARALLEL.value or len(members))


def _statuses(study: Study, workdir: str) -> list[MemberStatus]:
    try:
        return [member_status(workdir, member) for member in study.members]
    except OSError as error:
        raise ConfigError(f"{workdir} cannot be read from here: {error}") from error


def _job(member: Member, workdir: str) -> Job:
    arguments = [*config_arguments(), f"--workdir={workdir}", f"--member={member.name}"]
    if _RESUME.value != "auto":
        arguments.append(f"--resume={_RESUME.value}")
    return Job(member.name, workdir, (*arguments, *shlex.split(_RUN_FLAGS.value)))


def _write_study_file(study: Study, workdir: str) -> None:
    """Before the jobs start, so that they find it and leave it alone; it names the command that started them."""
    path = as_path(workdir)
    check_writable(path)
    if _RESUME.value != "force":
        check_same_study(path, study)
    write_study_file(study, path, shlex.join(["python", "-m", "experiments.sweep", *sys.argv[1:]]))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_with_config(main, ACTIONS)
