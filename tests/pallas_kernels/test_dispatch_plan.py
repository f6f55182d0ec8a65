"""The plan: a stable grouping by expert, with everything that is not routed at the end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import Plan, compiling_for, make_plan
from pallas_kernels import plan as plan_module

TOKENS, CHOICES, EXPERTS = 12, 3, 5
indices = hnp.arrays(np.int32, (TOKENS, CHOICES), elements=st.integers(-2, EXPERTS + 1))
masks = hnp.arrays(bool, (TOKENS,))

jitted = jax.jit(make_plan, static_argnums=1, static_argnames=("capacity", "block"))


def grouped_by_hand(expert: np.ndarray, num_experts: int, capacity: int | None = None):
    """Groups as lists of assignments, those of no expert, and how many the capacity dropped."""
    groups = [[a for a, e in enumerate(expert.reshape(-1)) if e == expert_] for expert_ in range(num_experts)]
    nobody = [a for a, e in enumerate(expert.reshape(-1)) if not 0 <= e < num_experts]
    dropped = []
    if capacity is not None:
        dropped = [a for group in groups for a in group[capacity:]]
        groups = [group[:capacity] for group in groups]
    return groups, sorted(nobody + dropped), len(dropped)


def assert_is_plan_of(plan: Plan, expert: np.ndarray, num_experts: int, capacity: int | None = None) -> None:
    groups, rest, dropped = grouped_by_hand(expert, num_experts, capacity)
    np.testing.assert_array_equal(plan.order, [*itertools.chain(*groups), *rest])
    np.testing.assert_array_equal(plan.group_sizes, [len(group) for group in groups])
    np.testing.assert_array_equal(plan.group_offsets, np.cumsum([0] + [len(group) for group in groups]))
    np.testing.assert_array_equal(np.asarray(plan.inverse).reshape(-1)[plan.order], np.arange(expert.size))
    kept = np.full(expert.size, num_experts)
    for e, group in enumerate(groups):
        kept[group] = e
    np.testing.assert_array_equal(plan.expert, kept.reshape(expert.shape))
    assert plan.dropped == dropped
    assert (plan.num_experts, plan.experts_per_token) == (num_experts, expert.shape[1])
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(plan))


@given(indices)
def test_plan_groups_assignments_stably_and_puts_outliers_last(expert_index):
    assert_is_plan_of(jitted(expert_index, EXPERTS), expert_index, EXPERTS)


@given(indices, masks)
def test_masked_tokens_belong_to_no_expert_and_are_not_dropped(expert_index, mask):
    plan = jitted(expert_index, EXPERTS, mask=mask)
    assert_is_plan_of(plan, np.where(mask[:, None], expert_index, EXPERTS), EXPERTS)


@pytest.mark.parametrize("capacity", [0, 2])
@given(expert_index=indices)
def test_capacity_drops_later_tokens_and_counts_them(capacity, expert_index):
    plan = jitted(expert_index, EXPERTS, capacity=capacity)
    assert_is_plan_of(plan, expert_index, EXPERTS, capacity)


@pytest.mark.parametrize("block", [2, 8])
@given(expert_index=indices)
def test_groups_begin_at_multiples_of_the_block(block, expert_index):
    plan, plain = jitted(expert_index, EXPERTS, block=block), jitted(expert_index, EXPERTS)
    sizes = -(-np.asarray(plain.group_sizes) // block) * block
    np.testing.assert_array_equal(plan.group_sizes, sizes)
    np.testing.assert_array_equal(plan.group_offsets, np.cumsum([0, *sizes]))
    np.testing.assert_array_equal(plan.expert, plain.expert)
    rows = np.asarray(plan.inverse).reshape(-1)
    assert len(set(rows)) == rows.size
    assert rows.max() < plan.num_rows
    assert plan.num_rows % block == 0
    assert plan.num_rows < rows.size + EXPERTS * (block - 1) + block
    np.testing.assert_array_equal(np.asarray(plan.order)[rows], np.arange(rows.size))
    routed = np.asarray(plan.routed)
    assert routed.sum() == np.asarray(plain.group_sizes).sum()
    for expert in range(EXPERTS):  # the same assignments in the same order as without a block
        group = np.arange(plan.num_rows)[plan.group_offsets[expert] : plan.group_offsets[expert + 1]]
        expected = plain.order[plain.group_offsets[expert] : plain.group_offsets[expert + 1]]
        np.testing.assert_array_equal(np.asarray(plan.order)[group[routed[group]]], expected)


@settings(max_examples=20)
@given(indices)
def test_the_plan_for_a_chip_is_counted_and_the_same(expert_index):
    with compiling_for("v5p"):
        counted = make_plan(np.clip(expert_index, 0, EXPERTS - 1), EXPERTS)
    assert_is_plan_of(counted, np.clip(expert_index, 0, EXPERTS - 1), EXPERTS)


@settings(max_examples=20)
@given(indices)
def test_plan_beyond_the_range_of_packed_keys_is_the_same(expert_index):
    """What large inputs take: N·(E+1) above int32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_INT32_MAX", 0)
        plan = make_plan(np.clip(expert_index, 0, EXPERTS - 1), EXPERTS)
    assert_is_plan_of(plan, np.clip(expert_index, 0, EXPERTS - 1), EXPERTS)


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (1, 5)])
def test_plan_of_few_tokens(shape):
    expert_index = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    assert_is_plan_of(make_plan(expert_index, EXPERTS), expert_index, EXPERTS)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32])
def test_every_integer_dtype_makes_the_same_plan(dtype):
    expert_index = np.array([[255 % 120, 3], [7, 250 % 120]], dtype)
    assert_is_plan_of(make_plan(expert_index, 300), expert_index.astype(int), 300)


def test_index_out_of_range_outside_jit_is_an_error_with_its_place():
    with pytest.raises(ValueError, match=r"expert_index\[1, 0\]=5 but there are num_experts=5; .* 0\.\.4"):
        make_plan(np.array([[0, 1], [5, -1]]), EXPERTS)
    make_plan(np.array([[0, 1], [5, -1]]), EXPERTS, mask=np.array([True, False]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(expert_index=np.zeros(3, int), num_experts=2), r"expert_index has shape \(3,\); \(T, K\) is expected"),
        (dict(expert_index=np.zeros((3, 1)), num_experts=2), "integer dtype is expected"),
        (dict(expert_index=np.zeros((3, 0), int), num_experts=2), "at least one expert per token"),
        (dict(expert_index=np.zeros((3, 1), int), num_experts=0), "num_experts=0; it must be positive"),
        (dict(expert_index=np.zeros((3, 1), int), num_experts=2, capacity=-1), "capacity=-1"),
        (dict(expert_index=np.zeros((3, 1), int), num_experts=2, block=0), "block=0; it must be positive"),
        (dict(expert_index=np.zeros((3, 1), int), num_experts=2, mask=np.ones(2, bool)), r"\(3,\) bool is expected"),
        (dict(expert_index=np.zeros((3, 1), int), num_experts=2, mask=np.ones(3)), r"\(3,\) bool is expected"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**arguments)
