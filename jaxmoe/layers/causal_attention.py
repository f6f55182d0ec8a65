"""softmax(query · key) · value over the earlier tokens of a row, block by block of queries.

Each block of queries meets only the keys up to its own end, so about half of the score matrix is never computed,
and none of it is kept: the backward pass forms it again from the logsumexp of each query (Dao et al. 2022).

B batch, M key and value heads, R queries per key head, S sequence, Q queries of a block, C keys it meets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128
MOST_BLOCKS = 8
MASKED = -1e30


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
    outputs, log_sums = [], []
    for start, end in query_blocks(query.shape[3]):
        scores = jnp.where(_allowed(groups, start, end), _scores(query, key, start, end), MASKED)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = _product("bmrqc,bmch->bmrqh", weights.astype(value.dtype), value[:, :, :end])
        outputs.append((mixed / total).astype(query.dtype))
        log_sums.append(highest + jnp.log(total))
    output = jnp.concatenate(outputs, axis=3)
    return output, (query, key, value, groups, output, log_sums)


def _backward(residuals, gradient):
    query, key, value, groups, output, log_sums = residuals
    length, scale = query.shape[3], query.shape[-1] ** -0.5
    shared = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)
    query_parts, key_parts, value_parts = [], [], []
    for (start, end), log_sum in zip(query_blocks(length), log_sums, strict=True):
        scores = _scores(query, key, start, end)
        weights = jnp.where(_allowed(groups, start, end), jnp.exp(scores - log_sum), 0.0)
        inner = gradient[:, :, :, start:end]
        weight_gradient = _product("bmrqh,bmch->bmrqc", inner, value[:, :, :end])
        score_gradient = weights * (weight_gradient - shared[:, :, :, start:end]) * scale
        weights, score_gradient = weights.astype(value.dtype), score_gradient.astype(query.dtype)
        later = ((0, 0), (0, 0), (0, length - end), (0, 0))
        query_parts.append(_product("bmrqc,bmch->bmrqh", score_gradient, key[:, :, :end]))
        key_parts.append(jnp.pad(_product("bmrqc,bmrqh->bmch", score_gradient, query[:, :, :, start:end]), later))
        value_parts.append(jnp.pad(_product("bmrqc,bmrqh->bmch", weights, inner), later))
    return (
        jnp.concatenate(query_parts, axis=3).astype(query.dtype),
        sum(key_parts).astype(key.dtype),
        sum(value_parts).astype(value.dtype),
        None,
    )


causal_attention.defvjp(_forward, _backward)


def _product(subscripts: str, left: Array, right: Array) -> Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _scores(query: Array, key: Array, start: int, end: int) -> Float[Array, "B M R Q C"]:
    scores = _product("bmrqh,bmch->bmrqc", query[:, :, :, start:end], key[:, :, :end])
    return scores * query.shape[-1] ** -0.5


def _allowed(groups: Array | None, start: int, end: int) -> Bool[Array, "#B 1 1 Q C"]:
    """Which of keys 0..end-1 each of queries start..end-1 may see."""
    causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    if groups is None:
        return causal[None, None, None]
    return (causal & (groups[:, start:end, None] == groups[:, None, :end]))[:, None, None]
