"""Jobs on a Slurm cluster, through submitit: an array of members, requeued when they are preempted."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from experiments.launchers.job import PREEMPTED, Attempts, Job, as_preempted, describe_exit, explain_exit
from jaxmoe.config import ConfigError
from jaxmoe.scaling.heartbeat import record_end
from jaxmoe.storage import read_json, write_json

if TYPE_CHECKING:
    import submitit

_JOBS = "slurm.json"
# Attempts bounds how often a job is started again; submitit's own count of time limits would end long runs.
_NO_LIMIT = 10**6
_ARRAY_LIMIT = 256
_LAST_PORTS = 4096


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """What a member's job asks of Slurm; None leaves it to the cluster.

    Attributes:
      executor: `slurm`, or `local` to try the jobs on this machine.
      partition, account, qos, constraint: as in sbatch.
      time: limit of one job, minutes; a job that reaches it saves and is queued again.
      nodes: of one member, each with one process.
      gpus_per_node, cpus_per_task: numbers.
      mem_gb: memory of a node.
      signal_delay: seconds before the limit at which a job is told to save.
      setup: shell commands before the job, such as `module load cuda`.
    """

    executor: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: int = 240
    nodes: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    signal_delay: int = 120
    setup: tuple[str, ...] = ()

    def __post_init__(self):
        if self.executor == "local" and self.nodes > 1:
            raise ConfigError(f"--slurm.nodes={self.nodes}, but the local executor has one; give --slurm.nodes=1.")
        if self.signal_delay >= 60 * self.time:
            raise ConfigError(
                f"--slurm.signal_delay={self.signal_delay} s, but a job may run for {60 * self.time} s; give less."
            )

    def parameters(self, name: str, parallel: int | None) -> dict[str, object]:
        """For `submitit.AutoExecutor.update_parameters`; `parallel` jobs of the array run at a time."""
        given = {
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_task,
            "mem_gb": self.mem_gb,
            f"{self.executor}_setup": list(self.setup) or None,
        }
        return {
            "name": name,
            "timeout_min": self.time,
            "nodes": self.nodes,
            "tasks_per_node": 1,
            "stderr_to_stdout": True,
            "slurm_array_parallelism": parallel or _ARRAY_LIMIT,
            "slurm_signal_delay_s": self.signal_delay,
            "slurm_additional_parameters": {"requeue": True},
            **{key: value for key, value in given.items() if value is not None},
        }


class SlurmLauncher:
    """Submits jobs and finds them again.

    Args:
      logs: folder on a file system that the nodes share.
      options: of every job.
      retries: how often a failed job is started again.
      name: of the array, for people.
    """

    def __init__(self, logs: str | os.PathLike, options: SlurmOptions, retries: int, name: str):
        self._logs, self._options, self._retries, self._name = pathlib.Path(logs), options, retries, name

    def launch(self, jobs: Sequence[Job], parallel: int | None, note: Callable[[str], None]) -> None:
        """Submits the jobs as one array, without those that are queued or running.

        Raises:
          ConfigError: submitit or Slurm is not here, or Slurm refuses the jobs.
        """
        alive = self._alive()
        for job in jobs:
            if job.member in alive:
                note(f"{job.member}: queued or running as job {alive[job.member]}, skipped")
        jobs = [job for job in jobs if job.member not in alive]
        if not jobs:
            return
        executor = self._executor()
        executor.update_parameters(**self._options.parameters(self._name, parallel))
        tasks = [SlurmMember(job, Attempts(self._retries)) for job in jobs]
        try:
            submitted = executor.submit_array(tasks)
        except Exception as error:
            raise ConfigError(f"Slurm refuses the jobs: {error}") from error
        numbers = {job.member: one.job_id for job, one in zip(jobs, submitted)}
        write_json(self._logs / _JOBS, {**self._book(), **numbers})
        for job, one in zip(jobs, submitted):
            note(f"{job.member}: job {one.job_id}, log {one.paths.stdout}")

    def cancel(self, members: Sequence[str]) -> list[str]:
        """Stops the jobs of these members; returns what was stopped, for people."""
        alive = {member: number for member, number in self._alive().items() if member in members}
        if alive and self._options.executor == "slurm":
            subprocess.run(["scancel", *alive.values()], check=True)
        elif alive:
            for number in alive.values():
                os.kill(int(number), signal.SIGTERM)
        return [f"{member} (job {number})" for member, number in alive.items()]

    def _executor(self) -> submitit.AutoExecutor:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(f"--launcher=slurm needs `pip install 'jaxmoe[slurm]'` ({error}).") from error
        if self._options.executor == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError(
                "--launcher=slurm: there is no sbatch here; launch from a login node of the cluster, or try the jobs "
                "on this machine with --slurm.executor=local."
            )
        return submitit.AutoExecutor(
            self._logs / "submitit", cluster=self._options.executor, slurm_max_num_timeout=_NO_LIMIT
        )

    def _book(self) -> dict[str, str]:
        path = self._logs / _JOBS
        return read_json(path) if path.exists() else {}

    def _alive(self) -> dict[str, str]:
        """Job numbers of the members that were submitted and are queued or running."""
        book = self._book()
        if not book:
            return {}
        if self._options.executor == "local":
            return {member: number for member, number in book.items() if _is_controller(number)}
        listed = subprocess.run(
            ["squeue", "--noheader", "--array", "--me", "--format=%i"], capture_output=True, text=True, check=False
        )
        if listed.returncode:
            raise ConfigError(f"squeue does not answer: {listed.stderr.strip()}")
        queued = set(listed.stdout.split())
        return {member: number for member, number in book.items() if number in queued}


@dataclasses.dataclass
class SlurmMember:
    """What each task of a member's job calls: it runs `experiments.run`, and queues the job again where that is due.

    submitit pickles it, calls it on the node, and calls `checkpoint` on SIGUSR2, which Slurm sends before the time
    limit. SIGTERM comes when a job is cancelled, or preempted by a partition that queues it again by itself; the
    member saves, and nothing else happens.

    Attributes:
      job: of the member.
      attempts: so far; they travel with the pickle when the job is queued again.
    """

    job: Job
    attempts: Attempts

    def __call__(self) -> str:
        import submitit

        environment = submitit.JobEnvironment()
        self._log = environment.paths.stdout
        self._told, self._cancelled, self._started = False, False, time.time()
        # Some clusters send their signals to every process of the job, some to this one alone. The run is to hear of
        # the end once, since a second signal ends it at once: it is deaf to theirs, and gets one SIGINT from here.
        theirs = {signal.SIGTERM, environment._usr_sig()}
        signal.pthread_sigmask(signal.SIG_BLOCK, theirs)
        signal.signal(signal.SIGTERM, self._cancel)
        first, self._processes = environment.global_rank == 0, environment.num_tasks
        if not first:  # submitit calls `checkpoint` in the first task alone
            signal.signal(environment._usr_sig(), self._tell)
        variables = dict(os.environ)
        if environment.num_nodes > 1 and "JAX_COORDINATOR_ADDRESS" not in variables:
            variables["JAX_COORDINATOR_ADDRESS"] = coordinator_address(
                environment.hostnames[0], int(environment.raw_job_id)
            )
        self._process = subprocess.Popen(self.job.command, env=variables, stdin=subprocess.DEVNULL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, theirs)
        status = self._wait()
        if self._cancelled or not first:
            return describe_exit(status)
        outcome = self._outcome(status)
        if outcome == "failed":
            raise RuntimeError(f"{self.job.member}: failed, {describe_exit(status)}")
        if outcome == "again":
            self._told = True
            signal.raise_signal(environment._usr_sig())
        return outcome

    def checkpoint(self) -> submitit.helpers.DelayedSubmission | None:
        """Has the run save and end; returns what to do when the job starts again, None if it failed for good."""
        import submitit

        if not self._told:
            self._tell()
            if self._outcome(self._wait()) == "failed":
                return None
        return submitit.helpers.DelayedSubmission(SlurmMember(self.job, self.attempts))

    def _tell(self, *_: object) -> None:
        if self._told:
            return
        self._told = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGINT)

    def _cancel(self, *_: object) -> None:
        self._cancelled = True
        self._tell()

    def _wait(self) -> int:
        """The run's exit status. It may be asked for inside a signal handler, in which Popen.wait would never end."""
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _outcome(self, status: int) -> str:
        if self._told and status == -signal.SIGINT:  # before it could listen
            status = PREEMPTED
        status = as_preempted(status, self._processes)
        if status:
            state, error = ("preempted", None) if status == PREEMPTED else ("failed", explain_exit(status, self._log))
            record_end(self.job.directory, state, error, since=self._started)
        return self.attempts.after(status, self.job.steps_done())


def coordinator_address(node: str, job: int) -> str:
    """Where the processes of a job meet: an address of its first node, and a port that follows from its number.

    JAX would take the node's name, which need not be one that the network knows.

    Raises:
      RuntimeError: no address of the node is known.
    """
    port = 65536 - _LAST_PORTS + job % _LAST_PORTS  # as JAX chooses it
    if _resolves(node):
        return f"{node}:{port}"
    command = ["scontrol", "show", "node", node, "--oneliner"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    for name in re.findall(r"\b(?:NodeAddr|NodeHostName)=(\S+)", shown.stdout):
        if _resolves(name):
            return f"{name}:{port}"
    raise RuntimeError(
        f"node {node} has no address that this node can resolve, neither by its name nor by Slurm's NodeAddr; set "
        "JAX_COORDINATOR_ADDRESS=HOST:PORT in --slurm.setup."
    )


def _resolves(name: str) -> bool:
    try:
        socket.gethostbyname(name)
    except OSError:
        return False
    return True


def _is_controller(process: str) -> bool:
    """Whether a process of this machine is one of submitit's local executor."""
    with contextlib.suppress(OSError):
        return b"submitit.local._local" in pathlib.Path(f"/proc/{process}/cmdline").read_bytes()
    return False
