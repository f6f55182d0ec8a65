"""Jobs on GKE: a JobSet a member, Kueue's queue for all of them, and xpk's command for those who use it.

Written for JobSet 0.10 (`onJobFailureMessagePatterns`) and Kueue 0.15 (`v1beta2`) or newer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from experiments.launchers.job import ABORTED, MISTAKE, PREEMPTED, Job
from experiments.launchers.tpu import Slice
from jaxmoe.config import ConfigError
from jaxmoe.exit_status import FAILED
from jaxmoe.storage import write_text

_CONTAINER = "train"
_REPLICATED = "slice"
# A pod's name, at most 63 characters, is this with `-slice-0-1023-abcde` after it.
_LONGEST_NAME = 40
# xpk cannot tell a preemption from a failure, so this bounds both together.
_XPK_RESTARTS = 100
_FAILED_WITH = "exit code {} matching FailJob rule"


@dataclasses.dataclass(frozen=True)
class GkeOptions:
    """What a member's JobSet needs to know.

    Attributes:
      slice: of TPU chips.
      image: container image with this package and the experiment file.
      slices: of one member, joined over the data-centre network.
      namespace, queue: Kubernetes namespace, and Kueue's LocalQueue in it.
      service_account: that may write to the bucket; None: the namespace's default.
      grace_seconds: between SIGTERM and SIGKILL; a checkpoint must fit.
      lost_hosts: how many a member of several hosts may lose without notice.
      cluster, project, zone: for the xpk command.
    """

    slice: Slice
    image: str
    slices: int = 1
    namespace: str = "default"
    queue: str = "jaxmoe"
    service_account: str | None = None
    grace_seconds: int = 300
    lost_hosts: int = 10
    cluster: str | None = None
    project: str | None = None
    zone: str | None = None


def object_names(study: str, members: Sequence[str]) -> dict[str, str]:
    """Kubernetes names of the members' JobSets: lower case, no dots, short, and different."""
    plain = {member: re.sub(r"[^a-z0-9]+", "-", f"{study}-{member}".lower()).strip("-") for member in members}
    if plain and not next(iter(plain.values()))[0].isalpha():
        plain = {member: f"study-{name}" for member, name in plain.items()}
    names = {}
    for member, name in plain.items():
        if len(name) > _LONGEST_NAME or list(plain.values()).count(name) > 1:
            mark = hashlib.sha256(f"{study}/{member}".encode()).hexdigest()[:6]
            name = f"{name[: _LONGEST_NAME - 7].rstrip('-')}-{mark}"
        names[member] = name
    return names


def jobset(job: Job, name: str, study: str, options: GkeOptions, retries: int) -> dict[str, Any]:
    """The JobSet of a member.

    All hosts start again together, from the last checkpoint: without end after a preemption (exit status 75, or an
    eviction), `retries` times after anything else, and not at all after a mistake in the configuration (2). When a host
    of several is lost without notice, JAX's runtime aborts the others (134), as a program does that is broken: JobSet
    has one count for all that may be either, so several hosts get `options.lost_hosts` restarts more.
    """
    where = options.slice
    several = options.slices * where.hosts > 1
    exits = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": [status]},
        }
        for status in (MISTAKE, PREEMPTED)
    ]
    pod = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": options.grace_seconds,
        **({"serviceAccountName": options.service_account} if options.service_account else {}),
        "nodeSelector": _node_labels(where),
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [
            {
                "name": _CONTAINER,
                "image": options.image,
                "command": ["python", "-m", "experiments.run", *job.arguments],
                "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}],
                "securityContext": {"privileged": True},
                "resources": {"limits": {"google.com/tpu": where.chips_per_host}},
            }
        ],
    }
    # One slice of several hosts is a node pool of its own; slices of one host share theirs.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": options.namespace,
            "labels": {"kueue.x-k8s.io/queue-name": options.queue, "jaxmoe/study": _label(study)},
            "annotations": {"jaxmoe/member": job.member, **(exclusive if where.hosts > 1 else {})},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": retries + (options.lost_hosts if several else 0),
                "rules": [
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [_FAILED_WITH.format(MISTAKE)],
                    },
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": _REPLICATED,
                    "replicas": options.slices,
                    "template": {
                        "spec": {
                            "parallelism": where.hosts,
                            "completions": where.hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [
                                    *exits,
                                    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
                                ]
                            },
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


def kueue(options: GkeOptions, parallel: int) -> list[dict[str, Any]]:
    """Kueue's objects: a flavor for the slice, a queue with room for `parallel` members, and its local queue."""
    where = options.slice
    flavor = f"{where.accelerator}-{where.topology}"
    chips = parallel * options.slices * where.chips
    version = "kueue.x-k8s.io/v1beta2"
    return [
        {
            "apiVersion": version,
            "kind": "ResourceFlavor",
            "metadata": {"name": flavor},
            "spec": {"nodeLabels": _node_labels(where)},
        },
        {
            "apiVersion": version,
            "kind": "ClusterQueue",
            "metadata": {"name": options.queue},
            "spec": {
                "namespaceSelector": {},
                "queueingStrategy": "BestEffortFIFO",
                "resourceGroups": [
                    {
                        "coveredResources": ["google.com/tpu"],
                        "flavors": [
                            {"name": flavor, "resources": [{"name": "google.com/tpu", "nominalQuota": chips}]}
                        ],
                    }
                ],
            },
        },
        {
            "apiVersion": version,
            "kind": "LocalQueue",
            "metadata": {"name": options.queue, "namespace": options.namespace},
            "spec": {"clusterQueue": options.queue},
        },
    ]


def xpk_command(job: Job, name: str, options: GkeOptions) -> list[str] | None:
    """`xpk workload create` for a member; None where xpk does not know the slice.

    Raises:
      ConfigError: no cluster is named.
    """
    if options.slice.xpk_type is None or options.cluster is None:
        return None
    where = [f"--{key}={value}" for key in ("project", "zone") if (value := getattr(options, key))]
    again = (FAILED, PREEMPTED, ABORTED)
    return [
        "xpk", "workload", "create", f"--workload={name}", f"--cluster={options.cluster}", *where,
        f"--tpu-type={options.slice.xpk_type}", f"--num-slices={options.slices}",
        f"--docker-image={options.image}", f"--max-restarts={_XPK_RESTARTS}",
        f"--restart-on-exit-codes={','.join(map(str, again))}",
        f"--termination-grace-period-seconds={options.grace_seconds}",
        f"--command={shlex.join(['python', '-m', 'experiments.run', *job.arguments])}",
    ]  # fmt: skip


class GkeLauncher:
    """Writes manifests, and hands them to kubectl if asked.

    Args:
      folder: where they are written.
      study: its name.
      options: of every member.
      retries: how often a failed member is started again.
    """

    def __init__(self, folder: str | os.PathLike, study: str, options: GkeOptions, retries: int):
        self._folder, self._study, self._options, self._retries = pathlib.Path(folder), study, options, retries

    def render(self, jobs: Sequence[Job], members: Sequence[str], parallel: int) -> dict[str, str]:
        """File name -> contents: `kueue.yaml`, `MEMBER.yaml` for each job, and `xpk.sh` where xpk can be used."""
        names = object_names(self._study, members)
        files = {"kueue.yaml": yaml.safe_dump_all(kueue(self._options, parallel), sort_keys=False)}
        for job in jobs:
            manifest = jobset(job, names[job.member], self._study, self._options, self._retries)
            files[f"{job.member}.yaml"] = yaml.safe_dump(manifest, sort_keys=False)
        commands = [xpk_command(job, names[job.member], self._options) for job in jobs]
        if jobs and None not in commands:
            files["xpk.sh"] = "".join(f"{shlex.join(command)}\n" for command in commands)
        return files

    def launch(self, files: dict[str, str], apply: bool, note: Callable[[str], None]) -> None:
        """Writes the files; `apply` gives the manifests to kubectl, the queue first."""
        for name, contents in files.items():
            write_text(self._folder / name, contents)
        manifests = [name for name in files if name.endswith(".yaml")]
        command = ["kubectl", "apply", *(f"--filename={self._folder / name}" for name in manifests)]
        if apply:
            _kubectl(command)
        else:
            note(f"written: {self._folder}; start the members with\n{shlex.join(command)}")
        if "xpk.sh" in files:
            note(f"or, with xpk, which brings a queue of its own: sh {self._folder / 'xpk.sh'}")


def cancel(study: str, namespace: str, apply: bool, note: Callable[[str], None]) -> None:
    """Deletes a study's JobSets with kubectl, or says how; the run directories stay."""
    command = [
        "kubectl", "delete", "jobsets.jobset.x-k8s.io", f"--namespace={namespace}",
        f"--selector=jaxmoe/study={_label(study)}",
    ]  # fmt: skip
    if apply:
        _kubectl(command)
    else:
        note(f"stop the members with\n{shlex.join(command)}")


def _node_labels(where: Slice) -> dict[str, str]:
    return {
        "cloud.google.com/gke-tpu-accelerator": where.accelerator,
        "cloud.google.com/gke-tpu-topology": where.topology,
    }


def _label(study: str) -> str:
    """A study's name as the value of a label, at most 63 characters."""
    return study[:63].rstrip("-._")


def _kubectl(command: Sequence[str]) -> None:
    if shutil.which(command[0]) is None:
        raise ConfigError("--gke.apply: there is no kubectl here; leave it out, and apply the files elsewhere.")
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(f"kubectl refuses: {shlex.join(command)}")
