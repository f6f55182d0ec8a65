"""The language-model loss, without ever holding all logits.

B batch, S sequence, D width, V vocabulary, C positions of a row in one chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe.accounting import LOSS_CHUNK_LOGITS
from jaxmoe.sharding import Partitioning, gathered, partitioning_in_use
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
            chunk = _chunk_length(*hidden.shape[:2], head_weight.shape[1], chunk_logits)
            hidden, padded_targets, loss_weights = _padded(chunk, hidden, targets, loss_weights)
            total, nll = _chunked_loss(hidden, head_weight, padded_targets, loss_weights, chunk)
        else:
            total, nll = _spread_loss(hidden, head_weight, targets, loss_weights, chunk_logits, partitioning)
    return total, jax.lax.stop_gradient(nll[:, : targets.shape[1]])


def _chunk_length(rows: int, length: int, vocabulary: int, chunk_logits: int | None) -> int:
    """C, from the sizes on one device."""
    if chunk_logits is None:
        least = 0 if execution.platform() == "cpu" else LOSS_CHUNK_TOKENS * vocabulary
        chunk_logits = max(LOSS_CHUNK_LOGITS, least)
    chunks = min(length, max(1, math.ceil(rows * length * vocabulary / chunk_logits)))
    return math.ceil(length / chunks)


def _padded(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """(B, S, ...) arrays with zeros up to a whole number of chunks."""
    length = arrays[0].shape[1]
    padding = chunk * math.ceil(length / chunk) - length
    if not padding:
        return arrays
    return tuple(jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in arrays)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked_loss(hidden, head_weight, targets, loss_weights, chunk):
    nll = _losses(hidden, head_weight.astype(hidden.dtype), targets, chunk)
    return jnp.sum(loss_weights * nll), nll


def _chunked_loss_forward(hidden, head_weight, targets, loss_weights, chunk):
    weight = head_weight.astype(hidden.dtype)
    nll, hidden_gradient, weight_gradient = _losses_and_gradients(hidden, weight, targets, loss_weights, chunk)
    residuals = (hidden_gradient, weight_gradient.astype(head_weight.dtype))
    return (jnp.sum(loss_weights * nll), nll), residuals


def _chunked_loss_backward(_, residuals, gradients):
    scale, _ = gradients
    hidden_gradient, weight_gradient = residuals
    return (
        (hidden_gradient * scale).astype(hidden_gradient.dtype),
        weight_gradient * scale.astype(weight_gradient.dtype),
        None,
        None,
    )


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)


def _losses(hidden, weight, targets, chunk, axes=()):
    """The nll of every token, chunk by chunk; `axes` are those of the mesh over which the vocabulary is spread."""

    def step(_, part):
        hidden, targets = part
        logits = _logits(hidden, weight)
        if not axes:
            return None, token_nll(logits, targets)
        return None, _softmax_parts(logits, targets, vocabulary, axes)[-1]

    vocabulary = _numbers(weight.shape[1], targets.dtype, axes)
    _, nll = jax.lax.scan(step, None, (_chunked(hidden, chunk), _chunked(targets, chunk)))
    return _unchunked(nll)


def _losses_and_gradients(hidden, weight, targets, loss_weights, chunk, axes=()):
    """`_losses`, and the gradients of their weighted sum: of hidden in its dtype, of the weight in float32.

    Where devices hold different tokens, the latter is of their own.
    """
    vocabulary = _numbers(weight.shape[1], targets.dtype, axes)

    def step(weight_gradient, part):
        hidden, targets, loss_weights = part
        logits = _logits(hidden, weight)
        exponential, total, chosen, nll = _softmax_parts(logits, targets, vocabulary, axes)
        scale = loss_weights[..., None]
        gradient = (exponential * (scale / total) - jnp.where(chosen, scale, 0.0)).astype(hidden.dtype)
        hidden_gradient = _summed(jnp.einsum("bcv,dv->bcd", gradient, weight), axes)
        added = jnp.einsum("bcd,bcv->dv", hidden, gradient, preferred_element_type=jnp.float32)
        return weight_gradient + added, (nll, hidden_gradient)

    parts = tuple(_chunked(x, chunk) for x in (hidden, targets, loss_weights))
    if parts[0].shape[0] == 1:
        weight_gradient, (nll, hidden_gradient) = step(0.0, tuple(x[0] for x in parts))
        nll, hidden_gradient = nll[None], hidden_gradient[None]
    else:
        weight_gradient, (nll, hidden_gradient) = jax.lax.scan(step, jnp.zeros(weight.shape, jnp.float32), parts)
    return _unchunked(nll), _unchunked(hidden_gradient), weight_gradient


def _softmax_parts(logits, targets, vocabulary, axes):
    """exp(logits - highest), its sum over the vocabulary, which entries are the targets', and their nll."""
    highest = logits.max(axis=-1, keepdims=True)
    highest = jax.lax.pmax(highest, axes) if axes else highest
    exponential = jnp.exp(logits - highest)
    total = _summed(exponential.sum(axis=-1, keepdims=True), axes)
    chosen = targets[..., None] == vocabulary
    nll = (jnp.log(total) + highest)[..., 0] - _summed(jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1), axes)
    return exponential, total, chosen, nll


def _numbers(size, dtype, axes):
    """The numbers of the part of the vocabulary that this device holds."""
    numbers = jnp.arange(size, dtype=dtype)
    return numbers + size * jax.lax.axis_index(axes).astype(dtype) if axes else numbers


def _summed(x, axes):
    return jax.lax.psum(x, axes) if axes else x


# --------------------------------------------------------------------------- on a mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _spread_loss(hidden, head_weight, targets, loss_weights, chunk_logits, partitioning):
    """The loss with every device on its own tokens and its own part of the vocabulary.

    The head's gradient is summed over the devices once, after all chunks.
    """

    def local(hidden, weight, targets):
        chunk = _chunk_length(*hidden.shape[:2], weight.shape[1], chunk_logits)
        nll = _losses(*_padded(chunk, hidden), weight, *_padded(chunk, targets), chunk, places.vocabulary)
        return nll[:, : targets.shape[1]]

    places = _Places.of(partitioning, hidden, head_weight)
    weight = gathered(head_weight.astype(hidden.dtype), "width", "vocabulary")
    nll = places.mapped(local, (places.hidden, places.weight, places.tokens), places.tokens)(hidden, weight, targets)
    return jnp.sum(loss_weights * nll), nll


def _spread_loss_forward(hidden, head_weight, targets, loss_weights, chunk_logits, partitioning):
    places = _Places.of(partitioning, hidden, head_weight)

    def local(hidden, weight, targets, loss_weights):
        length = targets.shape[1]
        chunk = _chunk_length(*hidden.shape[:2], weight.shape[1], chunk_logits)
        hidden, targets, loss_weights = _padded(chunk, hidden, targets, loss_weights)
        nll, hidden_gradient, weight_gradient = _losses_and_gradients(
            hidden, weight, targets, loss_weights, chunk, places.vocabulary
        )
        alone = tuple(axis for axis in places.tokens_over if axis not in places.kept_over)
        weight_gradient = _summed(weight_gradient, alone)
        if places.kept_over:
            weight_gradient = jax.lax.psum_scatter(weight_gradient, places.kept_over, tiled=True)
        return nll[:, :length], hidden_gradient[:, :length], weight_gradient

    weight = gathered(head_weight.astype(hidden.dtype), "width", "vocabulary")
    nll, hidden_gradient, weight_gradient = places.mapped(
        local,
        (places.hidden, places.weight, places.tokens, places.tokens),
        (places.tokens, places.hidden, places.kept_weight),
    )(hidden, weight, targets, loss_weights)
    return (jnp.sum(loss_weights * nll), nll), (hidden_gradient, weight_gradient.astype(head_weight.dtype))


def _spread_loss_backward(_, __, residuals, gradients):
    return _chunked_loss_backward(None, residuals, gradients)


_spread_loss.defvjp(_spread_loss_forward, _spread_loss_backward)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the arrays of the loss are.

    Attributes:
      mesh: of the devices.
      hidden, tokens, weight, kept_weight: of the hidden states, of one number for each token, of the head as it is
        computed with, and as it is kept.
      vocabulary, tokens_over, kept_over: axes of the mesh over which the vocabulary, the tokens and, of these, the
        kept head's width are spread.
    """

    mesh: Mesh
    hidden: PartitionSpec
    tokens: PartitionSpec
    weight: PartitionSpec
    kept_weight: PartitionSpec
    vocabulary: tuple[str, ...]
    tokens_over: tuple[str, ...]
    kept_over: tuple[str, ...]

    @classmethod
    def of(cls, partitioning: Partitioning, hidden: Array, head_weight: Array) -> _Places:
        rows, positions = map(partitioning.mesh_axes, ("batch", "sequence"), hidden.shape)
        width, vocabulary = map(partitioning.mesh_axes, ("width", "vocabulary"), head_weight.shape)
        kept_over = width if set(width) <= {*rows, *positions} else ()
        return cls(
            mesh=partitioning.mesh,
            hidden=PartitionSpec(rows, positions, None),
            tokens=PartitionSpec(rows, positions),
            weight=PartitionSpec(None, vocabulary),
            kept_weight=PartitionSpec(kept_over, vocabulary),
            vocabulary=vocabulary,
            tokens_over=rows + positions,
            kept_over=kept_over,
        )

    def mapped(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` of each device's part."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
