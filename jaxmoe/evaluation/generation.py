"""Accuracy of generated answers: greedy decoding, then comparison of what `extract_answer` reads.

B rows, P longest prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jaxmoe.data import Example, Tokenizer
from jaxmoe.data.answers import AnswerFormat, extract_answer
from jaxmoe.evaluation.forward import batches_of
from jaxmoe.evaluation.scoring import padded_length, ratio_standard_error
from jaxmoe.models import Decoder, dropless, generate
from jaxmoe.sharding import Partitioning, partitioning_in_use, placed, use_partitioning


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationScore:
    """Accuracy of greedy decoding; NaN where there is no example.

    Attributes:
      accuracy: share of examples whose generated final answer equals the true one.
      accuracy_standard_error: binomial.
      answered: share of generations from which a final answer could be read at all.
      finished: share of generations that ended by themselves, with the end token.
      examples: how many were generated.
      skipped: how many were not, because their prompt leaves no room for an answer.
    """

    accuracy: float
    accuracy_standard_error: float
    answered: float
    finished: float
    examples: int
    skipped: int


def generation_accuracy(
    model: Decoder,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    answer_format: AnswerFormat = "final_number",
    max_new_tokens: int = 256,
    batch_size: int = 128,
) -> GenerationScore:
    """Share of examples that greedy decoding answers correctly.

    Args:
      model: decodes without capacity limits.
      examples: the true answer is `final` where given, else what `extract_answer` reads in `answer`.
      tokenizer: the model's.
      answer_format: how `extract_answer` reads a final answer.
      max_new_tokens: longest generated answer.
      batch_size: prompts at once, at most.
    """
    texts = greedy_answers(
        model, [example.prompt for example in examples], tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    correct, answered, finished = [], [], []
    for example, generated in zip(examples, texts):
        if generated is None:
            continue
        given = extract_answer(generated.text, answer_format)
        truth = extract_answer(example.answer, answer_format) if example.final is None else example.final
        correct.append(given is not None and given == truth)
        answered.append(given is not None)
        finished.append(generated.finished)
    count = len(correct)
    right = np.array(correct, np.float64)
    return GenerationScore(
        accuracy=float(right.mean()) if count else math.nan,
        accuracy_standard_error=ratio_standard_error(right, np.ones(count)),
        answered=float(np.mean(answered)) if count else math.nan,
        finished=float(np.mean(finished)) if count else math.nan,
        examples=count,
        skipped=len(examples) - count,
    )


@dataclasses.dataclass(frozen=True)
class Generated:
    """A continuation, and whether the end token ended it rather than the limit."""

    text: str
    finished: bool


def greedy_answers(
    model: Decoder, prompts: Sequence[str], tokenizer: Tokenizer, *, max_new_tokens: int = 256, batch_size: int = 128
) -> list[Generated | None]:
    """The greedy continuation of each prompt up to the end token; None for a prompt that leaves no room for one.

    Args:
      model: decodes without capacity limits.
      prompts: texts, tokenized without special tokens, as the prompts of training rows are.
      tokenizer: the model's.
      max_new_tokens: longest continuation; at most half of the model's max_sequence_length is used.
      batch_size: prompts at once, at most.
    """
    graphdef, state = nnx.split(dropless(model))
    partitioning = partitioning_in_use()
    new_tokens = min(max_new_tokens, max(1, model.config.max_sequence_length // 2))
    tokens = tokenizer.encode_batch(list(prompts))
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    longest = model.config.max_sequence_length - new_tokens
    answers: list[Generated | None] = [None] * len(prompts)
    fitting = np.flatnonzero((lengths >= 1) & (lengths <= longest))
    by_length = fitting[np.argsort(lengths[fitting], kind="stable")]  # neighbours need about the same padding
    rows = min(batch_size, 1 << max(len(by_length) - 1, 0).bit_length())
    for chosen, present in batches_of(len(by_length), rows):
        members = by_length[chosen]
        width = int(padded_length(lengths[members].max(), longest))
        padded = np.full((rows, width), tokenizer.pad_id, np.int32)
        for row, member in enumerate(members):
            padded[row, : lengths[member]] = tokens[member]
        written = np.asarray(
            _compiled(partitioning)(
                graphdef, state,
                placed(padded, partitioning, "batch", None),
                placed(lengths[members].astype(np.int32), partitioning, "batch"),
                new_tokens, tokenizer.eos_id, tokenizer.pad_id,
            )
        )  # fmt: skip
        for row, member in enumerate(members[:present]):
            ids = written[row].tolist()
            finished = tokenizer.eos_id in ids
            if finished:
                ids = ids[: ids.index(tokenizer.eos_id)]
            answers[member] = Generated(tokenizer.decode(ids), finished)
    return answers


@functools.cache
def _compiled(partitioning: Partitioning | None) -> Callable[..., Int[Array, "B max_new_tokens"]]:
    """`_generate` for a partitioning, with results that every process has."""
    if partitioning is None:
        return jax.jit(_generate, static_argnums=(0, 4, 5, 6))

    def generated(*arguments):
        with use_partitioning(partitioning):
            return _generate(*arguments)

    return jax.jit(generated, static_argnums=(0, 4, 5, 6), out_shardings=partitioning.sharding((), ()))


def _generate(
    graphdef: Any,
    state: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    max_new_tokens: int,
    stop_token: int,
    pad_token: int,
) -> Int[Array, "B max_new_tokens"]:
    return generate(
        nnx.merge(graphdef, state), prompts, lengths,
        max_new_tokens=max_new_tokens, stop_token=stop_token, pad_token=pad_token,
    )  # fmt: skip
