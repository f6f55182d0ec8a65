"""Expert parallelism inside `shard_map`: tokens travel to the devices of their experts, and back.

Every device of a mesh has tokens of its own in a routed layer. The experts are divided among the devices of an expert
group, E/P for each; each group of the mesh has all of them.

T tokens of one device, D width, E experts, K experts per token, N = T·K rows to send; P devices of an expert group,
M rows of the buffer in which it receives.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

import pallas_kernels
from jaxmoe.config import MESH_AXES
from jaxmoe.layers.exchange import Axes, Slices, blocks, buffer_rows, exchange
from jaxmoe.sharding import Partitioning
from pallas_kernels.gather import take

_BATCH_AXES = ("data", "fsdp", "expert")
_SEQUENCE_AXES = ("context", "tensor")


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """How the tokens of a batch are divided among all devices of a mesh.

    Where both divide, the batch goes over `data`, `fsdp` and `expert` and the sequence over `context` and `tensor`.
    Otherwise, as when one token of each sequence is decoded, tokens are taken one by one, and padded to as many as
    divide.

    Attributes:
      leading: axes of the tokens, without D.
      spec: of the divided array, without D.
      padding: tokens added at the end.
    """

    leading: tuple[int, ...]
    spec: PartitionSpec
    padding: int

    @classmethod
    def of(cls, partitioning: Partitioning, leading: tuple[int, ...]) -> TokenSplit:
        """The split of tokens with these leading axes."""
        if len(leading) == 2:
            batch, sequence = leading
            if batch % partitioning.size(*_BATCH_AXES) == 0 and sequence % partitioning.size(*_SEQUENCE_AXES) == 0:
                return cls(leading, PartitionSpec(_BATCH_AXES, _SEQUENCE_AXES), 0)
        padding = -math.prod(leading) % partitioning.size(*MESH_AXES)
        return cls(leading, PartitionSpec(MESH_AXES), padding)

    @property
    def by_sequence(self) -> bool:
        """Whether the array that is divided has its batch and its sequence."""
        return len(self.spec) == 2

    @property
    def axes(self) -> tuple[Axes, Axes]:
        """The mesh axes of the batch, or of the tokens one by one, and those of the sequence."""
        return self.spec[0], self.spec[1] if self.by_sequence else ()

    def cut(self, array: Shaped[Array, "*tokens *D"]) -> Shaped[Array, "*cut *D"]:
        """The array that `spec` divides; what is padded is zero."""
        if self.by_sequence:
            return array
        width = array.shape[len(self.leading) :]
        return jnp.pad(array.reshape(-1, *width), ((0, self.padding), *((0, 0) for _ in width)))

    def joined(self, array: Shaped[Array, "*cut *D"]) -> Shaped[Array, "*tokens *D"]:
        """The inverse of `cut`."""
        if self.by_sequence:
            return array
        return array[: array.shape[0] - self.padding].reshape(*self.leading, *array.shape[1:])


def expert_axes(partitioning: Partitioning, num_experts: int) -> Axes:
    """The mesh axes over which E experts are spread, those with more than one device; none: no token travels."""
    (axes,) = partitioning.spec(("experts",), (num_experts,))
    return axes or ()


def whole_experts(weights: Float[Array, "experts ..."], spec: PartitionSpec) -> Float[Array, "experts ..."]:
    """The device's experts whole, from their parts along `fsdp`. Its gradient is summed and scattered."""
    for dimension, axes in enumerate(spec):
        if dimension > 0 and axes:
            weights = jax.lax.all_gather(weights, axes, axis=dimension, tiled=True)
    return weights


def received_rows_bound(tokens: int, k: int, num_experts: int, devices: int, factor: float | None) -> int:
    """Rows for which a device of an expert group has room.

    Args:
      tokens: T.
      k: K.
      num_experts: E.
      devices: P.
      factor: these rows over the mean, T·K; None: the most that could come, all tokens of the group with as many of
        their choices as the device has experts.
    """
    worst = devices * tokens * min(k, num_experts // devices)
    return worst if factor is None else min(worst, math.ceil(factor * tokens * k))


def routed_mlp(
    x: Float[Array, "T D"],
    gate: Float[Array, "T K"],
    plan: pallas_kernels.Plan,
    gate_up: Float[Array, "local D F2"],
    down: Float[Array, "local F D"],
    *,
    axes: Axes,
    buffer_factor: float | None,
    backend: str,
) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
    """`pallas_kernels.moe_mlp` with the experts of the whole group.

    Gates travel with their tokens, and rows come back weighted: the gradients of the gates are then made where the
    hidden layer is, and neither are the returned rows kept for them, nor, with `remat`, the rows returned again.

    Args:
      x: the device's tokens.
      gate: as routed.
      plan: over all E.
      gate_up, down: the device's experts.
      axes: of the expert group; none: every device has all experts.
      buffer_factor: as `expert_buffer_factor` of `jaxmoe.config.MoEConfig`.
      backend: of `pallas_kernels`.

    Returns:
      The outputs, and how many of the device's assignments found no room: they add nothing to the outputs.
    """
    if not axes:
        y = pallas_kernels.moe_mlp(x, plan.expert, gate, gate_up, down, plan=plan, backend=backend)
        return y, jnp.zeros((), jnp.float32)
    tokens, k = gate.shape
    devices = jax.lax.axis_size(axes)
    room = received_rows_bound(tokens, k, plan.num_experts, devices, buffer_factor)
    with jax.named_scope("sizes"):
        slices, local_expert, overflowed = agreed_slices(plan.group_sizes, room, axes)
    buffer = local_expert.shape[0]
    with jax.named_scope("send"):
        plan = in_blocks(plan, devices)
        rows = pallas_kernels.dispatch(x, plan, backend=backend)
        received = exchange(rows, slices, buffer, axes)
        with jax.named_scope("gates"):
            row_gate = exchange(_in_order(gate.astype(jnp.float32), plan), slices, buffer, axes)
    with jax.named_scope("experts"):
        outputs = pallas_kernels.moe_mlp(
            received, local_expert[:, None], row_gate[:, None], gate_up, down, backend=backend
        )
    with jax.named_scope("return"):
        returned = exchange(outputs, slices.reversed, rows.shape[0], axes)
        y = pallas_kernels.combine(returned, plan, None, backend=backend)
    return y, overflowed


def halves(
    x: Float[Array, "T D"],
    gate: Float[Array, "T K"],
    plan: pallas_kernels.Plan,
    gate_up: Float[Array, "local D F2"],
    down: Float[Array, "local F D"],
    **settings: Any,
) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
    """`routed_mlp` of the first tokens and of the others, neither waiting for the other. Arguments are the same."""
    middle = x.shape[0] // 2
    parts = []
    for part in (slice(0, middle), slice(middle, None)) if middle else (slice(None),):
        own = pallas_kernels.make_plan(plan.expert[part], plan.num_experts)
        parts.append(routed_mlp(x[part], gate[part], own, gate_up, down, **settings))
    outputs, overflowed = zip(*parts, strict=True)
    return jnp.concatenate(outputs), sum(overflowed)


def compiler_options(partitioning: Partitioning) -> dict[str, str]:
    """What lets exchanges run beside products: XLA:TPU (libtpu 0.0.42) makes them wait for each other unless told."""
    on_tpu = partitioning.mesh.devices.flat[0].platform == "tpu"
    return {"xla_tpu_enable_async_ragged_all_to_all": "true"} if on_tpu else {}


def agreed_slices(
    group_sizes: Int[Array, " E"], room: int, axes: Axes
) -> tuple[Slices, Int[Array, " M"], Float[Array, ""]]:
    """What this device sends and receives, from the sizes of all, which are all that is exchanged for it.

    What comes from the first device comes first, each device's rows by expert; what finds no room stays behind.

    Args:
      group_sizes: this device's rows of each expert, which lie as `in_blocks` has them.
      room: rows that a device may receive.
      axes: of the expert group.

    Returns:
      The slices; the expert of each received row among this device's, E/P for the rows that nobody fills; how many
      rows of this device stay behind.
    """
    devices, here = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    sizes = jax.lax.all_gather(group_sizes, axes).reshape(devices, devices, -1)  # from, to, expert there
    between = sizes.sum(axis=2)
    taken = jnp.clip(room - (jnp.cumsum(between, axis=0) - between), 0, between)
    start_here = jnp.cumsum(blocks(between), axis=1) - blocks(between)
    end_there = jnp.cumsum(blocks(taken), axis=0)
    start_there = end_there - blocks(taken)
    slices = Slices(
        send_offset=start_here[here],
        send_size=taken[here],
        send_to=start_there[here],
        receive_offset=start_there[:, here],
        receive_size=taken[:, here],
        receive_from=start_here[:, here],
    )
    ends = jnp.minimum(jnp.cumsum(sizes[:, here], axis=1), taken[:, here, None]) + start_there[:, here, None]
    ends = jnp.concatenate([ends, end_there[:, here, None]], axis=1)  # of each expert's rows and those of nobody
    row = jnp.arange(buffer_rows(room, devices), dtype=jnp.int32)
    segment = jnp.searchsorted(ends.reshape(-1), row, side="right", method="compare_all").astype(jnp.int32)
    local = sizes.shape[2]
    expert = jnp.where(segment < devices * (local + 1), segment % (local + 1), local)
    return slices, expert, jnp.sum(between[here] - taken[here]).astype(jnp.float32)


def in_blocks(plan: pallas_kernels.Plan, devices: int) -> pallas_kernels.Plan:
    """The plan with the rows of each device of the group from a multiple of `exchange.BLOCK` on.

    The rows between are counted to the expert before them and hold copies of tokens; nobody reads them.
    """
    device = jnp.arange(devices, dtype=jnp.int32)
    per_device = plan.num_experts // devices
    size = jnp.diff(plan.group_offsets[::per_device])
    filling = blocks(size) - size
    end = jnp.cumsum(blocks(size))

    def shift(expert: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(expert[..., None] >= (device + 1) * per_device, filling, 0), axis=-1)

    rows = buffer_rows(plan.num_rows, devices)
    row = jnp.arange(rows, dtype=jnp.int32)
    place = row - jnp.sum(jnp.where(row[:, None] >= end, filling, 0), axis=1)
    offsets = plan.group_offsets + shift(jnp.arange(plan.num_experts + 1, dtype=jnp.int32))
    return dataclasses.replace(
        plan,
        order=take(jnp.pad(plan.order, (0, rows - plan.num_rows)), place),
        inverse=plan.inverse + shift(plan.expert),
        group_sizes=jnp.diff(offsets),
        group_offsets=offsets,
    )


@jax.custom_vjp
def _in_order(gate: Float[Array, "T K"], plan: pallas_kernels.Plan) -> Float[Array, " N"]:
    """Gates in the plan's order. The gradient is a gather, too."""
    return take(gate.reshape(-1), plan.order)


def _in_order_forward(gate, plan):
    return _in_order(gate, plan), plan


def _in_order_backward(plan, gradient):
    return jnp.where(plan.inverse < plan.group_offsets[-1], take(gradient, plan.inverse), 0), None


_in_order.defvjp(_in_order_forward, _in_order_backward)


def within_capacity(
    plan: pallas_kernels.Plan, capacity: int, split: TokenSplit, rows: int
) -> tuple[Int[Array, "T K"], Float[Array, ""]]:
    """Which assignments a capacity keeps that counts the tokens of all devices, in the order of the whole batch.

    Args:
      plan: of the device's tokens, without a limit.
      capacity: C, the most rows one expert takes.
      split: of the tokens.
      rows: of the device, where sequences are divided: what lies between two tokens of another device.

    Returns:
      The experts, E for an assignment that is dropped or was of no expert; how many of the device's are dropped.
    """
    batch_axes, sequence_axes = split.axes
    blocks = rows if sequence_axes else 1
    expert = plan.expert.reshape(blocks, -1)
    count = jnp.sum(expert[:, :, None] == jnp.arange(plan.num_experts, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    everywhere = jax.lax.all_gather(count[None, :, None], batch_axes, axis=0, tiled=True)
    if sequence_axes:
        everywhere = jax.lax.all_gather(everywhere, sequence_axes, axis=2, tiled=True)
    before = jnp.cumsum(everywhere.reshape(-1, plan.num_experts), axis=0).reshape(everywhere.shape) - everywhere
    part = jax.lax.axis_index(sequence_axes) if sequence_axes else 0
    elsewhere = before[jax.lax.axis_index(batch_axes), :, part] - (jnp.cumsum(count, axis=0) - count)
    of_none = plan.expert == plan.num_experts
    place = plan.inverse - plan.group_offsets[plan.expert]
    place += jnp.take_along_axis(elsewhere, expert, axis=1, mode="clip").reshape(place.shape)
    dropped = (place >= capacity) & ~of_none
    return jnp.where(dropped, plan.num_experts, plan.expert), jnp.sum(dropped, dtype=jnp.float32)
