"""A step on a mesh is the step on one device: run by `test_meshes.py` on 8 devices, and in 2 processes with 2 each."""

import dataclasses
import functools
import math
import os
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils

from jaxmoe.config import MeshConfig, ModelConfig, MoEConfig, RunConfig
from jaxmoe.data import load_tokenizer
from jaxmoe.evaluation import greedy_answers
from jaxmoe.evaluation.forward import Evaluator
from jaxmoe.processes import connect, is_first
from jaxmoe.sharding import make_partitioning, rows_here, use_partitioning
from jaxmoe.training.bad_steps import is_bad, judge_bad_step
from jaxmoe.training.errors import BufferOverflowError
from jaxmoe.training.state import init_state, initial_state, state_shardings
from jaxmoe.training.step import make_train_step, place_batch

MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "fsdp_expert": MeshConfig(fsdp=2, expert=4),
    "fsdp_expert_tensor": MeshConfig(fsdp=2, expert=2, tensor=2),
    "data_context": MeshConfig(data=2, fsdp=2, context=2),
}

CASES = [
    ("fsdp", 1, "none"),
    ("fsdp_expert", 1, "none"),
    ("fsdp_expert_tensor", 4, "full"),
    ("data_context", 2, "dots"),
]

if "JAX_NUM_PROCESSES" in os.environ:
    connect()
    MESHES, CASES = {"pair": MeshConfig(fsdp=2, expert=2)}, [("pair", 2, "none")]

of_eight_devices = pytest.mark.skipif(
    jax.device_count() < 8, reason="eight devices are needed; test_meshes.py runs this file where there are"
)


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
    """Arrays of a tree by their path, from all processes."""

    def whole(leaf):
        return np.asarray(leaf) if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)

    return {jax.tree_util.keystr(path): whole(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}




def step_of(run, batch, mesh):
    """Parameters before a step; its metrics; its gradient, as Adam's first moment of the first step has it."""
    partitioning = None if mesh is None else make_partitioning(mesh)
    _, state = init_state(run, partitioning)
    params = named(state.params)
    if partitioning is not None:
        here = rows_here(partitioning, 32)
        batch = place_batch({key: value[here] for key, value in batch.items()}, partitioning, 32)
    state, metrics = make_train_step(run.model, run.train, 2, partitioning)(state, batch)
    return params, named(metrics), named(state.opt_state[1].mu)


@pytest.fixture(scope="session")
def on_one_device(run, batch):
    """`step_of` on one device, in the process that compares; None in the others."""
    return step_of(run, batch, None) if is_first() else None


def assert_equal_steps(found, expected):
    """Parameters bit for bit; losses and metrics to 1e-5; the gradient of every parameter to 1e-4 of its largest."""
    if expected is None:
        return
    for name, value in expected[0].items():
        np.testing.assert_array_equal(found[0][name], value, err_msg=name)
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    for name, value in expected[2].items():
        np.testing.assert_allclose(found[2][name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)
        assert np.abs(value).max() > 0, name


@pytest.mark.parametrize(("name", "micro_batches", "remat"), CASES)
def test_a_step_does_not_depend_on_the_mesh_the_micro_batches_and_what_is_recomputed(
    run, batch, on_one_device, replace_train, name, micro_batches, remat
):
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat))
    run = replace_train(run, gradient_accumulation=micro_batches)
    assert_equal_steps(step_of(run, batch, MESHES[name]), on_one_device)


@of_eight_devices
def test_no_device_holds_more_than_its_part(run):
    """Parameters and moments are made spread over all devices, norms excepted; no array on the way is larger."""
    partitioning = make_partitioning(MESHES["fsdp_expert"])
    _, state = init_state(run, partitioning)
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    for path, leaf in leaves:
        if leaf.size > 1024:
            assert leaf.addressable_shards[0].data.size * 8 <= leaf.size, jax.tree_util.keystr(path)
    initialize = functools.partial(initial_state, run.model, run.train, 2)
    shardings = state_shardings(jax.eval_shape(initialize, jax.random.key(0)), partitioning)
    with use_partitioning(partitioning):
        program = jax.jit(initialize, out_shardings=shardings).lower(jax.random.key(0)).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"[fu]32\[([\d,]+)\]", program)]
    assert max(sizes) == max(leaf.size for _, leaf in leaves) // 8


@of_eight_devices
def test_answers_do_not_depend_on_the_mesh(run):
    """Generated with a cache, three prompts at a time, which no axis divides."""
    tokenizer = load_tokenizer("symbols")
    prompts = [tokenizer.decode(list(range(20, 20 + length))) for length in (3, 4, 6)]

    def answers(mesh):
        partitioning = None if mesh is None else make_partitioning(mesh)
        graph, state = init_state(run, partitioning)
        model = nnx.merge(graph, state.params, state.others)
        with use_partitioning(partitioning):
            return greedy_answers(model, prompts, tokenizer, max_new_tokens=6, batch_size=3)

    expected = answers(None)
    assert answers(MESHES["fsdp_expert_tensor"]) == expected
    assert any(answer.text for answer in expected)


@of_eight_devices
def test_a_step_whose_rows_found_no_room_is_not_applied_where_the_buffer_is_strict(run, batch):
    moe = dataclasses.replace(run.model.moe, expert_buffer_factor=0.5, strict_buffer=True)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=1, first_dense_layers=0, moe=moe))
    partitioning = make_partitioning(MESHES["fsdp_expert"])
    _, state = init_state(run, partitioning)
    before = named(state.params)
    state, metrics = make_train_step(run.model, run.train, 2, partitioning)(state, place_batch(batch, partitioning))
    assert metrics["skipped"] == 1
    assert 0.4 <= metrics["overflow_fraction"] < 0.75
    for name, value in named(state.params).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert is_bad(metrics)
    with pytest.raises(BufferOverflowError, match=r"step 1 was not applied: .* expert_buffer_factor=0.5 .* step 0 is"):
        raise judge_bad_step(run, 1, metrics)("The checkpoint of step 0 is good.")


@of_eight_devices
def test_an_evaluation_has_room_for_every_row_however_small_the_buffers_of_the_training(run, batch):
    """With half the mean's room, which drops half of the training's rows, the loss is that of one device."""
    moe = dataclasses.replace(run.model.moe, expert_buffer_factor=0.5, strict_buffer=True)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=1, first_dense_layers=0, moe=moe))

    def evaluated(mesh):
        partitioning = None if mesh is None else make_partitioning(mesh)
        graph, state = init_state(run, partitioning)
        with use_partitioning(partitioning):
            evaluator = Evaluator(nnx.merge(graph, state.params, state.others))
            return evaluator(batch)[0], evaluator.statistics

    loss, statistics = evaluated(MESHES["fsdp_expert"])
    expected, _ = evaluated(None)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    assert statistics.overflowed.sum() == 0
    assert statistics.expert_count.sum() == 2 * (batch["segment_ids"] > 0).sum()
