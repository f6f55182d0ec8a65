"""TPU kernels in the TPU interpreter, which looks for races between copies, reads and writes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import combine, dispatch, grouped_matmul, interpreted, make_plan, moe_mlp, mosaic, tiles
from pallas_kernels.moe_mlp import kernels


@pytest.fixture
def races(monkeypatch):
    """Whether a race was found so far; the fixture sees to it that something was looked at."""
    states = []

    class Remembered(interpret_pallas_call.RaceDetectionState):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            states.append(self)

    monkeypatch.setattr(interpret_pallas_call, "RaceDetectionState", Remembered)
    pltpu.reset_tpu_interpret_mode_state()
    with interpreted(detect_races=True):
        yield lambda: any(state.races_found for state in states)
    assert states
    pltpu.reset_tpu_interpret_mode_state()


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(initial=1e-30))


def test_a_race_would_be_seen(races):
    """A copy's target is read before the copy is waited for."""

    def kernel(x, out, buffer, semaphore):
        copy = pltpu.make_async_copy(x, buffer, semaphore)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )(jnp.ones((8, 128))).block_until_ready()
    assert races()


def routings(tokens, k, experts):
    """Random with tokens of no expert, every expert but one empty, and nothing routed."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(-1, experts, (tokens, k)).astype(np.int32),
        np.full((tokens, k), experts - 1, np.int32),
        np.full((tokens, k), -1, np.int32),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "width", "hidden", "dtype", "recompute"),
    [
        (65, 130, 256, jnp.float32, False),  # rows no multiple of a tile, D none of 128
        (128, 128, 128, jnp.bfloat16, False),  # whole tiles: the hidden layer's gradient takes its place
        (65, 128, 200, jnp.float32, False),  # F no multiple of 128: without the fused kernels
        (192, 128, 256, jnp.float32, True),  # part after part of the rows
    ],
)
def test_the_layer_has_no_races_and_equals_its_definition(
    tokens, width, hidden, dtype, recompute, races, monkeypatch
):
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 1)
    experts = 3
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (tokens, width), dtype)
    gate = jax.random.uniform(keys[1], (tokens, 2))
    w_gate_up = (0.1 * jax.random.normal(keys[2], (experts, width, 2 * hidden))).astype(dtype)
    w_down = (0.1 * jax.random.normal(keys[3], (experts, hidden, width))).astype(dtype)
    y_gradient = jax.random.normal(keys[4], (tokens, width), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(backend, expert_index):
        call = functools.partial(moe_mlp, recompute=recompute, backend=backend)
        y, pull = jax.vjp(lambda x, g, u, d: call(x, expert_index, g, u, d), x, gate, w_gate_up, w_down)
        return y, *pull(y_gradient)

    for expert_index in routings(tokens, 2, experts):
        expected = pulled("reference", expert_index)
        assert_close(pulled("tpu", expert_index), expected, 1e-5 if dtype == jnp.float32 else 2e-2)
    assert not races()


@pytest.mark.slow
@pytest.mark.parametrize("transpose_weights", [False, True])
def test_products_in_several_steps_have_no_races(transpose_weights, races):
    """Parts of both widths, more than there are whole tiles of, and groups that share a tile."""
    rows = jax.random.normal(jax.random.key(0), (200, 300))
    weights = jax.random.normal(jax.random.key(1), (5, 260, 300) if transpose_weights else (5, 300, 260))
    cotangent = jax.random.normal(jax.random.key(2), (200, 260))

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(backend, sizes):
        call = functools.partial(grouped_matmul, transpose_weights=transpose_weights, backend=backend)
        out, pull = jax.vjp(lambda rows, weights: call(rows, weights, sizes), rows, weights)
        return out, *pull(cotangent)

    part = dict(rows=32, contracted=128, out=128)
    with tiles.trying("grouped_matmul", part), tiles.trying("weight_gradient", part):
        for sizes in ([50, 0, 100, 13, 7], [0, 0, 200, 0, 0], [0, 0, 0, 0, 0], [40, 40, 40, 40, 40]):
            sizes = np.array(sizes, np.int32)
            assert_close(pulled("tpu", sizes), pulled("reference", sizes), 1e-5)
    assert not races()


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "width"), [(37, 130), (48, 256)])
def test_dispatch_and_combine_have_no_races(tokens, width, races):
    """Several blocks of each."""
    x = jax.random.normal(jax.random.key(0), (tokens, width))
    gate = jax.random.uniform(jax.random.key(1), (tokens, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(backend, plan):
        def both(x, gate):
            return combine(dispatch(x, plan, backend=backend), plan, gate, backend=backend)

        y, pull = jax.vjp(both, x, gate)
        return y, *pull(x)

    with tiles.trying("dispatch", {"rows": 128}), tiles.trying("combine", {"tokens": 16}):
        for expert_index in routings(tokens, 3, 4):
            plan = jax.jit(make_plan, static_argnums=1)(expert_index, 4)
            assert_close(pulled("tpu", plan), pulled("reference", plan), 1e-5)
    assert not races()


def test_rows_as_lanes_and_back():
    """D/128 sublanes of 128 lanes, zeros behind D."""
    array = jnp.arange(6.0).reshape(2, 3)
    lanes = mosaic.as_lanes(array)
    assert lanes.shape == (2, 1, 128)
    np.testing.assert_array_equal(mosaic.from_lanes(lanes, 3), array)
    assert mosaic.as_lanes(lanes) is lanes
