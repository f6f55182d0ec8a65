"""What two processes agree on: run by `test_two_processes.py` in two, with a device each."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxmoe.config import ConfigError
from jaxmoe.processes import connect, is_first, together
from jaxmoe.sharding import partitioning_of_run
from jaxmoe.training import damage
from jaxmoe.training.checkpoints import Checkpoints
from jaxmoe.training.damage import DamageError, finding
from jaxmoe.training.errors import CheckpointError
from jaxmoe.training.state import abstract_state, init_state
from jaxmoe.training.watchdog import _Others

connect()


@pytest.fixture(scope="session")
def shared_path():
    """A folder of both processes."""
    return os.environ["SHARED_PATH"]


@pytest.mark.parametrize("process", [0, 1])
def test_an_error_in_one_process_alone_is_raised_in_both(process):
    def divide_in_one():
        if jax.process_index() == process:
            raise ZeroDivisionError("no such thing")

    if jax.process_index() == process:
        expected, message = ZeroDivisionError, "^no such thing$"
    else:
        expected, message = ConfigError, f"^process {process}: no such thing$"
    with pytest.raises(expected, match=message), together():
        divide_in_one()
    with together():
        pass


@pytest.fixture(scope="session")
def saved(tiny_run, shared_path):
    """The folder of checkpoints of steps 1 and 2, and what to restore like."""
    partitioning = partitioning_of_run(tiny_run)
    _, state = init_state(tiny_run, partitioning)
    with Checkpoints(os.path.join(shared_path, "checkpoints")) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"said": step}, required=True)
        checkpoints.wait()
    return checkpoints.directory, abstract_state(tiny_run, partitioning)[1], state


@pytest.fixture
def found(monkeypatch):
    """What this process found of checkpoints by itself, before they agreed, and after."""
    findings = []

    def note(error):
        findings.append(finding(error))
        return findings[-1]

    monkeypatch.setattr(damage, "finding", note)
    return findings


@pytest.fixture
def damaged_in_process_1(monkeypatch):
    """Says of which step process 1, and only it, meets an error, and which."""

    def damage(damaged, error):
        original = Checkpoints._check_structure

        def check(self, step, *arguments):
            if jax.process_index() == 1 and step == damaged:
                raise error
            original(self, step, *arguments)

        monkeypatch.setattr(Checkpoints, "_check_structure", check)

    return damage


def test_strictly_damage_that_one_process_sees_stops_both_and_nothing_is_moved(saved, damaged_in_process_1):
    directory, like, _ = saved
    damaged_in_process_1(2, DamageError("array a differs from what was written"))
    message = r"checkpoints/2 is damaged: .*array a differs"
    with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(like, strict=True)
    assert (directory / "2").is_dir()


def test_what_one_process_cannot_read_just_now_stops_both(saved, damaged_in_process_1):
    directory, like, _ = saved
    damaged_in_process_1(2, TimeoutError("the disk does not answer"))
    message = r"step 2 .*does not answer.* nothing was moved"
    with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(like)
    assert (directory / "2").is_dir()


def test_damage_that_one_process_sees_is_damage_for_both(saved, found):
    """The file with the shards of process 1, which it alone reads, is cut: both take the checkpoint before."""
    directory, like, state = saved
    if is_first():
        file = max((directory / "2" / "state" / "ocdbt.process_1" / "d").iterdir(), key=lambda path: path.stat().length)
        file.write_bytes(file.read_bytes()[: file.stat().length // 2])
    multihost_utils.sync_global_devices("cut")
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(like)
    assert found[0] == ("intact" if is_first() else "damaged")
    assert (restored.step, restored.metadata["said"]) == (1, 1)
    for old, new in zip(jax.tree.leaves(state.params), jax.tree.leaves(restored.state.params), strict=True):
        np.testing.assert_array_equal(new.addressable_data(0), old.addressable_data(0))
    assert (directory.parent / "unreadable_checkpoints" / "2").is_dir()
    assert not (directory / "2").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_a_watchdog_hears_what_moves_in_the_other_process(process):
    """One has a beat, the other none; each asks once in a round."""
    others, beat = _Others(1.0), object()
    heard = []
    for _ in range(4):
        if jax.process_index() == process:
            beat = object()
            others.moved(beat, 1.0)
        multihost_utils.sync_global_devices("one has moved")
        if jax.process_index() != process:
            heard.append(others.moved(beat, 1.0))
        multihost_utils.sync_global_devices("the other has asked")
    multihost_utils.sync_global_devices("nothing moves any more")
    if jax.process_index() != process:
        assert heard == [True] * 4
        assert not others.moved(beat, 1.0)
