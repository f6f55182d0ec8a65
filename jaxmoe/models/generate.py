"""Cache-backed generation, greedy or sampled. B batch, P longest prompt, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmoe.models.decoder import Decoder, init_cache


def dropless(model: Decoder) -> Decoder:
    """The same model, sharing its parameters, without capacity limits in its MoE layers."""
    return nnx.view(model, dropless=True, raise_if_not_found=False)


def sample_token(
    logits: Float[Array, "B V"], key: Array | None, temperature: float, top_p: float
) -> Int[Array, " B"]:
    """One token for each row: the likeliest at temperature 0, else drawn from the nucleus of mass top_p.

    With a key for each row, a row's token depends on nothing but its own logits and key. The nucleus is the smallest
    set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020).
    """
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1.0:
        descending = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    draw = jax.random.categorical if key.ndim == 0 else jax.vmap(jax.random.categorical)
    return draw(key, logits).astype(jnp.int32)


def generate(
    model: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"] | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    pad_token: int = 0,
    key: Array | None = None,
    samples: int = 1,
) -> Int[Array, "B*samples max_new_tokens"]:
    """Continues every prompt, until all rows have stopped. Without capacity limits, so that rows are independent.

    Args:
      model: the decoder.
      prompts: right-padded.
      prompt_lengths: tokens of each prompt, in 1..P.
      max_new_tokens: columns of the result.
      temperature: 0 is greedy.
      top_p: mass of the nucleus to sample from; 1 samples from all.
      stop_token: ends a row; it is part of the result, what follows it is pad_token.
      key: random key, or one for each row of the result; needed with a temperature.
      samples: rows of the result for each prompt, one after the other. Every prompt is read once.

    Returns:
      The new tokens. All of it runs under `jax.jit` (everything after prompt_lengths static, but key).

    Raises:
      ValueError: a prompt and its continuation do not fit the model, a sampling argument is out of range, or,
        where the values are known (outside jit), so is a prompt's length.
    """
    if temperature < 0.0:
        raise ValueError(f"temperature={temperature}; it must not be negative (0 is greedy).")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}; choose 0 < top_p <= 1.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; it must be positive.")
    if samples < 1:
        raise ValueError(f"samples={samples}; it must be positive.")
    if temperature > 0.0 and key is None:
        raise ValueError(f"temperature={temperature} samples; give key=jax.random.key(seed).")
    batch, width = prompts.shape
    length, limit = width + max_new_tokens, model.config.max_sequence_length
    if length > limit:
        raise ValueError(
            f"prompts of {width} tokens and max_new_tokens={max_new_tokens} need {length} positions, but the model "
            f"has max_sequence_length={limit}."
        )
    lengths = _prompt_lengths(prompt_lengths, batch, width)
    model = dropless(model)
    definition, state = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, in_axes=(0, None))
    logits, cache = model.prefill(prompts, lengths, init_cache(model.config, batch, length))
    if samples > 1:
        batch *= samples
        lengths, logits = jnp.repeat(lengths, samples), jnp.repeat(logits, samples, axis=0)
        cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=1), cache)

    def emit(step, logits, done, tokens):
        token = sample_token(logits, fold(key, step), temperature, top_p)
        token = jnp.where(done, pad_token, token)
        done = done if stop_token is None else done | (token == stop_token)
        return token, done, jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=1)

    def unfinished(carry):
        step, _, done, _, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def advance(carry):
        step, token, done, tokens, cache = carry
        logits, cache = nnx.merge(definition, state).decode_step(token, lengths + step - 1, cache)
        return step + 1, *emit(step, logits, done, tokens), cache

    nothing = jnp.full((batch, max_new_tokens), pad_token, jnp.int32)
    emitted = emit(jnp.int32(0), logits, jnp.zeros((batch,), bool), nothing)
    _, _, _, tokens, _ = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), *emitted, cache))
    return tokens


def _prompt_lengths(lengths: Array | Sequence[int], batch: int, width: int) -> Int[Array, " B"]:
    if not isinstance(lengths, jax.core.Tracer):
        lengths = np.asarray(lengths)
        if lengths.shape != (batch,):
            raise ValueError(f"prompt_lengths has shape {lengths.shape}; ({batch},) is expected, one per prompt.")
        for row in np.flatnonzero((lengths < 1) | (lengths > width))[:1]:
            raise ValueError(
                f"prompt_lengths[{row}]={lengths[row]}; prompts of {width} columns have 1..{width} tokens."
            )
    return jnp.asarray(lengths, jnp.int32)
