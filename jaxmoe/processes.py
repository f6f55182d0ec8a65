"""Several processes that train one run: how they find each other, and how they agree.

JAX's own runtime connects them; every process runs the same program on the same steps, with its devices' part of every
array. What only one may do, such as writing a record, the first does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its coordination service has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxmoe.config import ConfigError
from jaxmoe.exclusive import HeldElsewhereError

logger = logging.getLogger(__name__)

LOST_AFTER_SECONDS = 100
"""A process of which JAX's coordination service hears nothing for so long is lost, and the others end."""

_MESSAGE_BYTES = 4096
_LATER = "\x01"
"""Before a message of what may pass: that another host holds a folder."""


def connect(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    lost_after_seconds: int = LOST_AFTER_SECONDS,
) -> None:
    """Connects this process with the others that were launched with it; alone, it stays alone.

    Without arguments the environment says whether there are others: `JAX_COORDINATOR_ADDRESS` with
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; Slurm's variables under `srun` (with one task on a node it has all of
    the node's devices, else each task has the one of its local number); a TPU slice or several, on GKE by its
    variables, on a TPU VM by its metadata. To be called before anything asks JAX for its devices.

    Args:
      coordinator_address: `host:port` of the first process.
      num_processes: how many there are.
      process_id: of this one, from 0.
      lost_after_seconds: a process of which nothing is heard for so long, whatever it computes, counts as lost: JAX's
        runtime then ends the others by SIGABRT. The same in all of them.

    Raises:
      ConfigError: some of the three are given and others are not, or they do not fit.
    """
    environment = os.environ
    given = {
        "coordinator_address": coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _whole_number(num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _whole_number(process_id, "JAX_PROCESS_ID"),
    }
    slurm, hosts = _slurm_tasks(environment), _tpu_hosts(environment)
    initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=lost_after_seconds)
    if None not in given.values():
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise ConfigError(
                f"process_id={given['process_id']} of num_processes={given['num_processes']}; choose 0.."
                f"{given['num_processes'] - 1}."
            )
        initialize(**given, cluster_detection_method="deactivate")
    elif slurm > 1:
        # JAX gives every task of Slurm one device; a task that has its node for itself has all of them.
        devices = [] if _slurm_tasks_on_this_node(environment) == 1 else None
        initialize(given["coordinator_address"], local_device_ids=devices)
    elif given != dict.fromkeys(given) and slurm != 1:
        missing = ", ".join(f"--{name}" for name, value in given.items() if value is None)
        raise ConfigError(f"{missing} must be given, too: a process has to know where the first is and which it is.")
    elif hosts > 1:
        initialize()
    elif hosts == 0 and _is_tpu_vm(environment):
        try:
            initialize()
        except ValueError as error:  # no coordinator: not part of a slice of several hosts
            logger.info("this TPU VM is taken to be alone: %s", error)
    if jax.distributed.is_initialized():
        logger.info(
            "process %d of %d, with %d of %d devices",
            jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(),
        )  # fmt: skip


def alone() -> bool:
    """Whether no other process trains the run. JAX's devices are not asked for it where none can."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return alone() or jax.process_index() == 0


def of_first(value: bool) -> bool:
    """What the first process found, such as whether a file is there; to be called by all."""
    if alone():
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def numbers_of_first(compute: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers that the first process computes, and the others get from it; to be called by all."""
    numbers = np.asarray(compute(), np.float32) if is_first() else np.zeros(shape, np.float32)
    return numbers if alone() else np.asarray(multihost_utils.broadcast_one_to_all(numbers))


def highest(number: int) -> Int[Array, ""]:
    """The highest of the numbers that the processes give, on its way while they go on; to be called by all."""
    sharding, most = _highest_of_all()
    return most(jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: np.full(1, number, np.int32)))


@functools.cache
def _highest_of_all() -> tuple[NamedSharding, Callable[[Array], Array]]:
    mesh = Mesh(np.array(jax.devices()), "devices")
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("devices")), jax.jit(jnp.max, out_shardings=everywhere)


def told_by_all(key: str, said: str) -> list[str]:
    """What every process says under a key that it uses once; to be called by all, in any thread.

    It goes through JAX's coordination service, and no device takes part: what computes on them goes on.
    """
    if alone():
        return [said]
    client = distributed.global_state.client
    client.key_value_set(f"jaxmoe/{key}/{jax.process_index()}", said)
    minutes = 60
    return [
        client.blocking_key_value_get(f"jaxmoe/{key}/{process}", minutes * 60_000)
        for process in range(jax.process_count())
    ]


def say_for_all(key: str, said: str) -> None:
    """Says something that any process may look up with `said_for_all`; of what several say, one thing stays."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process is gone, and nobody listens
        distributed.global_state.client.key_value_set(f"jaxmoe/{key}", said, allow_overwrite=True)


def said_for_all(key: str) -> str | None:
    """What a process said with `say_for_all`; None if none did, or if the first process does not answer."""
    try:
        return distributed.global_state.client.key_value_try_get(f"jaxmoe/{key}")
    except jax.errors.JaxRuntimeError:
        return None


def counted(key: str, more: int) -> int | None:
    """Adds to a count that all processes share; what it is then, or None if the first process does not answer."""
    try:
        return distributed.global_state.client.key_value_increment(f"jaxmoe/{key}", more)
    except jax.errors.JaxRuntimeError:
        return None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process cannot do, none goes on from: an error inside is raised in every process, as a ConfigError.

    HeldElsewhereError, which may pass, stays what it is.

    All processes have to come here, and leave only when all have.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not alone():
        told = "" if error is None else f"{error}" or type(error).__name__
        told = f"{_LATER}{told}" if isinstance(error, HeldElsewhereError) else told
        message = np.zeros(_MESSAGE_BYTES, np.uint8)
        encoded = np.frombuffer(told.encode()[:_MESSAGE_BYTES], np.uint8)
        message[: encoded.size] = encoded
        messages = multihost_utils.process_allgather(message)
        for process, other in enumerate(messages):
            if error is None and other.any():
                text = bytes(other[other > 0]).decode(errors="replace")
                kind = HeldElsewhereError if text.startswith(_LATER) else ConfigError
                raise kind(f"process {process}: {text.removeprefix(_LATER)}")
    if error is not None:
        raise error


def _whole_number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or text is None:
        return value
    if not text.isdecimal():
        raise ConfigError(f"{variable}={text!r} is not a whole number.")
    return int(text)


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the job step that this process is one of; 0 outside of one."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys():
        return 0
    return int(environment.get("SLURM_NTASKS", "1"))


def _slurm_tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """From a list such as `2(x3),1`: tasks of three nodes, then of one."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 0


def _tpu_hosts(environment: Mapping[str, str]) -> int:
    """Hosts of all TPU slices, as GKE's variables have them; 0 where there are none."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    names = [name for name in hosts.split(",") if name]
    return len(names) * int(environment.get("MEGASCALE_NUM_SLICES") or 1)


def _is_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips, and a metadata server that may know of other hosts."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", "") or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
