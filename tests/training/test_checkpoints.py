"""Checkpoints: read back bit for bit, from the newest that is whole."""

import dataclasses
import errno
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.training import (
    CheckpointError,
    Checkpoints,
    Retention,
    Storage,
    abstract_state,
    init_state,
    make_train_step,
)
from jaxmoe.training.description import _checksum

# TensorStore's, on what it cannot read
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tiny_run, tiny_batches, copied, tmp_path_factory):
    """A directory with checkpoints of steps 1, 2 and 3, each followed at once by donating steps; and the states."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    step = make_train_step(tiny_run.model, tiny_run.train, 2)
    _, state = init_state(tiny_run)
    states = {}
    with Checkpoints(directory, Retention(3)) as checkpoints:
        for number in (1, 2, 3):
            state, _ = step(state, tiny_batches[number])
            states[number] = copied(state)
            checkpoints.save(number, state, {"loss": number / 4})
    return directory, states


@pytest.fixture
def directory(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved[0], tmp_path / "checkpoints")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_restores_bit_for_bit(tiny_run, saved, copied):
    """Parameters, optimizer, counters and random key, though the state was donated while it was being written."""
    with Checkpoints(saved[0], Retention(3)) as checkpoints:
        assert checkpoints.last_step == 3
        restored = checkpoints.restore(init_state(tiny_run)[1])
    assert restored.step == 3
    assert restored.metadata["loss"] == 0.75
    assert_equal(copied(restored.state), saved[1][3])
    assert jax.dtypes.issubdtype(restored.state.key.dtype, jax.dtypes.prng_key)


def test_training_goes_on_from_a_restored_state_as_from_the_state(tiny_run, tiny_batches, saved, copied):
    step = make_train_step(tiny_run.model, tiny_run.train, 2)
    with Checkpoints(saved[0], Retention(3)) as checkpoints:
        state = checkpoints.restore(init_state(tiny_run)[1]).state
    _, reference = init_state(tiny_run)
    for number in (1, 2, 3):
        reference, _ = step(reference, tiny_batches[number])
    for number in (4, 5):
        state, _ = step(state, tiny_batches[number])
        reference, _ = step(reference, tiny_batches[number])
    assert_equal(copied(state), copied(reference))


def test_large_arrays_are_not_touched_by_steps_during_the_write(tiny_run, tmp_path, copied):
    """16 MB, ten donating updates right after the save begins."""
    _, state = init_state(tiny_run)
    wide = jax.random.normal(jax.random.key(0), (2000, 2000))
    state = dataclasses.replace(state, opt_state=(wide,))
    like = dataclasses.replace(state, opt_state=(jnp.zeros_like(wide),))
    change = jax.jit(lambda x: x * 1.01 + 1, donate_argnums=0)
    expected = copied(state)
    with Checkpoints(tmp_path / "checkpoints", Retention(1)) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(10):
            wide = change(wide)
        wide.block_until_ready()
        checkpoints.wait()
        assert_equal(copied(checkpoints.restore(like).state), expected)


def test_keeps_the_newest(tiny_run, tmp_path):
    _, state = init_state(tiny_run)
    with Checkpoints(tmp_path / "checkpoints", Retention(2)) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == ["20", "30"]


def test_nothing_there(tiny_run, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", Retention(1)) as checkpoints:
        assert checkpoints.restore(init_state(tiny_run)[1]) is None
        assert checkpoints.last_step is None


def data_files(step_directory):
    return [path for path in (step_directory / "state").rglob("*") if path.is_file() and path.parent.name == "d"]


def truncate(step_directory):
    for path in data_files(step_directory):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_large(step_directory):
    """Only the arrays: the index beside them stays whole, so that the damage shows when they are read."""
    largest = max(data_files(step_directory), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def delete_arrays(step_directory):
    for path in data_files(step_directory):
        path.unlink()


def change_bytes(step_directory):
    """One bit in every kilobyte."""
    for path in data_files(step_directory):
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 2, len(content), 1024):
            content[place] ^= 4
        path.write_bytes(content)


def delete_metadata(step_directory):
    (step_directory / "metadata" / "metadata").unlink()


def edit_metadata(step_directory, change):
    path = step_directory / "metadata" / "metadata"
    about = json.loads(path.read_text())
    change(about)
    del about["checksum"]
    path.write_text(json.dumps({**about, "checksum": _checksum(about)}))


def lie_about_an_array(step_directory):
    def change(about):
        about["arrays"]["params/output"]["fingerprint"] ^= 1

    edit_metadata(step_directory, change)


@pytest.mark.parametrize(
    "damage", [truncate, truncate_large, delete_arrays, change_bytes, delete_metadata, lie_about_an_array]
)
def test_damaged_newest_is_set_aside_and_the_one_before_taken(tiny_run, saved, directory, copied, caplog, damage):
    damage(directory / "3")
    with Checkpoints(directory, Retention(3)) as checkpoints, caplog.at_level(logging.WARNING, "jaxmoe"):
        restored = checkpoints.restore(init_state(tiny_run)[1])
        assert restored.step == 2
        assert_equal(copied(restored.state), saved[1][2])
        assert "checkpoint of step 3" in caplog.text
        assert str(directory.parent / "unreadable_checkpoints" / "3") in caplog.text
        checkpoints.save(3, restored.state, {})  # its place is free again
        checkpoints.wait()
        assert checkpoints.last_step == 3


def files_of(step_directory):
    return sorted(str(path.relative_to(step_directory)) for path in step_directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_no_damage_to_any_file_is_trained_from(tiny_run, saved, directory, copied, tmp_path, damage):
    """Whichever file is damaged, what is restored is the state of step 3 or that of step 2, whole."""
    like, intact = abstract_state(tiny_run)[1], tmp_path / "intact"
    (directory / "3").rename(intact)
    taken = {}
    for name in files_of(intact):
        shutil.copytree(intact, directory / "3")
        file = directory / "3" / name
        content = bytearray(file.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 16
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2]}.get(damage, content))
        if damage == "missing":
            file.unlink()
        with Checkpoints(directory, Retention(3)) as checkpoints:
            restored = checkpoints.restore(like)
        assert_equal(copied(restored.state), saved[1][restored.step])
        assert restored.metadata["loss"] == restored.step / 4
        taken[name] = restored.step
        shutil.rmtree(directory / "3", ignore_errors=True)
    assert taken["metadata/metadata"] == 2
    assert 2 in {step for name, step in taken.items() if "/d/" in name}


def test_strictly_a_damaged_checkpoint_is_an_error_and_stays(tiny_run, directory):
    change_bytes(directory / "3")
    with (
        Checkpoints(directory, Retention(3)) as checkpoints,
        pytest.raises(CheckpointError, match=rf"checkpoint {directory}/3 is damaged: .*Nothing was moved"),
    ):
        checkpoints.restore(abstract_state(tiny_run)[1], strict=True)
    assert {path.name for path in directory.iterdir()} >= {"1", "2", "3"}
    assert not (directory.parent / "unreadable_checkpoints").exists()


def test_parameters_alone_in_another_type(tiny_run, saved, copied):
    """Nothing is read of the optimizer; numbers are those saved, rounded."""
    like = dataclasses.replace(abstract_state(tiny_run)[1], opt_state=None)
    as_bfloat16 = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding), like.params
    )
    with Checkpoints(saved[0]) as checkpoints:
        restored = checkpoints.restore(dataclasses.replace(like, params=as_bfloat16), partial=True, cast=True)
        with pytest.raises(CheckpointError, match=r"is float32\[.*\] in it and bfloat16\["):
            checkpoints.restore(dataclasses.replace(like, params=as_bfloat16), partial=True)
        with pytest.raises(CheckpointError, match=r"opt_state/.* in it and absent in this"):
            checkpoints.restore(like)
    assert restored.state.opt_state is None
    assert_equal(
        copied(restored.state.params), jax.tree.map(lambda x: x.astype(jnp.bfloat16), saved[1][3].params)
    )


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_every_layout_of_the_arrays_reads_back(tiny_run, copied, tmp_path, ocdbt, zarr3):
    """With chunks far smaller than the arrays; a later process may be set to write another layout."""
    _, state = init_state(tiny_run)
    with Checkpoints(tmp_path / "c", Retention(1), Storage(ocdbt=ocdbt, zarr3=zarr3, chunk_bytes=1024)) as checkpoints:
        checkpoints.save(1, state, {})
    files = files_of(tmp_path / "c" / "1" / "state")
    assert ("manifest.ocdbt" in files) is ocdbt
    if not ocdbt:
        metadata = next(name for name in files if "params" in name and "down" in name and "zar" in name)
        about = json.loads((tmp_path / "c" / "1" / "state" / metadata).read_text())
        chunk = about["chunk_grid"]["configuration"]["chunk_shape"] if zarr3 else about["chunks"]
        assert np.prod(chunk) * 4 <= 1024 < np.prod(about["shape"]) * 4
    with Checkpoints(tmp_path / "c", Retention(1), Storage()) as checkpoints:
        assert_equal(copied(checkpoints.restore(abstract_state(tiny_run)[1]).state), copied(state))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        PermissionError(errno.EACCES, "Permission denied"),
        ValueError("FAILED_PRECONDITION: Error reading local file [OS error 116: Stale file handle]"),
        ValueError("UNKNOWN: Error opening local file"),
    ],
    ids=str,
)
def test_what_cannot_be_read_just_now_is_left_alone(tiny_run, directory, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    with Checkpoints(directory, Retention(3)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(CheckpointError, match=r"step 3 in .* could not be read: .*nothing was moved"):
            checkpoints.restore(init_state(tiny_run)[1])
    assert {path.name for path in directory.iterdir()} >= {"1", "2", "3"}
    assert not (directory.parent / "unreadable_checkpoints").exists()


def test_unfinished_write_is_ignored(tiny_run, directory):
    """What a kill leaves of a checkpoint that was being written."""
    (directory / "3").rename(directory / "4.orbax-checkpoint-tmp")
    with Checkpoints(directory, Retention(3)) as checkpoints:
        assert checkpoints.last_step == 2
        assert checkpoints.restore(init_state(tiny_run)[1]).step == 2
    assert {path.name for path in directory.iterdir() if path.is_dir()} == {"1", "2"}, "it is cleared away"


def test_none_readable_is_an_error_and_nothing_is_deleted(tiny_run, directory):
    for step in ("1", "2", "3"):
        delete_metadata(directory / step)
    with (
        Checkpoints(directory, Retention(3)) as checkpoints,
        pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read \(steps 3, 2, 1"),
    ):
        checkpoints.restore(init_state(tiny_run)[1])
    aside = directory.parent / "unreadable_checkpoints"
    assert sorted(path.name for path in aside.iterdir() if path.is_dir()) == ["1", "2", "3"]


def test_newer_format_is_refused_and_left_alone(tiny_run, directory):
    edit_metadata(directory / "3", lambda about: about.update(format_version=3, jaxmoe="9.1"))
    with (
        Checkpoints(directory, Retention(3)) as checkpoints,
        pytest.raises(CheckpointError, match=r"step 3 in .* has format 3, written by jaxmoe 9\.1; .* up to 2"),
    ):
        checkpoints.restore(init_state(tiny_run)[1])
    assert (directory / "3").exists()


def test_another_models_checkpoint_is_refused_and_left_alone(tiny_run, directory):
    state = init_state(tiny_run)[1]
    other = dataclasses.replace(state, recent=dataclasses.replace(state.recent, source_nll=jnp.zeros(3)))
    with (
        Checkpoints(directory, Retention(3)) as checkpoints,
        pytest.raises(CheckpointError, match=r"recent/source_nll is float32\[2\] in it and float32\[3\] in this"),
    ):
        checkpoints.restore(other)
    assert (directory / "3").exists()


