"""Dispatch and combine against their definitions, and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import BACKENDS, combine, dispatch, grouped_matmul, make_plan
from pallas_kernels.combine import reference as combine_reference
from pallas_kernels.dispatch import reference as dispatch_reference
from pallas_kernels.execution import PLATFORMS

TOKENS, CHOICES, EXPERTS, WIDTH = 12, 3, 5, 4
indices = hnp.arrays(np.int32, (TOKENS, CHOICES), elements=st.integers(-1, EXPERTS))
inside = hnp.arrays(np.int32, (TOKENS, CHOICES), elements=st.integers(0, EXPERTS - 1))
plan_of = jax.jit(make_plan, static_argnums=1)


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (TOKENS, WIDTH), dtype)
    rows = jax.random.normal(keys[1], (TOKENS * CHOICES, WIDTH), dtype)
    gate = jax.random.normal(keys[2], (TOKENS, CHOICES))
    return x, rows, gate


@jax.jit
def value_and_gradient_of_dispatch(x, plan, cotangent):
    def pulled(function):
        rows, pull = jax.vjp(lambda x: function(x, plan), x)
        return rows, pull(cotangent)

    return pulled(dispatch), pulled(dispatch_reference.dispatch)


@jax.jit
def value_and_gradient_of_combine(rows, plan, gate, cotangent):
    def pulled(function):
        y, pull = jax.vjp(lambda rows, gate: function(rows, plan, gate), rows, gate)
        return y, pull(cotangent)

    return pulled(combine), pulled(combine_reference.combine)


def assert_trees_close(actual, expected, tolerance):
    """Errors against the inputs, which are standard normal: a gate's gradient may nearly vanish by cancellation."""

    def close(a, e):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@settings(max_examples=50)
@given(expert_index=indices)
def test_dispatch_equals_its_definition_with_gradient(dtype, tolerance, expert_index):
    x, rows, _ = arrays(dtype)
    actual, expected = value_and_gradient_of_dispatch(x, plan_of(expert_index, EXPERTS), rows)
    np.testing.assert_array_equal(actual[0], expected[0])
    assert_trees_close(actual[1], expected[1], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@settings(max_examples=50)
@given(expert_index=indices)
def test_combine_equals_its_definition_with_gradients(dtype, tolerance, expert_index):
    x, rows, gate = arrays(dtype)
    actual, expected = value_and_gradient_of_combine(rows, plan_of(expert_index, EXPERTS), gate, x)
    assert_trees_close(actual, expected, tolerance)


@settings(max_examples=30)
@given(indices)
def test_rows_are_their_tokens_and_zero_where_nobody_took_them(expert_index):
    x, _, _ = arrays()
    plan = plan_of(expert_index, EXPERTS)
    rows = np.asarray(dispatch(x, plan))
    routed = int(plan.group_sizes.sum())
    np.testing.assert_array_equal(rows[:routed], np.asarray(x)[np.asarray(plan.order)[:routed] // CHOICES])
    np.testing.assert_array_equal(rows[routed:], 0)


@settings(max_examples=30)
@given(inside)
def test_combine_inverts_dispatch(expert_index):
    """Rows that no expert touched come back as they went, K times over."""
    x, _, gate = arrays()
    plan = plan_of(expert_index, EXPERTS)
    returned = combine(dispatch(x, plan), plan, jnp.ones_like(gate))
    np.testing.assert_allclose(returned, CHOICES * x, rtol=1e-6)


@settings(max_examples=30)
@given(indices)
def test_rows_past_the_groups_do_not_count_and_get_no_gradient(expert_index):
    x, rows, gate = arrays()
    plan = plan_of(expert_index, EXPERTS)
    routed = int(plan.group_sizes.sum())
    poisoned = rows.at[routed:].set(jnp.nan)
    poisoned_gate = jnp.where(plan.expert < EXPERTS, gate, jnp.nan)
    (y, (rows_gradient, gate_gradient)), _ = value_and_gradient_of_combine(poisoned, plan, poisoned_gate, x)
    assert np.isfinite(y).all()
    assert np.isfinite(gate_gradient).all()
    np.testing.assert_array_equal(rows_gradient[routed:], 0)
    np.testing.assert_array_equal(np.asarray(gate_gradient)[np.asarray(plan.expert) == EXPERTS], 0)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend in PLATFORMS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_kernels_equal_the_definitions_with_gradients(backend, dtype, tolerance):
    x, rows, gate = arrays(dtype)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def pulled(dispatch, combine, plan):
        def both(x, rows, gate):
            return dispatch(x, plan), combine(rows, plan, gate)

        out, pull = jax.vjp(both, x, rows, gate)
        return out, pull((rows, x))

    kernels = functools.partial(dispatch, backend=backend), functools.partial(combine, backend=backend)
    rng = np.random.default_rng(0)
    for lowest, highest in ((-1, EXPERTS), (2, 2), (-1, -1), (0, EXPERTS - 1)):
        plan = plan_of(rng.integers(lowest, highest + 1, (TOKENS, CHOICES)).astype(np.int32), EXPERTS)
        expected = pulled(dispatch_reference.dispatch, combine_reference.combine, plan)
        assert_trees_close(pulled(*kernels, plan), expected, tolerance)


@pytest.mark.parametrize("backend", ["cpu", *PLATFORMS])
def test_rows_that_are_weighted_already_are_summed(backend):
    x, rows, gate = arrays()
    plan = plan_of(np.random.default_rng(0).integers(-1, EXPERTS, (TOKENS, CHOICES)).astype(np.int32), EXPERTS)
    y, pull = jax.vjp(lambda rows: combine(rows, plan, None, backend=backend), rows)
    expected, expected_pull = jax.vjp(lambda rows: combine_reference.combine(rows, plan, jnp.ones_like(gate)), rows)
    assert_trees_close((y, pull(x)), (expected, expected_pull(x)), 1e-5)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
def test_an_aligned_plan_gives_the_same_layer(backend):
    """Dispatch, product and combine with their gradients, groups at multiples of 8 rows or anywhere."""
    x, _, gate = arrays()
    weights = jax.random.normal(jax.random.key(5), (EXPERTS, WIDTH, WIDTH))
    expert_index = np.random.default_rng(1).integers(0, EXPERTS, (TOKENS, CHOICES)).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(block, expert_index):
        plan = make_plan(expert_index, EXPERTS, block=block, mask=jnp.arange(TOKENS) != 3)

        def layer(x, gate, weights):
            rows = grouped_matmul(dispatch(x, plan, backend=backend), weights, plan.group_sizes, backend=backend)
            return combine(rows, plan, gate, backend=backend)

        y, pull = jax.vjp(layer, x, gate, weights)
        return y, pull(x)

    assert_trees_close(value_and_gradients(8, expert_index), value_and_gradients(1, expert_index), 1e-5)


@pytest.mark.parametrize(("block", "num_rows"), [(1, 0), (8, 40)])
def test_no_tokens(block, num_rows):
    plan = make_plan(np.zeros((0, 2), np.int32), EXPERTS, block=block)
    assert not plan.routed.any()
    rows = dispatch(jnp.zeros((0, WIDTH)), plan)
    assert rows.shape == (num_rows, WIDTH)
    gradient = jax.grad(lambda gate: combine(rows, plan, gate).sum())(jnp.zeros((0, 2)))
    assert gradient.shape == (0, 2)


def test_misfits_are_refused():
    x, rows, gate = arrays()
    plan = make_plan(np.zeros((TOKENS, CHOICES), np.int32), EXPERTS)
    with pytest.raises(ValueError, match="x has 11 tokens but the plan is for 12"):
        dispatch(x[1:], plan)
    with pytest.raises(ValueError, match="x has dtype int32; choose one of float32, bfloat16"):
        dispatch(x.astype(jnp.int32), plan)
    with pytest.raises(ValueError, match="rows has 35 rows but the plan has N = 36"):
        combine(rows[1:], plan, gate)
    with pytest.raises(ValueError, match=r"gate has shape \(12, 2\); \(T, K\) = \(12, 3\)"):
        combine(rows, plan, gate[:, 1:])
