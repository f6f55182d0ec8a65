"""Cache-backed generation, greedy or sampled. B batch, P longest prompt, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Continuations on their way; B rows, R new tokens at most.

    Attributes:
      step: tokens that every row has, or would have if it had not stopped.
      tokens: the new ones, padding after the end of a row and where none were made yet.
      done: rows that have stopped.
      lengths: tokens of each prompt.
      key: random key, or one for each row.
      cache: of the decoder.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B R"]
    done: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    key: Key[Array, ...]
    cache: Any


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
      pad_token: see there.
      key: random key, or one for each row of the result; needed with a temperature.
      samples: rows of the result for each prompt, one after the other. Every prompt is read once.

    Returns:
      The new tokens. All of it runs under `jax.jit` (everything after prompt_lengths static, but key).

    Raises:
      ValueError: a prompt and its continuation do not fit the model, a sampling argument is out of range, the key
        is an old-style one or their number is wrong, or, where the values are known (outside jit), a prompt's length
        is out of range.
    """
    how = {"temperature": temperature, "top_p": top_p, "stop_token": stop_token, "pad_token": pad_token}
    decoding = start_decoding(
        model, prompts, prompt_lengths, max_new_tokens=max_new_tokens, key=key, samples=samples, **how
    )
    return continue_decoding(model, decoding, max_new_tokens, **how).tokens


def start_decoding(
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
) -> Decoding:
    """Reads the prompts and draws one token of each row; arguments and errors as of `generate`."""
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
    if key is not None:
        _check_key(key, batch * samples)
    length, limit = width + max_new_tokens, model.config.max_sequence_length
    if length > limit:
        raise ValueError(
            f"prompts of {width} tokens and max_new_tokens={max_new_tokens} need {length} positions, but the model "
            f"has max_sequence_length={limit}."
        )
    lengths = _prompt_lengths(prompt_lengths, batch, width)
    logits, cache = dropless(model).prefill(prompts, lengths, init_cache(model.config, batch, length))
    if samples > 1:
        batch *= samples
        lengths, logits = jnp.repeat(lengths, samples), jnp.repeat(logits, samples, axis=0)
        cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=1), cache)
    nothing = Decoding(
        step=jnp.int32(0), tokens=jnp.full((batch, max_new_tokens), pad_token, jnp.int32),
        done=jnp.zeros((batch,), bool), lengths=lengths, key=jax.random.key(0) if key is None else key, cache=cache,
    )  # fmt: skip
    return _emit(nothing, logits, temperature, top_p, stop_token, pad_token)


def continue_decoding(
    model: Decoder,
    decoding: Decoding,
    until: int | Int[Array, ""],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    pad_token: int = 0,
) -> Decoding:
    """Draws on until all rows have stopped, or have `until` new tokens. In pieces it draws what it draws at once.

    Args:
      model: the decoder.
      decoding: so far; a row may be marked `done` between two calls, and gets no token more.
      until: at most the `max_new_tokens` of the start.
      temperature, top_p, stop_token, pad_token: as at the start.
    """
    definition, state = nnx.split(dropless(model))

    def unfinished(decoding: Decoding) -> Array:
        return (decoding.step < until) & ~decoding.done.all()

    def advance(decoding: Decoding) -> Decoding:
        newest = jax.lax.dynamic_index_in_dim(decoding.tokens, decoding.step - 1, axis=1, keepdims=False)
        place = decoding.lengths + decoding.step - 1
        logits, cache = nnx.merge(definition, state).decode_step(newest, place, decoding.cache)
        decoding = dataclasses.replace(decoding, cache=cache)
        return _emit(decoding, logits, temperature, top_p, stop_token, pad_token)

    return jax.lax.while_loop(unfinished, advance, decoding)


def _emit(
    decoding: Decoding,
    logits: Float[Array, "B V"],
    temperature: float,
    top_p: float,
    stop_token: int | None,
    pad_token: int,
) -> Decoding:
    """One token more of each row that has not stopped."""
    fold = jax.random.fold_in if decoding.key.ndim == 0 else jax.vmap(jax.random.fold_in, in_axes=(0, None))
    token = sample_token(logits, fold(decoding.key, decoding.step), temperature, top_p)
    token = jnp.where(decoding.done, pad_token, token)
    return dataclasses.replace(
        decoding,
        step=decoding.step + 1,
        tokens=jax.lax.dynamic_update_index_in_dim(decoding.tokens, token, decoding.step, axis=1),
        done=decoding.done if stop_token is None else decoding.done | (token == stop_token),
    )


def _check_key(key: Array, rows: int) -> None:
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key is an array of {key.dtype}, as jax.random.PRNGKey makes; give jax.random.key(seed), or "
            "jax.random.wrap_key_data(key)."
        )
    if key.shape not in ((), (rows,)):
        raise ValueError(f"key has shape {key.shape}; give one key, or ({rows},), one for each row of the result.")


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
