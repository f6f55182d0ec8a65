"""Attention: against plain numpy, in blocks, grouped, padded, cached."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.layers import Attention, KeyValueCache, apply_rope, rope_angles
from jaxmoe.layers import causal_attention as module
from jaxmoe.layers.causal_attention import causal_attention, query_blocks

BATCH, LENGTH, KEY_HEADS, QUERIES_PER_KEY, HEAD_DIM = 2, 7, 2, 3, 4


def plain_attention(query, key, value, groups):
    """The definition, in whatever array library the arguments are of."""
    length = query.shape[3]
    allowed = np.tril(np.ones((length, length), bool))[None] & (groups[:, :, None] == groups[:, None, :])
    scores = jnp.einsum("bmrqh,bmch->bmrqc", query, key) / np.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bmrqc,bmch->bmrqh", weights, value)


@pytest.fixture(scope="module")
def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    query_shape = (BATCH, KEY_HEADS, QUERIES_PER_KEY, LENGTH, HEAD_DIM)
    key_shape = (BATCH, KEY_HEADS, LENGTH, HEAD_DIM)
    shapes = [query_shape, key_shape, key_shape, query_shape]
    return [2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


GROUPS = {"one": None, "documents": np.array([[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 0, 0]])}


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("groups", list(GROUPS))
def test_blocks_equal_the_definition_in_values_and_gradients(arguments, monkeypatch, block, groups):
    monkeypatch.setattr(module, "BLOCK", block)
    *inputs, direction = arguments
    groups = GROUPS[groups]
    numbers = np.ones((BATCH, LENGTH), int) if groups is None else groups

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(attention, *inputs):
        value, pull = jax.vjp(attention, *inputs)
        return value, *pull(direction)

    ours = values_and_gradients(lambda *qkv: causal_attention(*qkv, None if groups is None else numbers), *inputs)
    expected = values_and_gradients(lambda *qkv: plain_attention(*qkv, numbers), *inputs)
    for actual, desired in zip(ours, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)


@given(length=st.integers(1, 5000))
def test_blocks_cover_the_row_in_order(length):
    blocks = query_blocks(length)
    assert blocks[0][0] == 0
    assert blocks[-1][1] == length
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(blocks))
    assert len(blocks) <= module.MOST_BLOCKS


def test_scores_too_large_for_exp_stay_finite():
    query = jnp.full((1, 1, 1, 3, 2), 1e3)
    value = jnp.arange(6.0).reshape(1, 1, 3, 2)
    gradient = jax.grad(lambda q: causal_attention(q, query[:, :, 0], value).sum())(query)
    np.testing.assert_allclose(causal_attention(query, query[:, :, 0], value)[0, 0, 0, 2], [2.0, 3.0])
    assert np.isfinite(gradient).all()


def test_bfloat16_is_accumulated_in_float32(arguments):
    rounded = [x.astype(jnp.bfloat16) for x in arguments[:3]]
    exact = plain_attention(*(x.astype(jnp.float32) for x in rounded), np.ones((BATCH, LENGTH), int))
    ours = causal_attention(*rounded)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2e-2, atol=2e-2)


def test_rotary_angles_and_rotation_by_hand():
    cosine, sine = rope_angles(jnp.array([0, 3]), 4, theta=100.0)
    np.testing.assert_allclose(cosine, np.cos([[0, 0], [3, 0.3]]), rtol=1e-6)  # theta^(-2/4) = 0.1
    np.testing.assert_allclose(sine, np.sin([[0, 0], [3, 0.3]]), rtol=1e-6)
    turned = apply_rope(jnp.array([[1.0, 2.0, 3.0, 4.0]] * 2), cosine, sine)
    np.testing.assert_allclose(turned[0], [1, 2, 3, 4])  # position 0 stays
    c, s = np.cos([3, 0.3]), np.sin([3, 0.3])
    first, second = np.array([1, 2]), np.array([3, 4])  # half-split: pairs are (x0, x2) and (x1, x3)
    np.testing.assert_allclose(turned[1], np.concatenate([first * c - second * s, second * c + first * s]), rtol=1e-6)


@given(first=st.integers(0, 50), second=st.integers(0, 50), shift=st.integers(0, 50))
def test_rotated_products_depend_on_the_distance_alone(first, second, shift):
    query, key = jax.random.normal(jax.random.key(2), (2, 8))

    def product(i, j):
        return apply_rope(query, *rope_angles(jnp.array(i), 8)) @ apply_rope(key, *rope_angles(jnp.array(j), 8))

    np.testing.assert_allclose(product(first, second), product(first + shift, second + shift), rtol=1e-3, atol=1e-3)


WIDTH, HEADS = 12, 6


@nnx.jit(static_argnames="layer")
def apply(attention, x, **arguments):
    return attention(x, **arguments)


def make_attention(**changes) -> Attention:
    settings = {"num_kv_heads": KEY_HEADS, "head_dim": HEAD_DIM, "init_std": 0.5} | changes
    return Attention(WIDTH, HEADS, rngs=nnx.Rngs(0), **settings)


@pytest.mark.parametrize("qk_norm", ["none", "head", "projection"])
def test_layer_equals_its_formula_head_by_head(qk_norm):
    """Projection, normalization, rotation, softmax and output written out in numpy for every query head."""
    layer = make_attention(qk_norm=qk_norm, norm_eps=0.1, rope_theta=50.0)
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    weights, output = np.asarray(layer.query_key_value[...]), np.asarray(layer.output[...])
    scales = {}
    if qk_norm != "none":
        for name in ("query_scale", "key_scale"):
            scale = getattr(layer, name)
            scale[...] = scales[name] = 1 + 0.1 * np.arange(scale.size, dtype=np.float32)
    rows = np.asarray(x[0])
    query = np.stack([rows @ weights[:, h // 3, h % 3] for h in range(HEADS)])
    key = np.stack([rows @ weights[:, m, 3] for m in range(KEY_HEADS)])
    value = np.stack([rows @ weights[:, m, 4] for m in range(KEY_HEADS)])

    def normalized(heads, scale):
        axes = -1 if qk_norm == "head" else (0, 2)
        rms = np.sqrt(np.mean(heads**2, axis=axes, keepdims=True) + 0.1)
        return heads / rms * (scale if qk_norm == "head" else scale.reshape(heads.shape[0], 1, HEAD_DIM))

    if qk_norm != "none":
        query, key = normalized(query, scales["query_scale"]), normalized(key, scales["key_scale"])
    angle = np.arange(LENGTH)[:, None] * 50.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)

    def rotated(heads):
        first, second = np.split(heads, 2, axis=-1)
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
        )

    query, key = rotated(query), rotated(key)
    expected = np.zeros((LENGTH, WIDTH))
    for h in range(HEADS):
        for i in range(LENGTH):
            scores = key[h // 3, : i + 1] @ query[h, i] / 2  # sqrt(head_dim) = 2
            attention = np.exp(scores - scores.max())
            expected[i] += attention / attention.sum() @ value[h // 3, : i + 1] @ output[h]
    np.testing.assert_allclose(apply(layer, x)[0][0], expected, rtol=1e-4, atol=1e-4)


def test_padding_leaves_real_tokens_alone_and_everything_finite():
    layer = make_attention()
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    groups = jnp.array([[0, 0, 1, 1, 1, 0, 0]])
    positions = jnp.array([[0, 0, 0, 1, 2, 0, 0]])

    def summed(x):
        y = layer(x, groups=groups, positions=positions)[0]
        return jnp.sum(y[:, 2:5] ** 2), y

    gradient, y = jax.jit(jax.grad(summed, has_aux=True))(x)
    np.testing.assert_allclose(y[:, 2:5], apply(layer, x[:, 2:5])[0], rtol=1e-5, atol=1e-5)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(gradient[:, [0, 1, 5, 6]], 0.0)
    assert np.isfinite(gradient).all()


def test_cache_filled_in_two_parts_equals_the_whole_row():
    """Rows of different lengths: the second part overwrites the padding of the first."""
    layer = make_attention()
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH))
    whole, none = apply(layer, x)
    assert none is None
    empty = jnp.zeros((3, 2, KEY_HEADS, LENGTH + 2, HEAD_DIM))
    first, cache = apply(layer, x[:, :4], cache=KeyValueCache(empty, empty), layer=1)
    np.testing.assert_allclose(first, whole[:, :4], rtol=1e-4, atol=1e-5)
    lengths = np.array([4, 2])
    for step in range(3):
        token = jnp.stack([x[row, lengths[row] + step] for row in range(2)])[:, None]
        y, cache = apply(layer, token, positions=jnp.asarray(lengths + step)[:, None], cache=cache, layer=1)
        expected = np.stack([whole[row, lengths[row] + step] for row in range(2)])
        np.testing.assert_allclose(y[:, 0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.key[0::2], 0.0)  # other layers' parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "num_heads=6 is not divisible by num_kv_heads=4"),
        ({"head_dim": 3}, "head_dim=3 is odd"),
        ({"qk_norm": "layer"}, "choose one of 'none', 'head', 'projection'"),
    ],
)
def test_misuse_is_an_error_in_the_users_terms(change, message):
    with pytest.raises(ValueError, match=message):
        make_attention(**change)
