"""Every backend of grouped_matmul equals the definition, and the definition equals a loop over the groups."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BACKENDS, grouped_matmul, windows

ROWS, EXPERTS, WIDTH, OUT = 40, 4, 6, 5
FAST_BACKENDS = [backend for backend in BACKENDS if backend != "reference"]
BFLOAT16_BACKENDS = [backend for backend in BACKENDS if backend != "cpu_native"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def arrays(experts=EXPERTS, rows=ROWS, dtype="float32", transpose_weights=False):
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (experts, OUT, WIDTH) if transpose_weights else (experts, WIDTH, OUT)
    return (
        jax.random.normal(keys[0], (rows, WIDTH), dtype),
        jax.random.normal(keys[1], shape, dtype),
        jax.random.normal(keys[2], (rows, OUT), dtype),
    )


_compiled = {}


def value_and_gradients(backend, rows, weights, sizes, cotangent, transpose_weights=False):
    """Output, gradient of rows, gradient of weights."""
    key = backend, transpose_weights

    def pulled(rows, weights, sizes, cotangent):
        out, pull = jax.vjp(
            lambda rows, weights: grouped_matmul(
                rows, weights, sizes, transpose_weights=transpose_weights, backend=backend
            ),
            rows,
            weights,
        )
        return out, *pull(cotangent)

    function = _compiled.setdefault(key, jax.jit(pulled))
    return function(rows, weights, np.asarray(sizes, np.int32), cotangent)


def assert_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(initial=1e-30))


def by_hand(rows, weights, sizes, cotangent):
    """Output and gradients, group after group, in float64."""
    rows, weights, cotangent = (np.asarray(array, np.float64) for array in (rows, weights, cotangent))
    out, rows_gradient, weights_gradient = np.zeros(cotangent.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    start = 0
    for expert, size in enumerate(sizes):
        group = slice(start, start + size)
        out[group] = rows[group] @ weights[expert]
        rows_gradient[group] = cotangent[group] @ weights[expert].T
        weights_gradient[expert] = rows[group].T @ cotangent[group]
        start += size
    return out, rows_gradient, weights_gradient


@st.composite
def group_sizes(draw, experts=EXPERTS, rows=ROWS):
    """Any sizes with a sum up to N, hot experts and empty ones among them."""
    cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=experts, max_size=experts)))
    return [after - before for before, after in zip([0, *cuts], cuts, strict=False)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50)
@given(sizes=group_sizes())
def test_backends_equal_a_loop_over_groups_in_float32(backend, sizes):
    rows, weights, cotangent = arrays()
    actual = value_and_gradients(backend, rows, weights, sizes, cotangent)
    assert_close(actual, by_hand(rows, weights, sizes, cotangent), 1e-5)


@pytest.mark.parametrize("backend", BFLOAT16_BACKENDS)
@settings(max_examples=20)
@given(sizes=group_sizes())
def test_backends_equal_a_loop_over_groups_in_bfloat16(backend, sizes):
    rows, weights, cotangent = arrays(dtype="bfloat16")
    actual = value_and_gradients(backend, rows, weights, sizes, cotangent)
    assert all(array.dtype == jnp.bfloat16 for array in actual)
    assert_close(actual, by_hand(rows, weights, sizes, cotangent), 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pattern_of_empty_groups(backend):
    """Of eight, and so of fewer: the last ones are empty then."""
    rows, weights, cotangent = arrays(experts=8)
    for present in itertools.product([0, 1], repeat=8):
        sizes = [size * here for size, here in zip([7, 1, 9, 3, 2, 11, 1, 5], present, strict=True)]
        actual = value_and_gradients(backend, rows, weights, sizes, cotangent)
        assert_close(actual, by_hand(rows, weights, sizes, cotangent), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weights(backend):
    rows, weights, cotangent = arrays(transpose_weights=True)
    sizes = [3, 0, 30, 5]
    out, rows_gradient, weights_gradient = value_and_gradients(backend, rows, weights, sizes, cotangent, True)
    expected = by_hand(rows, weights.swapaxes(1, 2), sizes, cotangent)
    assert_close((out, rows_gradient, weights_gradient.swapaxes(1, 2)), expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_the_groups_are_zero_and_cannot_spoil_anything(backend):
    rows, weights, cotangent = arrays()
    sizes = [10, 0, 12, 3]
    out, rows_gradient, weights_gradient = value_and_gradients(
        backend, rows.at[25:].set(jnp.nan), weights, sizes, cotangent.at[25:].set(jnp.nan)
    )
    np.testing.assert_array_equal(out[25:], 0)
    np.testing.assert_array_equal(rows_gradient[25:], 0)
    assert_close((weights_gradient,), by_hand(rows, weights, sizes, cotangent)[2:], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend):
    rows, weights, cotangent = arrays()
    out, _, weights_gradient = value_and_gradients(
        backend, rows.at[3].set(jnp.nan), weights, [10, 10, 10, 10], cotangent
    )
    assert np.isnan(out[3]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()
    assert np.isfinite(weights_gradient[1:]).all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(("experts", "rows"), [(1, 9), (17, 64), (16, 5), (3, 1)])
def test_other_shapes(backend, experts, rows):
    """One expert, several blocks in a turn of the loop, fewer rows than experts, a single row."""
    arguments = arrays(experts, rows)
    for sizes in ([rows] + [0] * (experts - 1), [0] * (experts - 1) + [rows], [rows // experts] * experts):
        actual = value_and_gradients(backend, *arguments[:2], sizes, arguments[2])
        assert_close(actual, by_hand(*arguments[:2], sizes, arguments[2]), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    rows, weights, _ = arrays(rows=0)
    sizes = np.zeros(EXPERTS, np.int32)
    assert grouped_matmul(rows, weights, sizes, backend=backend).shape == (0, OUT)
    gradient = jax.grad(lambda weights: grouped_matmul(rows, weights, sizes, backend=backend).sum())(weights)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_nobody_could_check_are_cut(backend):
    """Under jit: groups end at N, and none is negative."""
    rows, weights, cotangent = arrays()
    actual = value_and_gradients(backend, rows, weights, [30, -5, 20, 10], cotangent)
    assert_close(actual, by_hand(rows, weights, [30, 0, 10, 0], cotangent), 1e-5)


@settings(max_examples=20)
@given(sizes=group_sizes(experts=9, rows=300), weights=st.sampled_from([10, 10**6]))
def test_windows_and_blocks_hold_every_row_once(sizes, weights):
    """The slots of all rows are distinct, and their places hold those rows."""
    sizes = np.asarray(sizes, np.int32)
    layout = windows.layout_of(jnp.asarray(sizes), 300, weights)
    tiling = layout.tiling
    expert = np.repeat(np.arange(10), np.append(sizes, 300 - sizes.sum()))
    slots = layout.slots(jnp.arange(300), jnp.asarray(expert))
    np.testing.assert_array_equal(slots.in_window | slots.in_block, expert < 9)
    window = layout.windows()
    held = np.where(window.valid, window.index, -1).reshape(-1)
    blocks = np.full(layout.block_capacity, -1)
    for turn in range(-(-int(layout.block_ends[-1]) // tiling.batch)):
        block_expert, rows = layout._blocks(turn)
        first = turn * tiling.batch * tiling.block
        part = np.where(rows.valid, rows.index, -1)
        blocks[first : first + part.size] = part.reshape(-1)
        owner = np.where(part >= 0, expert[np.maximum(part, 0)], np.asarray(block_expert)[:, None])
        np.testing.assert_array_equal(owner, np.broadcast_to(np.asarray(block_expert)[:, None], part.shape))
    in_window, in_block = np.asarray(slots.in_window), np.asarray(slots.in_block)
    np.testing.assert_array_equal(held[np.asarray(slots.window)[in_window]], np.arange(300)[in_window])
    np.testing.assert_array_equal(blocks[np.asarray(slots.block)[in_block]], np.arange(300)[in_block])
    assert (held >= 0).sum() + (blocks >= 0).sum() == sizes.sum()


@given(sizes=group_sizes(experts=9, rows=300), window=st.integers(0, 60), block=st.sampled_from([8, 16, 64]))
def test_no_routing_needs_more_blocks(sizes, window, block):
    sizes = np.asarray(sizes)
    assert np.sum(-(-np.maximum(sizes - window, 0) // block)) <= windows.most_blocks(300, 9, window, block)


def test_some_routing_needs_that_many_blocks():
    """All rows with one expert; one row too many with each of eight, and the other 112 with the ninth."""
    assert windows.most_blocks(300, 9, 40, 16) == -(-(300 - 40) // 16) == 17
    assert windows.most_blocks(300, 9, 20, 64) == 8 + 2 == 8 + -(-112 // 64)
    assert windows.most_blocks(300, 9, 300, 8) == 1  # none, but a buffer has to have a place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rows=jnp.ones((4, 7))), r"rows has width D=7 but weights has shape \(4, 6, 5\), whose axis 1 must be 7"),
        (dict(rows=jnp.ones((4, 1, 6))), r"rows has shape \(4, 1, 6\); \(N, D\) is expected"),
        (dict(rows=jnp.ones((40, 6), jnp.float16)), "rows has dtype float16; choose one of float32, bfloat16"),
        (dict(rows=jnp.ones((40, 6), jnp.bfloat16)), "weights has dtype float32 but rows has bfloat16"),
        (dict(weights=jnp.ones((0, 6, 5))), r"weights has shape \(0, 6, 5\); at least one expert is needed"),
        (dict(group_sizes=np.ones(3, int)), "group_sizes names 3 groups but weights has E=4"),
        (dict(group_sizes=np.ones(4)), "group_sizes has dtype float64"),
        (dict(group_sizes=np.array([10, 20, 30, 0])), "with sum 60; .* at most N=40"),
        (dict(backend="triton"), "backend='triton'; choose 'auto' or one of 'reference', 'cpu', 'cpu_native', 'tpu'"),
    ],
)
def test_misfits_are_refused(change, message):
    rows, weights, _ = arrays()
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**{**dict(rows=rows, weights=weights, group_sizes=np.ones(4, np.int32)), **change})
