"""The language-model loss, without ever holding all logits.

B batch, S sequence, D width, V vocabulary, C positions of a row in one chunk.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.accounting import LOSS_CHUNK_LOGITS


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
    chunk_logits: int = LOSS_CHUNK_LOGITS,
) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
    """Cross-entropy of final hidden states, chunk by chunk over the sequence.

    When differentiated, each chunk's gradient is formed while its logits are there, so they are computed once
    and never kept: three matrix products in all, and memory for one chunk.

    Args:
      hidden: of `Decoder.hidden`; the head's products are in its dtype, accumulated in float32.
      head_weight: of `Decoder.head_weight`.
      targets: the next tokens, each in [0, V).
      loss_weights: of every target; 0 on padding. Not differentiated.
      chunk_logits: bound on the logits held at a time.

    Returns:
      Sum of weight · nll (divide it by the sum of weights for the loss); and the nll of each token in nats,
      which carries no gradient.
    """
    batch, length, _ = hidden.shape
    chunks = min(length, max(1, math.ceil(batch * length * head_weight.shape[1] / chunk_logits)))
    chunk = math.ceil(length / chunks)
    padding = chunk * math.ceil(length / chunk) - length
    if padding:
        hidden, targets, loss_weights = (
            jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, targets, loss_weights)
        )
    with jax.named_scope("language_model_loss"):
        total, nll = _chunked_loss(hidden, head_weight, targets, loss_weights.astype(jnp.float32), chunk)
    return total, jax.lax.stop_gradient(nll[:, :length])


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
    weight = head_weight.astype(hidden.dtype)

    def step(_, part):
        hidden, targets = part
        return None, token_nll(_logits(hidden, weight), targets)

    _, nll = jax.lax.scan(step, None, (_chunked(hidden, chunk), _chunked(targets, chunk)))
    nll = _unchunked(nll)
    return jnp.sum(loss_weights * nll), nll


def _chunked_loss_forward(hidden, head_weight, targets, loss_weights, chunk):
    weight = head_weight.astype(hidden.dtype)
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

    parts = tuple(_chunked(x, chunk) for x in (hidden, targets, loss_weights))
    if parts[0].shape[0] == 1:
        weight_gradient, (nll, hidden_gradient) = step(0.0, tuple(x[0] for x in parts))
        nll, hidden_gradient = nll[None], hidden_gradient[None]
    else:
        weight_gradient, (nll, hidden_gradient) = jax.lax.scan(
            step, jnp.zeros(head_weight.shape, jnp.float32), parts
        )
    nll = _unchunked(nll)
    residuals = (_unchunked(hidden_gradient), weight_gradient.astype(head_weight.dtype))
    return (jnp.sum(loss_weights * nll), nll), residuals


def _chunked_loss_backward(chunk, residuals, gradients):
    scale, _ = gradients
    hidden_gradient, weight_gradient = residuals
    return (
        (hidden_gradient * scale).astype(hidden_gradient.dtype),
        weight_gradient * scale.astype(weight_gradient.dtype),
        None,
        None,
    )


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)
