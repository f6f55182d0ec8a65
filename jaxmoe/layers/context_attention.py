r"""Causal attention of a sequence that is spread over the devices of the mesh's `context` axis.

A device starts with two neighbouring chunks of the 2C that C devices share, $2i$ and $2i + 1$. Its queries are
exchanged so that it has chunks $i$ and $2C - 1 - i$ of them (zigzag: chunk c meets c + 1 chunks of keys, so that every
device has $2C + 1$ pairs of chunks to compute), keys and values of the whole sequence are gathered (Llama 3, 2024,
section 3.3.2), and the outputs go back to where the queries came from. Nothing outside this module sees another order.

Gathered keys and values are held while one layer computes; the backward pass gathers them again. Per device they are
2·B·S·M·head_dim numbers, and their gradients as many in float32, before each device gets its own part of the sum.

B batch, M key and value heads, R queries per key head, S sequence, C devices, Q = S / C queries of a device, b queries
and keys of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmoe.layers.causal_attention import MASKED, heads_in_line, product, scaled
from jaxmoe.layers.flash_attention import CONTEXT_RESIDUALS, splash

AXIS = "context"
LARGEST_BLOCK = 512
"""Queries and keys whose scores are computed at a time; the largest divisor of a chunk up to it is taken."""


def zigzag_order(devices: int) -> tuple[int, ...]:
    """The chunks of the sequence in the order of the devices that compute them: i and 2C - 1 - i on device i."""
    return tuple(chunk for device in range(devices) for chunk in (device, 2 * devices - 1 - device))


def context_attention(
    kernel: Any | None,
    query: Float[Array, "B M R Q head_dim"],
    key: Float[Array, "B M Q head_dim"],
    value: Float[Array, "B M Q head_dim"],
    groups: Int[Array, "B Q"] | None,
) -> Float[Array, "B M R Q head_dim"]:
    """`causal_attention` of one device's part of the sequence, inside a `shard_map` over the `context` axis.

    Args:
      kernel: of `splash_kernel` in `zigzag_order`, this device's part; None for blocks in plain XLA.
      query, key, value, groups: this device's part, in the order of the sequence.
    """
    policy = jax.checkpoint_policies.save_only_these_names(CONTEXT_RESIDUALS)
    attend = plain_blocks if kernel is None else functools.partial(splash, kernel)
    return jax.checkpoint(functools.partial(_exchanged, attend), policy=policy)(query, key, value, groups)


def _exchanged(attend: Callable[..., Array], query, key, value, groups):
    query_groups = key_groups = None
    if groups is not None:
        query_groups, key_groups = _to_zigzag(groups, 1), _gathered(groups, 1)
    mixed = attend(_to_zigzag(query, 3), _gathered(key, 2), _gathered(value, 2), query_groups, key_groups)
    return _from_zigzag(mixed, 3)


def _gathered(x: Array, axis: int) -> Array:
    return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)


def travels(devices: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From which device to which each even chunk goes for zigzag, and each odd one; both are permutations."""
    owner = {chunk: place // 2 for place, chunk in enumerate(zigzag_order(devices))}
    return tuple([(device, owner[2 * device + parity]) for device in range(devices)] for parity in (0, 1))


def _swapped_on_odd_devices(first: Array, second: Array) -> tuple[Array, Array]:
    """Chunk i is the even one of chunks i and 2C - 1 - i where i is even."""
    is_odd = jax.lax.axis_index(AXIS) % 2 == 1
    return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)


def _to_zigzag(x: Array, axis: int) -> Array:
    routes = travels(jax.lax.axis_size(AXIS))
    even_odd = [jax.lax.ppermute(part, AXIS, route) for part, route in zip(jnp.split(x, 2, axis), routes, strict=True)]
    return jnp.concatenate(_swapped_on_odd_devices(*even_odd), axis)


def _from_zigzag(x: Array, axis: int) -> Array:
    even_odd = _swapped_on_odd_devices(*jnp.split(x, 2, axis))
    returned = [
        jax.lax.ppermute(part, AXIS, [(there, here) for here, there in route])
        for part, route in zip(even_odd, travels(jax.lax.axis_size(AXIS)), strict=True)
    ]
    return jnp.concatenate(returned, axis)


@jax.custom_vjp
def plain_blocks(
    query: Float[Array, "B M R Q head_dim"],
    key: Float[Array, "B M S head_dim"],
    value: Float[Array, "B M S head_dim"],
    query_groups: Int[Array, "B Q"] | None,
    key_groups: Int[Array, "B S"] | None,
) -> Float[Array, "B M R Q head_dim"]:
    """Attention of this device's two chunks of queries, in zigzag order, to all keys up to their own.

    One block of queries after the other meets one block of keys after the other, up to its own position (Dao et al.
    2022); scores are float32.
    """
    return _forward(query, key, value, query_groups, key_groups)[0]


def _forward(query, key, value, query_groups, key_groups):
    blocks = _Blocks(query.shape[3], query.shape[2], query_groups, key_groups)

    def attend(index: Array) -> tuple[Array, Array]:
        part = scaled(heads_in_line(blocks.of(query, index)))

        def meet(other: Array, carry):
            mixed, highest, total = carry
            scores = product("bmqh,bmch->bmqc", part, blocks.of(key, other))
            scores = jnp.where(blocks.allowed(index, other), scores, MASKED)
            higher = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - higher), jnp.exp(highest - higher)
            new = product("bmqc,bmch->bmqh", weights.astype(value.dtype), blocks.of(value, other))
            return kept * mixed + new, higher, kept * total + weights.sum(axis=-1, keepdims=True)

        one = jnp.zeros((*part.shape[:-1], 1), jnp.float32)
        start = jnp.zeros(part.shape, jnp.float32), one + MASKED, one
        mixed, highest, total = jax.lax.fori_loop(0, blocks.met(index), meet, start)
        return (mixed / total).astype(query.dtype), highest + jnp.log(total)

    outputs, log_sums = jax.lax.map(attend, jnp.arange(blocks.count))
    output = checkpoint_name(blocks.joined(outputs), CONTEXT_RESIDUALS)
    log_sums = checkpoint_name(log_sums, CONTEXT_RESIDUALS)
    return output, (query, key, value, query_groups, key_groups, output, log_sums)


def _backward(residuals, gradient):
    query, key, value, query_groups, key_groups, output, log_sums = residuals
    blocks = _Blocks(query.shape[3], query.shape[2], query_groups, key_groups)
    shared = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)

    def gradients(sums, scanned):
        index, log_sum = scanned
        part, inner, common = (heads_in_line(blocks.of(x, index)) for x in (query, gradient, shared))
        part = scaled(part)

        def meet(other: Array, carry):
            query_gradient, key_gradient, value_gradient = carry
            keys = blocks.of(key, other)
            weights = jnp.exp(product("bmqh,bmch->bmqc", part, keys) - log_sum)
            weights = jnp.where(blocks.allowed(index, other), weights, 0.0)
            weight_gradient = product("bmqh,bmch->bmqc", inner, blocks.of(value, other))
            score_gradient = (weights * (weight_gradient - common)).astype(query.dtype)
            return (
                query_gradient + product("bmqc,bmch->bmqh", score_gradient, keys),
                blocks.added(key_gradient, other, product("bmqc,bmqh->bmch", score_gradient, part)),
                blocks.added(value_gradient, other, product("bmqc,bmqh->bmch", weights.astype(value.dtype), inner)),
            )

        start = jnp.zeros(part.shape, jnp.float32), *sums
        query_gradient, *sums = jax.lax.fori_loop(0, blocks.met(index), meet, start)
        return tuple(sums), (query_gradient * query.shape[-1] ** -0.5).astype(query.dtype)

    sums = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    sums, query_gradients = jax.lax.scan(gradients, sums, (jnp.arange(blocks.count), log_sums))
    key_gradient, value_gradient = (x.astype(like.dtype) for x, like in zip(sums, (key, value), strict=True))
    return blocks.joined(query_gradients), key_gradient, value_gradient, None, None


plain_blocks.defvjp(_forward, _backward)


class _Blocks:
    """The blocks of one device's queries and of all keys."""

    def __init__(self, length: int, repeats: int, query_groups: Array | None, key_groups: Array | None):
        chunk = length // 2
        self.size = max(size for size in range(1, min(chunk, LARGEST_BLOCK) + 1) if chunk % size == 0)
        self.count = length // self.size
        self.repeats = repeats
        self.groups = query_groups, key_groups
        device, devices = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
        per_chunk = self.count // 2
        first = jnp.stack([device, 2 * devices - 1 - device]) * per_chunk
        self.place = (first[:, None] + jnp.arange(per_chunk)).reshape(-1)

    def of(self, x: Array, index: Array) -> Array:
        """A block of an array with the sequence as its last axis but one."""
        return jax.lax.dynamic_slice_in_dim(x, index * self.size, self.size, x.ndim - 2)

    def added(self, total: Array, index: Array, part: Array) -> Array:
        """`total` with `part` added to one of its blocks."""
        return jax.lax.dynamic_update_slice_in_dim(total, self.of(total, index) + part, index * self.size, 2)

    def met(self, index: Array) -> Array:
        """How many blocks of keys a block of queries meets: those up to its own."""
        return self.place[index] + 1

    def allowed(self, index: Array, other: Array) -> Array:
        """(#B, 1, R·b, b): which keys of a block each query of a block may see."""
        line = jnp.arange(self.size)
        visible = (self.place[index] * self.size + line)[:, None] >= other * self.size + line
        visible = visible[None]
        if self.groups[0] is not None:
            ours, theirs = (self.of(x[..., None], i)[..., 0] for x, i in zip(self.groups, (index, other), strict=True))
            visible = visible & (ours[:, :, None] == theirs[:, None])
        return jnp.tile(visible, (1, self.repeats, 1))[:, None]

    def joined(self, parts: Array) -> Array:
        """(count, B, M, R·b, head_dim) as (B, M, R, Q, head_dim)."""
        count, batch, heads, _, width = parts.shape
        parts = parts.reshape(count, batch, heads, self.repeats, self.size, width)
        return jnp.moveaxis(parts, 0, 3).reshape(batch, heads, self.repeats, count * self.size, width)
