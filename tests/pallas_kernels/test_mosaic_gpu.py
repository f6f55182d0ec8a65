"""Mosaic GPU's grouped product, in its interpreter: numbers, races between copies, and when it is the one to run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.10 exports it nowhere

from pallas_kernels.execution import Target
from pallas_kernels.grouped_matmul import mosaic_gpu, triton_gpu

# What lies past the end of an array comes as NaN; the copy engine of a GPU brings zeros there.
INTERPRETER = InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
ROWS, WIDTH, OUT = 140, 128, 128


def arrays(experts):
    keys = jax.random.split(jax.random.key(5), 2)
    rows = jax.random.normal(keys[0], (ROWS, WIDTH), jnp.bfloat16)
    return rows, jax.random.normal(keys[1], (experts, WIDTH, OUT), jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[70, 0, 65], [0, 140, 0], [0, 0, 0], [1, 63, 64]])
def test_it_equals_a_loop_over_groups(sizes):
    """Empty groups, a hot one, no rows at all, tiles with one row; rows of no group are zero whatever they hold."""
    rows, weights = arrays(len(sizes))
    rows = rows.at[sum(sizes) :].set(jnp.nan)
    out = mosaic_gpu.product(rows, weights, jnp.asarray(sizes, jnp.int32), interpret=INTERPRETER)
    expected, start = np.zeros((ROWS, OUT)), 0
    for expert, size in enumerate(sizes):
        group = slice(start, start + size)
        expected[group] = np.asarray(rows, np.float64)[group] @ np.asarray(weights, np.float64)[expert]
        start += size
    tolerance = 2e-2 * np.abs(expected).max(initial=1)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(np.asarray(out)[start:], 0)


def test_it_equals_tritons_kernel():
    rows, weights = arrays(3)
    sizes = jnp.array([30, 50, 40], jnp.int32)
    triton = triton_gpu.product(rows, weights, sizes, False, Target("gpu", interpret=True))
    mosaic = mosaic_gpu.product(rows, weights, sizes, interpret=INTERPRETER)
    np.testing.assert_allclose(np.asarray(mosaic, np.float32), np.asarray(triton, np.float32), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("change", "served"),
    [
        (dict(), True),
        (dict(chip="NVIDIA A100-SXM4-40GB"), False),
        (dict(chip=None), False),
        (dict(dtype=jnp.float32), False),
        (dict(transpose=True), False),
        (dict(width=96), False),
        (dict(out=192), False),
        (dict(rows=63), False),
    ],
)
def test_the_rule_for_what_it_serves(change, served):
    case = dict(chip="h100", dtype=jnp.bfloat16, transpose=False, width=128, out=256, rows=64) | change
    rows = jax.ShapeDtypeStruct((case["rows"], case["width"]), case["dtype"])
    weights = jax.ShapeDtypeStruct((2, case["width"], case["out"]), case["dtype"])
    assert mosaic_gpu.serves(rows, weights, case["transpose"], Target("gpu", case["chip"])) == served


def test_without_what_mosaic_gpu_needs_triton_multiplies_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setattr(mosaic_gpu, "plgpu", None)
    mosaic_gpu._is_at_hand.cache_clear()
    rows, weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 128), (2, 128, 256)))
    assert not mosaic_gpu.serves(rows, weights, False, Target("gpu", "h100"))
    mosaic_gpu._is_at_hand.cache_clear()
    assert "pip install absl-py" in caplog.text
