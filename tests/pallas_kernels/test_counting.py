"""Grouping by counting gives what grouping by sorting gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import counting, plan

grouped = jax.jit(counting.group, static_argnums=1)
sorted_groups = jax.jit(plan._group, static_argnums=1)


def assert_same(expert, num_experts):
    actual, expected = grouped(expert, num_experts), sorted_groups(expert, num_experts)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.int32
        np.testing.assert_array_equal(a, e)


@settings(max_examples=50)
@given(hnp.arrays(np.int32, 40, elements=st.integers(0, 5)))
def test_any_assignment_of_one_block(expert):
    assert_same(expert, 5)


@settings(max_examples=20)
@given(hnp.arrays(np.int32, 600, elements=st.integers(0, 3), fill=st.integers(0, 3)))
def test_any_assignment_of_several_blocks(expert):
    assert_same(expert, 3)


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 5000])
@pytest.mark.parametrize("num_experts", [1, 300])
def test_sizes_around_a_block_and_hot_experts(rows, num_experts):
    rng = np.random.default_rng(rows)
    for expert in (rng.integers(0, num_experts + 1, rows), np.full(rows, num_experts - 1), np.full(rows, num_experts)):
        assert_same(expert.astype(np.int32), num_experts)


def test_beyond_the_range_of_packed_keys_it_is_the_same(monkeypatch):
    monkeypatch.setattr(counting, "_INT32_MAX", 0)
    expert = np.random.default_rng(0).integers(0, 8, 700).astype(np.int32)
    for a, e in zip(counting.group(jnp.asarray(expert), 7), sorted_groups(expert, 7), strict=True):
        np.testing.assert_array_equal(a, e)


def test_nothing_is_gathered_scattered_or_searched():
    program = jax.jit(counting.group, static_argnums=1).lower(jax.ShapeDtypeStruct((1000,), jnp.int32), 64).as_text()
    assert not any(word in program for word in ("gather", "scatter", "while"))
    assert program.count("stablehlo.sort") == 1
