"""softmax(query · key) · value over the earlier tokens of a row, block by block of queries.

Each block of queries meets only the keys up to its own end, so about half of the score matrix is never computed,
and none of it is kept: the backward pass forms it again from the logsumexp of each query (Dao et al. 2022), with the
keys before the queries, so that two of its three products read it as it lies.

B batch, M key and value heads, R queries per key head, S sequence, Q queries of a block, all R heads of them one
after the other, C keys it meets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import execution

BLOCK = 128
MOST_BLOCKS = 8
MASKED = -1e30
CACHED_SCORES = 2**20
"""Scores of a block up to which rows are taken together on CPU, where the next operation then finds them in the cache:
the backward pass took 33 ms instead of 49 with 8 rows of 8 heads and 512 tokens."""


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Starts and ends of the blocks: of `BLOCK` queries, longer where that would be more than `MOST_BLOCKS`."""
    size = max(BLOCK, math.ceil(length / MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@jax.custom_vjp
def causal_attention(
    query: Float[Array, "B M R S head_dim"],
    key: Float[Array, "B M S head_dim"],
    value: Float[Array, "B M S head_dim"],
    groups: Int[Array, "B S"] | None = None,
) -> Float[Array, "B M R S head_dim"]:
    r"""$\mathrm{softmax}(q k^T / \sqrt{\mathrm{head\_dim}})\, v$ over keys at or before the query in its group.

    Every token sees itself, so no row is empty. Scores, softmax and sums are float32 whatever the arguments are.

    Args:
      query, key, value: rotated already.
      groups: only tokens with equal numbers see each other; None for one group.
    """
    return _forward(query, key, value, groups)[0]


def _forward(query, key, value, groups):
    allowed = _allowed(query, groups)
    output, log_sums = _over_rows(_attend, query, key, value, allowed)
    return output, (query, key, value, groups, output, log_sums)


def _backward(residuals, gradient):
    query, key, value, groups, output, log_sums = residuals
    allowed = [part.swapaxes(2, 3) for part in _allowed(query, groups)]
    return *_over_rows(_gradients, query, key, value, allowed, output, log_sums, gradient), None


causal_attention.defvjp(_forward, _backward)


def _over_rows(function, query, *others):
    """`function` of a few rows at a time on CPU (see `CACHED_SCORES`), of all rows at once elsewhere."""
    batch, heads, repeats, length, _ = query.shape
    scores = heads * repeats * length * max(end - start for start, end in query_blocks(length))
    fitting = [rows for rows in range(1, batch) if batch % rows == 0 and (rows == 1 or rows * scores <= CACHED_SCORES)]
    if execution.platform() != "cpu" or batch * scores <= CACHED_SCORES or not fitting:
        return function(query, *others)
    together = max(fitting)
    parts = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), (query, *others))
    results = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def _attend(query, key, value, allowed):
    """The output, and for each block the logsumexp of its queries, (B, M, 1, R·Q)."""
    outputs, log_sums = [], []
    for (start, end), seen in zip(query_blocks(query.shape[3]), allowed, strict=True):
        part = query[:, :, :, start:end]
        scores = product("bmqh,bmch->bmqc", scaled(heads_in_line(part)), key[:, :, :end])
        highest = jnp.where(seen, scores, MASKED).max(axis=-1, keepdims=True)
        # The choice comes last: one inside an exponential keeps XLA:CPU from computing that in vectors.
        weights = jnp.where(seen, jnp.exp(scores - highest), 0.0)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = product("bmqc,bmch->bmqh", weights.astype(value.dtype), value[:, :, :end])
        outputs.append((mixed / total).astype(query.dtype).reshape(part.shape))
        log_sums.append((highest + jnp.log(total)).swapaxes(2, 3))
    return jnp.concatenate(outputs, axis=3), log_sums


def _gradients(query, key, value, allowed, output, log_sums, gradient):
    """Gradients of query, key and value."""
    length, scale = query.shape[3], query.shape[-1] ** -0.5
    shared = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)
    query_parts, key_parts, value_parts = [], [], []
    for (start, end), seen, log_sum in zip(query_blocks(length), allowed, log_sums, strict=True):
        part, inner, common = (heads_in_line(x[:, :, :, start:end]) for x in (query, gradient, shared))
        part, keys, values = scaled(part), key[:, :, :end], value[:, :, :end]
        scores = product("bmch,bmqh->bmcq", keys, part)
        weights = jnp.where(seen, jnp.exp(scores - log_sum), 0.0)
        weight_gradient = product("bmch,bmqh->bmcq", values, inner)
        score_gradient = (weights * (weight_gradient - common.swapaxes(2, 3))).astype(query.dtype)
        later = ((0, 0), (0, 0), (0, length - end), (0, 0))
        # The transposed operand and result are narrow; XLA:CPU, left alone, makes one slow product of all three.
        turned = jax.lax.optimization_barrier(keys.swapaxes(2, 3))
        moved = jax.lax.optimization_barrier(product("bmhc,bmcq->bmhq", turned, score_gradient))
        moved = scale * moved.swapaxes(2, 3)
        query_parts.append(moved.reshape(query[:, :, :, start:end].shape))
        key_parts.append(jnp.pad(product("bmcq,bmqh->bmch", score_gradient, part), later))
        value_parts.append(jnp.pad(product("bmcq,bmqh->bmch", weights.astype(value.dtype), inner), later))
    return (
        jnp.concatenate(query_parts, axis=3).astype(query.dtype),
        sum(key_parts).astype(key.dtype),
        sum(value_parts).astype(value.dtype),
    )


def product(subscripts: str, left: Array, right: Array) -> Array:
    """`jnp.einsum` summed in float32, whatever the operands are."""
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def heads_in_line(x: Float[Array, "B M R Q n"]) -> Float[Array, "B M RQ n"]:
    """The queries of the R heads that share keys, one after another."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def scaled(query: Array) -> Array:
    """Queries over the root of head_dim: fewer numbers than the scores."""
    return (query * query.shape[-1] ** -0.5).astype(query.dtype)


def _allowed(query: Array, groups: Array | None) -> list[Bool[Array, "B 1 RQ C"]]:
    """Of each block, which keys each query of the R heads may see: rows of the batch may be taken apart."""
    batch, _, repeats, length, _ = query.shape
    masks = []
    for start, end in query_blocks(length):
        allowed = (jnp.arange(start, end)[:, None] >= jnp.arange(end))[None]
        if groups is not None:
            allowed &= groups[:, start:end, None] == groups[:, None, :end]
        allowed = jnp.tile(allowed, (1, repeats, 1))[:, None]
        masks.append(jnp.broadcast_to(allowed, (batch, *allowed.shape[1:])))
    return masks
