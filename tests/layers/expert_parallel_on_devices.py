"""The routed layer and its exchange on eight devices, against one. Started by `test_expert_parallel.py`.

P devices, E experts, K experts per token, D width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxmoe.config import MESH_AXES
from jaxmoe.layers import MoE
from jaxmoe.layers.exchange import BLOCK, blocks, buffer_rows, exchange, rows_together
from jaxmoe.layers.expert_parallel import agreed_slices, in_blocks, received_rows_bound
from jaxmoe.sharding import Partitioning, use_partitioning
from pallas_kernels import make_plan

WIDTH, HIDDEN = 8, 4


@functools.cache
def partitioning(**sizes: int) -> Partitioning:
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return Partitioning(jax.make_mesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES, axis_types=kinds))


@functools.cache
def make_moe(**settings) -> MoE:
    sizes = {"num_experts": 8, "experts_per_token": 2, "expert_hidden": HIDDEN, "init_std": 0.7}
    return MoE(WIDTH, rngs=nnx.Rngs(0), **(sizes | settings))


@functools.cache
def compiled(moe: MoE, spread: Partitioning | None):
    """Outputs, statistics, and gradients with respect to parameters and tokens."""
    definition, _ = nnx.split(moe)

    def loss(params, x, mask, cotangent):
        y, statistics = nnx.merge(definition, params)(x, mask)
        total = jnp.sum(y * cotangent) + 0.1 * statistics.z_sum + jnp.sum(statistics.probability_sum**2)
        return total, (y, statistics)

    def traced(*arguments):
        with use_partitioning(spread):
            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arguments)

    return jax.jit(traced)


def tokens(*leading: int) -> tuple[jax.Array, jax.Array]:
    """Tokens, and the gradient of what is made of them."""
    return tuple(jax.random.normal(jax.random.key(seed), (*leading, WIDTH)) for seed in (1, 2))


def assert_equal_on_both(moe, spread, x, mask, cotangent, params=None):
    params = nnx.state(moe) if params is None else params
    expected = compiled(moe, None)(params, x, mask, cotangent)
    actual = compiled(moe, spread)(params, x, mask, cotangent)
    (_, (y, statistics)), _ = expected
    (_, (own_y, own_statistics)), _ = actual
    np.testing.assert_allclose(own_y, y, rtol=1e-5, atol=1e-5)
    for field in dataclasses.fields(statistics):
        values = getattr(own_statistics, field.name), getattr(statistics, field.name)
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5, err_msg=field.name)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    return own_statistics


@pytest.mark.parametrize(
    ("settings", "sizes", "leading"),
    [
        ({}, {"fsdp": 8}, (8, 4)),
        (
            {"experts_per_token": 3, "capacity_factor": 0.7, "expert_overlap": True},
            {"fsdp": 2, "expert": 2, "tensor": 2},
            (4, 6),
        ),
        ({"capacity_factor": 0.7, "num_experts": 6}, {"data": 2, "expert": 2, "context": 2}, (8, 4)),
        (
            {"experts_per_token": 1, "num_experts": 2, "score_order": "softmax_then_topk", "renormalize": False},
            {"expert": 2, "tensor": 4},
            (2, 8),
        ),
        ({"capacity_factor": 0.6}, {"fsdp": 2, "expert": 2, "tensor": 2}, (5, 1)),
        ({"expert_overlap": True}, {"expert": 8}, (3,)),
    ],
    ids=["fsdp", "overlap_capacity", "context_capacity", "fewer_experts_than_devices", "one_token_a_row", "no_rows"],
)
def test_a_mesh_changes_no_number(settings, sizes, leading):
    """Outputs, statistics, and the gradients of tokens, router and experts, padding among the tokens."""
    x, cotangent = tokens(*leading)
    mask = jax.random.uniform(jax.random.key(3), leading) < 0.8
    statistics = assert_equal_on_both(make_moe(**settings), partitioning(**sizes), x, mask, cotangent)
    assert statistics.overflowed == 0
    assert (statistics.dropped > 0) == ("capacity_factor" in settings)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto], ids=str)
def test_somebody_elses_mesh_changes_no_number(kind):
    """Of a program that knows nothing of `use_partitioning`; explicit axes are what `jax.make_mesh` makes."""
    mesh, moe = jax.make_mesh((4, 2), ("rows", "model"), axis_types=(kind, kind)), make_moe()
    x, cotangent = tokens(8, 4)
    mask = jnp.arange(32).reshape(8, 4) % 5 > 0
    expected = compiled(moe, None)(nnx.state(moe), x, mask, cotangent)
    with jax.set_mesh(mesh):
        inputs = jax.device_put((x, mask, cotangent), jax.NamedSharding(mesh, PartitionSpec("rows")))
        params = jax.device_put(nnx.state(moe), jax.NamedSharding(mesh, PartitionSpec()))
        actual = compiled.__wrapped__(moe, None)(params, *inputs)
        (_, (y, _)), _ = actual
        if kind == jax.sharding.AxisType.Explicit:
            assert jax.typeof(y).sharding.spec == PartitionSpec("rows", None, None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize("busy", [(), (5, 2), (0, 1), (7, 6)], ids=lambda busy: "-".join(map(str, busy)) or "random")
def test_experts_without_tokens_and_experts_with_all_of_them(busy):
    moe, (x, cotangent) = make_moe(), tokens(8, 4)
    params = nnx.state(moe)
    if busy:
        x = jnp.abs(x)
        columns = jnp.zeros((WIDTH, 8)).at[:, busy[0]].set(2.0).at[:, busy[1]].set(1.0)
        params = jax.tree.map(lambda p: p, params)
        params["router"]["weight"][...] = columns
    statistics = assert_equal_on_both(moe, partitioning(fsdp=2, expert=4), x, jnp.ones((8, 4), bool), cotangent, params)
    assert not busy or set(np.flatnonzero(statistics.expert_count)) == set(busy)


def test_what_finds_no_room_is_counted_and_the_rest_is_exact():
    """All tokens choose the two experts of one device; it has room for the rows of the first two of four devices."""
    bounded, exact = make_moe(expert_buffer_factor=2.0), make_moe()
    (x, cotangent), mask = tokens(8, 4), jnp.ones((8, 4), bool)
    x = jnp.abs(x)
    params = jax.tree.map(lambda p: p, nnx.state(exact))
    params["router"]["weight"][...] = jnp.zeros((WIDTH, 8)).at[:, 4].set(2.0).at[:, 5].set(1.0)
    (_, (y, statistics)), gradients = compiled(bounded, partitioning(fsdp=2, expert=4))(params, x, mask, cotangent)
    (_, (expected, _)), _ = compiled(exact, None)(params, x, mask, cotangent)
    assert statistics.overflowed == 2 * 16
    assert statistics.dropped == 0
    for group in (0, 4):  # one row of the batch for each device
        np.testing.assert_allclose(y[group : group + 2], expected[group : group + 2], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(y[group + 2 : group + 4], 0.0)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))
    balanced = jax.random.permutation(jax.random.key(4), jnp.eye(8), axis=1)[:WIDTH]
    params["router"]["weight"][...] = balanced
    x = jnp.tile(jnp.eye(WIDTH) + 0.5 * jnp.roll(jnp.eye(WIDTH), 1, axis=1), (4, 1)).reshape(8, 4, WIDTH)
    assert compiled(bounded, partitioning(fsdp=2, expert=4))(params, x, mask, cotangent)[0][1][1].overflowed == 0


P, PER_DEVICE, ROWS, ROOM = 8, 2, 40, 100
SENT, RECEIVED = buffer_rows(ROWS, P), buffer_rows(ROOM, P)


@jax.jit
@functools.partial(
    jax.shard_map,
    mesh=partitioning(expert=4, tensor=2).mesh,
    in_specs=PartitionSpec(("expert", "tensor")),
    out_specs=PartitionSpec(("expert", "tensor")),
    check_vma=False,
)
def there_and_back(group_sizes, rows, cotangent):
    """What each device receives, of which expert; what comes back; the gradient; what stayed behind; the slices."""
    axes = ("expert", "tensor")
    slices, expert, overflowed = agreed_slices(group_sizes[0], ROOM, axes)
    received, pull_back = jax.vjp(lambda rows: exchange(rows, slices, RECEIVED, axes), rows[0])
    back = exchange(received, slices.reversed, SENT, axes)
    (gradient,) = pull_back(cotangent[0])
    return jax.tree.map(lambda array: array[None], (received, expert, back, gradient, overflowed, slices))


@st.composite
def sizes_of_all(draw):
    """Rows that each device has for each expert, at most ROWS together."""
    rows = []
    for _ in range(P):
        chosen = draw(st.lists(st.integers(0, P * PER_DEVICE - 1), max_size=ROWS))
        rows.append(np.bincount(np.asarray(chosen, np.int64), minlength=P * PER_DEVICE))
    return np.asarray(rows, np.int32)


def all_to(expert: int) -> np.ndarray:
    sizes = np.zeros((P, P * PER_DEVICE), np.int32)
    sizes[:, expert] = ROWS
    return sizes


def as_documented(rows, offset, size, to, num_rows: int) -> np.ndarray:
    """What `jax.lax.ragged_all_to_all` promises to do with these arguments, of which row s is device s's."""
    received = np.zeros((P, num_rows, *rows.shape[2:]))
    for source in range(P):
        for there in range(P):
            begin, end = offset[source, there], offset[source, there] + size[source, there]
            received[there, to[source, there] : to[source, there] + end - begin] = rows[source, begin:end]
    return received


@pytest.mark.parametrize("width", [1, 64, 256])
def test_the_exchange_delivers_by_source_and_expert_and_returns(width):
    """Against a loop over devices; rows are numbered from 1. So would the ragged exchange, by its documentation.

    Narrow rows travel together, and bring along what lies behind the last of a slice.
    """
    together = rows_together(4 * width)
    assert together == {1: BLOCK, 64: 2, 256: 1}[width]

    @settings(max_examples=15)
    @given(sizes=sizes_of_all())
    @example(sizes=all_to(0))
    @example(sizes=all_to(P * PER_DEVICE - 1))
    @example(sizes=np.zeros((P, P * PER_DEVICE), np.int32))
    def check(sizes):
        rows, cotangent = (
            sign * (1.0 + np.arange(P * count, dtype=np.float32).reshape(P, count, 1)) * np.ones(width, np.float32)
            for sign, count in ((1, SENT), (-1, RECEIVED))
        )
        expected, gradient = np.zeros((P, RECEIVED, width)), np.zeros((P, SENT, width))
        experts, own, stayed = np.full((P, RECEIVED), PER_DEVICE), np.zeros((P, SENT), bool), np.zeros(P)
        filled, received_rows = np.zeros(P, int), np.zeros(P, int)
        for source in range(P):
            sent = 0
            for there in range(P):
                slice_rows = sizes[source, there * PER_DEVICE : (there + 1) * PER_DEVICE]
                own[source, sent : sent + slice_rows.sum()] = True
                for row, local in enumerate(np.repeat(np.arange(PER_DEVICE), slice_rows)):
                    if received_rows[there] == ROOM:
                        stayed[source] += 1
                        continue
                    received_rows[there] += 1
                    expected[there, filled[there] + row] = rows[source, sent + row]
                    experts[there, filled[there] + row] = local
                    gradient[source, sent + row] = cotangent[there, filled[there] + row]
                sent += blocks(slice_rows.sum())
                filled[there] = blocks(filled[there] + np.count_nonzero(experts[there, filled[there] :] < PER_DEVICE))
        received, own_experts, back, own_gradient, overflowed, slices = jax.tree.map(
            np.asarray, there_and_back(sizes, rows, cotangent)
        )
        np.testing.assert_array_equal(own_experts, experts)
        np.testing.assert_array_equal(overflowed, stayed)
        occupied, returned = experts < PER_DEVICE, (gradient != 0).any(axis=2)
        np.testing.assert_array_equal(received[occupied], expected[occupied])
        np.testing.assert_array_equal(back[returned], rows[returned])
        np.testing.assert_array_equal(own_gradient[returned], gradient[returned])
        if together == 1:
            np.testing.assert_array_equal(received[~occupied], 0)
            np.testing.assert_array_equal(own_gradient[~returned], 0)
        np.testing.assert_array_equal(slices.receive_size, slices.send_size.T)
        wide = slices.together(together)
        there = as_documented(
            rows.reshape(P, -1, together * width), wide.send_offset, wide.send_size, wide.send_to, RECEIVED // together
        )
        np.testing.assert_array_equal(there.reshape(received.shape), received)
        again = as_documented(there, wide.receive_offset, wide.receive_size, wide.receive_from, SENT // together)
        np.testing.assert_array_equal(again.reshape(back.shape), back)

    check()


def test_a_plan_in_blocks_has_each_devices_rows_where_they_are_sent_from():
    """Padding tokens stay behind all others; the rows of an expert keep their order."""
    expert_index = jax.random.randint(jax.random.key(0), (60, 3), 0, 16)
    plan = make_plan(expert_index, 16, mask=jnp.arange(60) % 7 > 0)
    aligned = in_blocks(plan, 4)
    start = np.asarray(aligned.group_offsets)
    np.testing.assert_array_equal(start[::4] % BLOCK, 0)
    size = np.asarray(plan.group_sizes)
    for expert in range(16):
        theirs = slice(plan.group_offsets[expert], plan.group_offsets[expert] + size[expert])
        np.testing.assert_array_equal(aligned.order[start[expert] : start[expert] + size[expert]], plan.order[theirs])
    np.testing.assert_array_equal(aligned.order[aligned.inverse.reshape(-1)], np.arange(180))
    np.testing.assert_array_equal(aligned.inverse >= start[-1], plan.expert == 16)


def test_the_dropless_view_has_room_for_all_that_could_come():
    """As generation needs it: with few tokens at a time, all of them often go to one device."""
    bounded, exact = make_moe(expert_buffer_factor=0.25), make_moe()
    (x, cotangent), mask, params = tokens(8, 4), jnp.ones((8, 4), bool), nnx.state(exact)
    spread = partitioning(fsdp=2, expert=4)
    assert compiled(bounded, spread)(params, x, mask, cotangent)[0][1][1].overflowed > 0
    view = nnx.view(bounded, dropless=True)
    (_, (y, statistics)), _ = compiled(view, spread)(params, x, mask, cotangent)
    (_, (expected, _)), _ = compiled(exact, None)(params, x, mask, cotangent)
    assert statistics.overflowed == 0
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_the_buffer_holds_what_could_come_or_a_multiple_of_the_mean():
    assert received_rows_bound(tokens=16, k=2, num_experts=8, devices=4, factor=None) == 4 * 16 * 2
    assert received_rows_bound(tokens=16, k=8, num_experts=8, devices=4, factor=None) == 4 * 16 * 2
    assert received_rows_bound(tokens=16, k=3, num_experts=8, devices=4, factor=1.25) == 60
    assert received_rows_bound(tokens=16, k=2, num_experts=8, devices=4, factor=100.0) == 4 * 16 * 2
