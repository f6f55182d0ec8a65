"""Attention spread over meshes equals attention on one device; run by test_context_attention.py."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from jaxmoe.config import MESH_AXES, ModelConfig
from jaxmoe.layers import context_attention, flash_attention
from jaxmoe.layers.causal_attention import causal_attention
from jaxmoe.layers.self_attention import self_attention
from jaxmoe.models import Decoder
from jaxmoe.sharding import Partitioning, use_partitioning


def partitioning(**sizes) -> Partitioning:
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    return Partitioning(jax.make_mesh(shape, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape)))


def inputs_of(length, head_dim=8, dtype="float32"):
    """Two rows of grouped queries, a direction for the gradient, and documents with padding at both ends."""
    query, key = (2, 2, 3, length, head_dim), (2, 2, length, head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, (query, key, key, query), strict=True)]
    ends = np.array([[5, length // 2 + 3, length], [length // 3, length - 7, length]])
    groups = np.array([[0, 1, 2], [1, 2, 0]])
    numbers = [groups[row][np.searchsorted(ends[row], np.arange(length), side="right")] for row in (0, 1)]
    return arrays, jnp.asarray(np.stack(numbers))


def values_and_gradients(attention, inputs):
    *arguments, direction = inputs
    value, pull = jax.vjp(attention, *arguments)
    return value, *pull(direction)


def check(inputs, groups, name, mesh, tolerances, interpreted=False):
    attention = functools.partial(self_attention, groups=groups, attention=name)
    with use_partitioning(mesh), pallas_kernels.interpreted() if interpreted else contextlib.nullcontext():
        compiled = jax.jit(functools.partial(values_and_gradients, attention)).lower(inputs).compile()
    exact = [x.astype(jnp.float32) for x in inputs]
    expected = values_and_gradients(functools.partial(causal_attention, groups=groups), exact)
    ours = compiled(inputs)
    for actual, desired, tolerance in zip(ours, expected, tolerances, strict=True):
        np.testing.assert_allclose(actual.astype(jnp.float32), desired, rtol=tolerance, atol=tolerance)
    return compiled.as_text()


EXACT = 1e-5, 1e-4, 1e-4, 1e-4
ROUNDED = 2e-2, 4e-2, 4e-2, 4e-2


@pytest.mark.parametrize(
    ("sizes", "length", "has_groups", "dtype", "block"),
    [
        ({"context": 2}, 64, True, "float32", 512),
        ({"context": 4, "tensor": 2}, 64, True, "float32", 4),
        ({"context": 8}, 48, True, "float32", 2),
        ({"data": 2, "context": 2, "tensor": 2}, 36, False, "float32", 5),
        ({"fsdp": 2, "context": 4}, 64, True, "bfloat16", 4),
    ],
)
def test_plain_blocks_over_devices_equal_one_device(sizes, length, has_groups, dtype, block, monkeypatch):
    """Several blocks in a chunk, and one; the largest divisor where the block does not divide it."""
    monkeypatch.setattr(context_attention, "LARGEST_BLOCK", block)
    inputs, groups = inputs_of(length, dtype=dtype)
    tolerances = EXACT if dtype == "float32" else ROUNDED
    program = check(inputs, groups if has_groups else None, "xla", partitioning(**sizes), tolerances)
    assert re.search(r"= \S+ reduce-scatter\(", program)  # each device is sent the sum of its own part


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2, "fsdp": 2}, {"tensor": 4, "data": 2}])
def test_rows_and_heads_over_devices_need_no_exchange(sizes):
    """Two key heads are not spread over four devices."""
    inputs, groups = inputs_of(24)
    mesh = partitioning(**sizes)
    spread = [
        jax.device_put(x, mesh.sharding(("batch", "heads", *[None] * (x.ndim - 2)), x.shape)) for x in inputs
    ]
    program = check(spread, groups, "auto", mesh, EXACT)
    assert not re.search(r"all-gather|all-to-all|collective-permute", program)


@pytest.mark.parametrize(
    ("name", "sizes", "length", "has_groups"),
    [
        ("splash", {"context": 2, "tensor": 2}, 512, True),
        ("splash", {"context": 4}, 1024, False),
        ("splash", {"data": 2, "tensor": 2}, 128, True),
        ("triton", {"data": 2, "tensor": 2}, 128, True),
    ],
)
def test_kernels_over_devices_equal_one_device(name, sizes, length, has_groups, monkeypatch):
    monkeypatch.setattr(flash_attention, "SPLASH_BLOCKS", (128,))
    inputs, groups = inputs_of(length, head_dim=16)
    check(inputs, groups if has_groups else None, name, partitioning(**sizes), EXACT, interpreted=True)


def test_a_sequence_that_cannot_be_spread_is_said_and_computed_whole(caplog):
    inputs, groups = inputs_of(30)
    check(inputs, groups, "auto", partitioning(context=4), EXACT)
    assert "30 tokens is computed whole on each of 4 context devices; a multiple of 8 would be spread" in caplog.text


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_a_model_of_packed_documents_over_context_equals_one_device(remat):
    """Positions that restart with every document, rotary angles, masks: all of them global."""
    config = ModelConfig(
        vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, dense_hidden=16, document_mask=True,
        remat=remat,
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 32)
    segments = jnp.asarray([[1] * 11 + [2] * 21, [1] * 20 + [2] * 7 + [0] * 5])
    definition, parameters = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))

    def loss(parameters):
        logits = nnx.merge(definition, parameters)(tokens, segment_ids=segments).logits
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(segments > 0, chosen, 0.0)) / 59

    expected = jax.jit(jax.value_and_grad(loss))(parameters)
    with use_partitioning(partitioning(context=4)):
        ours = jax.jit(jax.value_and_grad(lambda parameters: loss(parameters)))(parameters)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    for actual, desired in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-6)
