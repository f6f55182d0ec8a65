"""How processes find each other, by what the environment says."""

import jax
import pytest

from jaxmoe import processes
from jaxmoe.config import ConfigError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}

LIMIT = {"heartbeat_timeout_seconds": 100}


@pytest.fixture
def connected(monkeypatch):
    """What `jax.distributed.initialize` is called with, None if it is not, in an environment of these variables."""

    def connected(variables, *arguments):
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
        processes.connect(*arguments)
        return calls[0] if calls else None

    return connected


def test_alone_nothing_is_connected(connected):
    assert connected({"JAX_PLATFORMS": "cpu"}) is None
    assert processes.alone()
    assert processes.is_first()


def test_flags_come_before_variables(connected):
    variables = {"JAX_COORDINATOR_ADDRESS": "other:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    expected = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 2}
    assert connected(variables, "host:1", None, 2)[1].items() >= expected.items()


def test_half_of_what_is_needed_is_refused(connected):
    with pytest.raises(ConfigError, match="--num_processes, --process_id must be given, too"):
        connected({}, "host:1")
    with pytest.raises(ConfigError, match=r"process_id=2 of num_processes=2; choose 0..1"):
        connected({}, "host:1", 2, 2)
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID='x' is not a whole number"):
        connected({"JAX_PROCESS_ID": "x"}, "host:1", 2)


def test_a_slurm_task_with_a_node_of_its_own_has_all_of_its_devices(connected):
    """JAX by itself gives every task one device; with several tasks on a node that is right."""
    alone = {**SLURM, "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}
    assert connected(alone) == ((None,), {"local_device_ids": [], **LIMIT})
    shared = {**SLURM, "SLURM_NTASKS": "9", "SLURM_STEP_TASKS_PER_NODE": "1,4(x2)", "SLURM_NODEID": "2"}
    assert connected(shared) == ((None,), {"local_device_ids": None, **LIMIT})
    given = {**alone, "JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"}
    assert connected(given)[0] == ("127.0.0.1:9",)
    assert connected({**given, "SLURM_NTASKS": "1"}) is None


def test_hosts_of_tpu_slices_are_connected_by_jax_s_own_detection(connected):
    one = {"TPU_WORKER_HOSTNAMES": "a", "JAX_PLATFORMS": "cpu"}
    assert connected(one) is None
    assert connected({**one, "MEGASCALE_NUM_SLICES": "2"}) == ((), LIMIT)
    assert connected({**one, "TPU_WORKER_HOSTNAMES": "a,b"}) == ((), LIMIT)
