"""A step on a mesh is the step on one device: run by `test_meshes.py` in a process with 8 devices."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.config import MeshConfig, ModelConfig, MoEConfig, RunConfig
from jaxmoe.sharding import make_partitioning
from jaxmoe.training.state import init_state
from jaxmoe.training.step import make_train_step, place_batch

MESHES = {
    "data": MeshConfig(data=8, fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "fsdp_expert": MeshConfig(fsdp=2, expert=4),
    "fsdp_expert_tensor": MeshConfig(fsdp=2, expert=2, tensor=2),
    "fsdp_context": MeshConfig(fsdp=4, context=2),
}


@pytest.fixture(scope="session")
def run(tiny_run, replace_train) -> RunConfig:
    """A dense layer, then a scan over five routed ones; the gradient is not clipped, so that Adam's moments show it."""
    model = ModelConfig(
        vocab_size=288, width=16, num_layers=6, num_heads=4, num_kv_heads=2, dense_hidden=24, max_sequence_length=16,
        init_std=0.1, first_dense_layers=1, document_mask=True,
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_hidden=8),
    )  # fmt: skip
    return replace_train(dataclasses.replace(tiny_run, model=model), batch_size=32, clip_norm=None)


@pytest.fixture(scope="session")
def batch(run):
    """32 rows of two documents and padding, with weights."""
    random = np.random.default_rng(0)
    shape = 32, 16
    segments = np.ones(shape, np.int32)
    segments[:, 9:] = 2
    segments[::3, 13:] = 0
    return {
        "inputs": random.integers(0, 288, shape).astype(np.int32),
        "targets": random.integers(0, 288, shape).astype(np.int32),
        "loss_weights": (random.random(shape) * (segments > 0)).astype(np.float32),
        "segment_ids": segments,
        "source": random.integers(0, 2, 32).astype(np.int32),
    }


def named(tree) -> dict[str, np.ndarray]:
    """Arrays of a tree by their path."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}




def step_of(run, batch, mesh):
    """Parameters before a step; its metrics; its gradient, as Adam's first moment of the first step has it."""
    partitioning = None if mesh is None else make_partitioning(mesh)
    _, state = init_state(run, partitioning)
    params = named(state.params)
    state, metrics = make_train_step(run.model, run.train, 2, partitioning)(state, place_batch(batch, partitioning))
    return params, named(metrics), named(state.opt_state[1].mu)


@pytest.fixture(scope="session")
def on_one_device(run, batch):
    """`step_of` on one device."""
    return step_of(run, batch, None)


def assert_equal_steps(found, expected):
    """Parameters bit for bit; losses and metrics to 1e-5; the gradient of every parameter to 1e-4 of its largest."""
    for name, value in expected[0].items():
        np.testing.assert_array_equal(found[0][name], value, err_msg=name)
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    for name, value in expected[2].items():
        np.testing.assert_allclose(found[2][name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)
        assert np.abs(value).max() > 0, name


@pytest.mark.parametrize("name", MESHES)
def test_a_step_does_not_depend_on_the_mesh(run, batch, on_one_device, name):
    assert_equal_steps(step_of(run, batch, MESHES[name]), on_one_device)


@pytest.mark.parametrize(("parts", "name"), [(2, "fsdp_context"), (4, "fsdp_expert_tensor")])
def test_a_step_does_not_depend_on_micro_batches(run, batch, on_one_device, replace_train, parts, name):
    found = step_of(replace_train(run, gradient_accumulation=parts), batch, MESHES[name])
    assert_equal_steps(found, on_one_device)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_a_step_does_not_depend_on_what_is_recomputed(run, batch, on_one_device, remat):
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat))
    assert_equal_steps(step_of(run, batch, MESHES["fsdp_expert"]), on_one_device)


def test_no_device_holds_more_than_its_part(run):
    """Parameters and moments are made spread over all devices, norms excepted, and no buffer is larger."""
    partitioning = make_partitioning(MESHES["fsdp_expert"])
    _, state = init_state(run, partitioning)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        if leaf.size > 1024:
            assert leaf.addressable_shards[0].data.size * 8 <= leaf.size, jax.tree_util.keystr(path)
