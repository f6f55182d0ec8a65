"""A Slurm of two nodes on this machine, started by hand: Debian's packages, no systemd. See README.md."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged", "runuser")
_MUNGE_SOCKET = pathlib.Path("/run/munge/munge.socket.2")
# A job that is queued again starts after cred_expire seconds, 120 if it is not given.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=6
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
KillWait=300
MinJobAge=300
SchedulerParameters=sched_interval=2,batch_sched_delay=1,requeue_delay=0
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=2 RealMemory=2000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 State=UP
"""


def missing() -> str | None:
    """Why Slurm cannot be started here; None if it can."""
    absent = [name for name in NEEDED if shutil.which(name) is None and not pathlib.Path(f"/usr/sbin/{name}").exists()]
    if absent:
        return f"no {', '.join(absent)} here (apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    return None


@contextlib.contextmanager
def slurm() -> Iterator[pathlib.Path]:
    """Starts it; gives the path of slurm.conf, and stops everything that it started."""
    # Short, since sockets are made in it; not pytest's, which another user could not enter.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
    (folder / "state").mkdir()
    ports = _free_ports(3)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            host=socket.gethostname(), folder=folder, port=ports[0], node1=ports[1], node2=ports[2]
        )
    )
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin", "SLURM_CONF": str(configuration)}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_munge(environment))
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            stack.enter_context(_daemon([*command, "-f", str(configuration)], environment))
        _wait(lambda: _idle_nodes(environment) == 2, "the nodes to be idle", folder)
        yield configuration


@contextlib.contextmanager
def _munge(environment: dict[str, str]) -> Iterator[None]:
    """munged, unless one is there."""
    if _MUNGE_SOCKET.exists() and subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        yield
        return
    _MUNGE_SOCKET.parent.mkdir(parents=True, exist_ok=True)
    shutil.chown(_MUNGE_SOCKET.parent, "munge", "munge")
    command = ["runuser", "-u", "munge", "--", "munged", "--force", "--foreground"]
    with _daemon(command, environment):
        _wait(_MUNGE_SOCKET.exists, "munged", pathlib.Path("/var/log/munge"))
        yield


@contextlib.contextmanager
def _daemon(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle_nodes(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%t"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return shown.stdout.split().count("idle")


def _wait(ready, what: str, logs: pathlib.Path) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        if time.monotonic() > deadline:
            told = "\n".join(path.read_text()[-1500:] for path in logs.glob("*.log"))
            raise RuntimeError(f"waited 30 s for {what}:\n{told}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
