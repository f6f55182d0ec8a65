"""Responses to prompts, decoded with the library's cache in batches of one shape.

B responses, P longest prompt, S sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxmoe.data import Tokenizer
from jaxmoe.liveness import beat
from jaxmoe.models import generate
from jaxmoe.sharding import Partitioning, placed, use_partitioning


@dataclasses.dataclass(frozen=True)
class Response:
    """What was decoded after a prompt.

    Attributes:
      tokens: the end token included, if there is one.
      finished: whether the end token ended it, rather than the limit.
    """

    tokens: Int[np.ndarray, " r"]
    finished: bool

    def text(self, tokenizer: Tokenizer) -> str:
        """The response without its end token."""
        return tokenizer.decode(self.tokens[:-1] if self.finished else self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are decoded.

    Attributes:
      max_tokens: of a response.
      temperature: 0 takes the likeliest token.
      top_p: mass of the nucleus that is sampled from.
      batch_size: responses together.
      width: P, that every prompt is padded to.
    """

    max_tokens: int
    temperature: float
    top_p: float
    batch_size: int
    width: int


def respond(
    graph: nnx.GraphDef,
    variables: tuple[nnx.State, nnx.State],
    prompts: Sequence[Int[np.ndarray, " p"]],
    tokenizer: Tokenizer,
    sampling: Sampling,
    key: Key[Array, ""],
    *,
    partitioning: Partitioning | None = None,
    between: Callable[[], None] = beat,
) -> list[Response]:
    """A response to each prompt; capacity limits do not hold.

    Args:
      graph: of the decoder.
      variables: its parameters and its other variables.
      prompts: tokens of each, at least one, at most `sampling.width`.
      tokenizer: the model's.
      sampling: how.
      key: the same key, prompts and sampling give the same responses, on any mesh up to rounding.
      partitioning: of the variables.
      between: called before every batch.
    """
    rows = min(sampling.batch_size, len(prompts))
    decode = _compiled(
        graph, sampling.max_tokens, sampling.temperature, sampling.top_p, tokenizer.eos_id, tokenizer.pad_id,
        partitioning,
    )  # fmt: skip
    responses: list[Response] = []
    for number, start in enumerate(range(0, len(prompts), rows)):
        between()
        beat()
        chosen = prompts[start : start + rows]
        padded = np.full((rows, sampling.width), tokenizer.pad_id, np.int32)
        lengths = np.ones(rows, np.int32)  # of rows that only fill the batch, too
        for row, tokens in enumerate(chosen):
            padded[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        decoded = np.asarray(
            decode(
                *variables, placed(padded, partitioning, "batch", None), placed(lengths, partitioning, "batch"),
                jax.random.fold_in(key, number),
            )
        )  # fmt: skip
        responses += [_response(tokens, tokenizer.eos_id) for tokens in decoded[: len(chosen)]]
    return responses


def _response(tokens: Int[np.ndarray, " r"], eos_id: int) -> Response:
    ends = np.flatnonzero(tokens == eos_id)
    return Response(tokens[: ends[0] + 1], True) if len(ends) else Response(tokens, False)


@functools.lru_cache(maxsize=16)
def _compiled(
    graph: nnx.GraphDef,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop_token: int,
    pad_token: int,
    partitioning: Partitioning | None,
) -> Callable[..., Int[Array, "B max_tokens"]]:
    """`generate` with results that every process has."""

    def decode(params: Any, others: Any, prompts: Array, lengths: Array, key: Array) -> Array:
        with use_partitioning(partitioning):
            return generate(
                nnx.merge(graph, params, others), prompts, lengths, max_new_tokens=max_tokens,
                temperature=temperature, top_p=top_p, stop_token=stop_token, pad_token=pad_token, key=key,
            )  # fmt: skip

    return jax.jit(decode, out_shardings=None if partitioning is None else partitioning.sharding((), ()))
