"""The language-model loss, without ever holding all logits.

B batch, S sequence, D width, V vocabulary, C positions of a row in one chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe.accounting import LOSS_CHUNK_LOGITS
from jaxmoe.config import MESH_AXES
from jaxmoe.layers.expert_parallel import TokenSplit
from jaxmoe.sharding import Partitioning, partitioning_in_use
from pallas_kernels import execution

LOSS_CHUNK_TOKENS = 1024
"""Tokens of a chunk on TPU and GPU, at least: with few, the head's gradient is read and written for little work."""


def token_nll(logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """Negative log-likelihood of each target in nats, float32. Its gradient scatters nothing."""
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - _target_logits(logits, targets)


def language_model_loss(
    hidden: Float[Array, "B S D"],
    head_weight: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    loss_weights: Float[Array, "B S"],
    *,
    chunk_logits: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
    """Cross-entropy of final hidden states, chunk by chunk over the sequence.

    When differentiated, each chunk's gradient is formed while its logits are there, so they are computed once
    and never kept: three matrix products in all, and memory for one chunk.

    Args:
      hidden: of `Decoder.hidden`; the head's products are in its dtype, accumulated in float32.
      head_weight: of `Decoder.head_weight`.
      targets: the next tokens, each in [0, V).
      loss_weights: of every target; 0 on padding. Not differentiated.
      chunk_logits: bound on the logits that a device holds at a time; None: `LOSS_CHUNK_LOGITS`, and on TPU and GPU
        those of `LOSS_CHUNK_TOKENS` tokens if they are more.

    Returns:
      Sum of weight · nll (divide it by the sum of weights for the loss); and the nll of each token in nats,
      which carries no gradient.
    """
    loss_weights = loss_weights.astype(jnp.float32)
    with jax.named_scope("language_model_loss"):
        partitioning = partitioning_in_use()
        if partitioning is None:
            total, nll = _loss(hidden, head_weight, targets, loss_weights, chunk_logits)
        else:
            total, nll = _spread_loss(hidden, head_weight, targets, loss_weights, chunk_logits, partitioning)
    return total, jax.lax.stop_gradient(nll)


def _chunk_length(batch: int, length: int, vocabulary: int, chunk_logits: int | None) -> int:
    """C: positions of each row in one chunk; the last chunk may be shorter."""
    if chunk_logits is None:
        chunk_logits = LOSS_CHUNK_LOGITS
        if execution.platform() != "cpu":
            chunk_logits = max(chunk_logits, LOSS_CHUNK_TOKENS * vocabulary)
    chunks = min(length, max(1, math.ceil(batch * length * vocabulary / chunk_logits)))
    return math.ceil(length / chunks)


def _target_logits(logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    vocabulary = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    return jnp.sum(jnp.where(targets[..., None] == vocabulary, logits, 0.0), axis=-1)


def _chunked(x: Array, chunk: int) -> Array:
    """(B, S, ...) as (S / C, B, C, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _unchunked(x: Array) -> Array:
    """(S / C, B, C, ...) as (B, S, ...)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _logits(hidden: Array, weight: Array) -> Array:
    return jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)


def _chunks_of(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Arrays (B, S, ...) as (S / C, B, C, ...), zeros after the end."""
    padding = -arrays[0].shape[1] % chunk
    if padding:
        arrays = tuple(jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in arrays)
    return tuple(_chunked(x, chunk) for x in arrays)


def _loss_alone(
    hidden: Float[Array, "B S D"],
    weight: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    loss_weights: Float[Array, "B S"],
    chunk_logits: int | None,
) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
    """Sum of weight · nll, and nll."""
    batch, length, _ = hidden.shape

    def step(_, part):
        hidden, targets = part
        return None, token_nll(_logits(hidden, weight), targets)

    chunk = _chunk_length(batch, length, weight.shape[1], chunk_logits)
    _, nll = jax.lax.scan(step, None, _chunks_of(chunk, hidden, targets))
    nll = _unchunked(nll)[:, :length]
    return jnp.sum(loss_weights * nll), nll


def _loss_and_gradients(
    hidden: Float[Array, "B S D"],
    weight: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    loss_weights: Float[Array, "B S"],
    chunk_logits: int | None,
) -> tuple[Float[Array, ""], Float[Array, "B S"], Float[Array, "B S D"], Float[Array, "D V"]]:
    """Sum of weight · nll, nll, and the sum's gradients: of hidden in its dtype, of the head in float32."""
    batch, length, _ = hidden.shape
    vocabulary = jnp.arange(weight.shape[1], dtype=targets.dtype)

    def step(weight_gradient, part):
        hidden, targets, loss_weights = part
        logits = _logits(hidden, weight)
        highest = logits.max(axis=-1, keepdims=True)
        exponential = jnp.exp(logits - highest)
        total = exponential.sum(axis=-1, keepdims=True)
        chosen = targets[..., None] == vocabulary
        nll = (jnp.log(total) + highest)[..., 0] - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
        scale = loss_weights[..., None]
        gradient = (exponential * (scale / total) - jnp.where(chosen, scale, 0.0)).astype(hidden.dtype)
        hidden_gradient = jnp.einsum("bcv,dv->bcd", gradient, weight)
        added = jnp.einsum("bcd,bcv->dv", hidden, gradient, preferred_element_type=jnp.float32)
        return weight_gradient + added, (nll, hidden_gradient)

    chunk = _chunk_length(batch, length, weight.shape[1], chunk_logits)
    parts = _chunks_of(chunk, hidden, targets, loss_weights)
    if parts[0].shape[0] == 1:
        weight_gradient, (nll, hidden_gradient) = step(0.0, tuple(x[0] for x in parts))
        nll, hidden_gradient = nll[None], hidden_gradient[None]
    else:
        weight_gradient, (nll, hidden_gradient) = jax.lax.scan(step, jnp.zeros(weight.shape, jnp.float32), parts)
    nll, hidden_gradient = (_unchunked(x)[:, :length] for x in (nll, hidden_gradient))
    return jnp.sum(loss_weights * nll), nll, hidden_gradient, weight_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(hidden, head_weight, targets, loss_weights, chunk_logits):
    return _loss_alone(hidden, head_weight.astype(hidden.dtype), targets, loss_weights, chunk_logits)


def _loss_forward(hidden, head_weight, targets, loss_weights, chunk_logits):
    total, nll, hidden_gradient, weight_gradient = _loss_and_gradients(
        hidden, head_weight.astype(hidden.dtype), targets, loss_weights, chunk_logits
    )
    return (total, nll), (hidden_gradient, weight_gradient.astype(head_weight.dtype))


def _loss_backward(chunk_logits, residuals, gradients):
    return _scaled(residuals, gradients)


def _scaled(residuals: tuple[Array, Array], gradients: tuple[Array, Array]) -> tuple[Array, Array, None, None]:
    """Gradients of the sum, times that of what is made of it."""
    scale, _ = gradients
    hidden_gradient, weight_gradient = residuals
    return (
        (hidden_gradient * scale).astype(hidden_gradient.dtype),
        weight_gradient * scale.astype(weight_gradient.dtype),
        None,
        None,
    )


_loss.defvjp(_loss_forward, _loss_backward)


# ------------------------------------------------------------------------------------------------------- on a mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _spread_loss(hidden, head_weight, targets, loss_weights, chunk_logits, partitioning):
    """`_loss` of tokens that are divided among all devices, each with the whole head while it lasts.

    The head is exchanged once and its gradient summed once; left to XLA, both happen in every chunk.
    """

    def local(hidden, weight, targets, loss_weights):
        total, nll = _loss_alone(hidden, weight, targets, loss_weights, chunk_logits)
        return jax.lax.psum(total, MESH_AXES), nll

    return _on_mesh(local, partitioning, hidden, head_weight, targets, loss_weights, gradients=False)


def _spread_forward(hidden, head_weight, targets, loss_weights, chunk_logits, partitioning):
    def local(hidden, weight, targets, loss_weights):
        total, *rest = _loss_and_gradients(hidden, weight, targets, loss_weights, chunk_logits)
        return jax.lax.psum(total, MESH_AXES), *rest

    total, nll, hidden_gradient, weight_gradient = _on_mesh(
        local, partitioning, hidden, head_weight, targets, loss_weights, gradients=True
    )
    return (total, nll), (hidden_gradient, weight_gradient.astype(head_weight.dtype))


def _spread_backward(chunk_logits, partitioning, residuals, gradients):
    return _scaled(residuals, gradients)


_spread_loss.defvjp(_spread_forward, _spread_backward)


def _on_mesh(
    local: Callable[..., tuple[Array, ...]],
    partitioning: Partitioning,
    hidden: Float[Array, "B S D"],
    head_weight: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    loss_weights: Float[Array, "B S"],
    *,
    gradients: bool,
) -> tuple[Array, ...]:
    """`local` on the tokens of each device: total, nll and, with `gradients`, those of hidden and of the head."""
    split = TokenSplit.of(partitioning, targets.shape)
    weight_spec = partitioning.spec(("width", "vocabulary"), head_weight.shape)
    kept = tuple(axis for axes in weight_spec for axis in axes or ())

    def on_device(hidden, weight, targets, loss_weights):
        weight = weight.astype(hidden.dtype)
        for dimension, axes in enumerate(weight_spec):
            weight = jax.lax.all_gather(weight, axes, axis=dimension, tiled=True) if axes else weight
        tokens = (hidden, targets, loss_weights)
        rows = tokens if split.by_sequence else tuple(x[None] for x in tokens)
        total, *of_tokens = local(rows[0], weight, *rows[1:])
        weight_gradient = [of_tokens.pop()] if gradients else []
        of_tokens = of_tokens if split.by_sequence else [x[0] for x in of_tokens]
        return total, *of_tokens, *map(summed, weight_gradient)

    def summed(gradient):
        for dimension, axes in enumerate(weight_spec):
            if axes:
                gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(gradient, tuple(axis for axis in MESH_AXES if axis not in kept))

    results = jax.shard_map(
        on_device,
        mesh=partitioning.mesh,
        in_specs=(split.spec, weight_spec, split.spec, split.spec),
        out_specs=(PartitionSpec(), split.spec, *((split.spec, weight_spec) if gradients else ())),
        check_vma=False,
    )(split.cut(hidden), head_weight, split.cut(targets), split.cut(loss_weights))
    total, nll, *rest = results
    if gradients:
        rest[0] = split.joined(rest[0])
    return total, split.joined(nll), *rest
