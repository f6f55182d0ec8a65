"""Generated answers, greedy or sampled, and the accuracy of greedy ones by what `extract_answer` reads.

B prompts, P longest prompt.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxmoe.data import Example, Tokenizer
from jaxmoe.data.answers import AnswerFormat, extract_answer
from jaxmoe.evaluation.forward import batches_of
from jaxmoe.evaluation.scoring import padded_length, ratio_standard_error
from jaxmoe.liveness import beat
from jaxmoe.models import Decoder, Decoding, continue_decoding, dropless, generate, start_decoding
from jaxmoe.sharding import Partitioning, partitioning_in_use, placed, use_partitioning

TOKENS_BETWEEN_LOOKS = 32
"""New tokens after which a batch is looked through for stop texts."""


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
        truth = true_answer(example, answer_format)
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


def true_answer(example: Example, answer_format: AnswerFormat) -> str | None:
    """What an extracted answer is compared with: `final` where given, else what is read in `answer`."""
    return extract_answer(example.answer, answer_format) if example.final is None else example.final


@dataclasses.dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
      text: without the end token, or before the first stop text.
      finished: whether the end token or a stop text ended it rather than the limit.
      tokens: that it took, the end or the stop text included.
    """

    text: str
    finished: bool
    tokens: int


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
    answers: list[Generated | None] = [None] * len(prompts)
    batches = sample_answers(model, prompts, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size)
    for batch in batches:
        for number, generated in batch.items():
            answers[number] = None if generated is None else generated[0]
    return answers


def sample_answers(
    model: Decoder,
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    stops: Sequence[str] = (),
    batch_size: int = 128,
    seed: int = 0,
    done: Collection[int] = (),
    check_stop: Callable[[], None] = lambda: None,
) -> Iterator[dict[int, list[Generated] | None]]:
    """Several continuations of each prompt, batch by batch.

    Sample j of prompt i is drawn with a key of its own, folded from (seed, i, j): it depends on no other row, so not
    on `batch_size`, `samples` or `done` beyond the rounding of differently shaped products. Each prompt is read once
    for all of its samples in a batch. A batch ends when all of its rows have: with stop texts, which are looked for
    after every `TOKENS_BETWEEN_LOOKS`.

    Args:
      model: decodes without capacity limits.
      prompts: texts, tokenized without special tokens, as the prompts of training rows are.
      tokenizer: the model's.
      samples: of each prompt.
      temperature, top_p: as in `jaxmoe.models.generate`; temperature 0 is greedy.
      max_new_tokens: longest continuation; at most half of the model's max_sequence_length is used.
      stops: a continuation is cut before the first of these texts.
      batch_size: rows at once, at most.
      seed: of the samples.
      done: numbers of prompts that are not wanted again. Batches are made as if they were, so that what is drawn in
        several calls is what is drawn in one.
      check_stop: called before each batch; may raise.

    Yields:
      Of a batch, the `samples` continuations of each prompt that is not done, by its number; first of all, None for
      each prompt that leaves no room for a continuation.
    """
    graphdef, state = nnx.split(dropless(model))
    partitioning = partitioning_in_use()
    new_tokens = min(max_new_tokens, max(1, model.config.max_sequence_length // 2))
    tokens = tokenizer.encode_batch(list(prompts))
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    longest = model.config.max_sequence_length - new_tokens
    fits = (lengths >= 1) & (lengths <= longest)
    without_room = {int(number): None for number in np.flatnonzero(~fits) if number not in done}
    if without_room:
        yield without_room
    fitting = np.flatnonzero(fits)
    by_length = fitting[np.argsort(lengths[fitting], kind="stable")]  # neighbours need about the same padding
    copies = min(samples, batch_size)
    rows = min(max(1, batch_size // copies), 1 << max(len(by_length) - 1, 0).bit_length())
    sampling = _Sampling(new_tokens, tokenizer.eos_id, tokenizer.pad_id, temperature, top_p, copies)
    for chosen, present in batches_of(len(by_length), rows):
        members = by_length[chosen]
        wanted = [(row, int(member)) for row, member in enumerate(members[:present]) if member not in done]
        if not wanted:
            continue
        width = int(padded_length(lengths[members].max(), longest))
        padded = np.full((rows, width), tokenizer.pad_id, np.int32)
        for row, member in enumerate(members):
            padded[row, : lengths[member]] = tokens[member]
        batch: dict[int, list[Generated] | None] = {member: [] for _, member in wanted}
        for first in range(0, samples, copies):
            check_stop()
            beat()
            drawn = np.arange(first, first + copies)
            arguments = (
                placed(padded, partitioning, "batch", None),
                placed(lengths[members].astype(np.int32), partitioning, "batch"),
                placed(np.repeat(members, copies).astype(np.int32), partitioning, "batch"),
                placed(np.tile(drawn, rows).astype(np.int32), partitioning, "batch"),
                jax.random.key(seed),
            )
            if stops:
                written = _written_until_stops(graphdef, state, arguments, sampling, tokenizer, stops)
            else:
                written = np.asarray(_compiled(partitioning)(graphdef, state, *arguments, sampling))
            written = written.reshape(rows, copies, new_tokens)
            for row, member in wanted:
                texts = [_continuation(ids.tolist(), tokenizer, stops) for ids in written[row, : samples - first]]
                batch[member].extend(texts)
        yield batch


def _continuation(ids: list[int], tokenizer: Tokenizer, stops: Sequence[str]) -> Generated:
    """The text of a row of tokens, up to its end."""
    finished = tokenizer.eos_id in ids
    own = ids[: ids.index(tokenizer.eos_id)] if finished else ids
    text = tokenizer.decode(own)
    ends = [place for place in map(text.find, stops) if place >= 0]
    if not ends:
        return Generated(text, finished, len(own) + finished)
    enough = bisect.bisect_left(
        range(len(own)), True, key=lambda count: _has_stop(tokenizer.decode(own[:count]), stops)
    )
    return Generated(text[: min(ends)], True, enough)


def _has_stop(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _written_until_stops(
    graphdef: Any,
    state: Any,
    arguments: Sequence[Array],
    sampling: _Sampling,
    tokenizer: Tokenizer,
    stops: Sequence[str],
) -> Int[np.ndarray, "B*samples max_new_tokens"]:
    """What `_generate` writes, but a row has stopped, too, where its text has a stop text."""
    partitioning = partitioning_in_use()
    start, go_on = _compiled_pieces(partitioning)
    decoding = start(graphdef, state, *arguments, sampling)
    while True:
        written, done, step = map(np.array, (decoding.tokens, decoding.done, decoding.step))
        for row in np.flatnonzero(~done):
            done[row] = _has_stop(tokenizer.decode(written[row, :step].tolist()), stops)
        if done.all() or step == sampling.max_new_tokens:
            return written
        decoding = dataclasses.replace(decoding, done=placed(done, partitioning, None))
        until = np.int32(min(step + TOKENS_BETWEEN_LOOKS, sampling.max_new_tokens))
        decoding = go_on(graphdef, state, decoding, until, sampling)
        beat()


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """What a compiled `_generate` is compiled for, besides its shapes."""

    max_new_tokens: int
    stop_token: int
    pad_token: int
    temperature: float
    top_p: float
    samples: int

    @property
    def step(self) -> dict[str, Any]:
        """What the drawing of a token depends on."""
        return {name: getattr(self, name) for name in ("stop_token", "pad_token", "temperature", "top_p")}


@functools.cache
def _compiled(partitioning: Partitioning | None) -> Callable[..., Int[Array, "B*samples max_new_tokens"]]:
    """`_generate` for a partitioning, with results that every process has."""
    if partitioning is None:
        return jax.jit(_generate, static_argnums=(0, 7))

    def generated(*arguments):
        with use_partitioning(partitioning):
            return _generate(*arguments)

    return jax.jit(generated, static_argnums=(0, 7), out_shardings=partitioning.sharding((), ()))


def _generate(
    graphdef: Any,
    state: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    prompt_numbers: Int[Array, " B*samples"],
    sample_numbers: Int[Array, " B*samples"],
    key: Array,
    sampling: _Sampling,
) -> Int[Array, "B*samples max_new_tokens"]:
    return generate(
        nnx.merge(graphdef, state), prompts, lengths, key=_own_keys(key, prompt_numbers, sample_numbers),
        max_new_tokens=sampling.max_new_tokens, samples=sampling.samples, **sampling.step,
    )  # fmt: skip


@functools.cache
def _compiled_pieces(partitioning: Partitioning | None) -> tuple[Callable[..., Decoding], Callable[..., Decoding]]:
    """`_generate` in pieces: the start, and some tokens more. One process has the results."""

    def start(graphdef, state, prompts, lengths, prompt_numbers, sample_numbers, key, sampling):
        with use_partitioning(partitioning):
            return start_decoding(
                nnx.merge(graphdef, state), prompts, lengths, key=_own_keys(key, prompt_numbers, sample_numbers),
                max_new_tokens=sampling.max_new_tokens, samples=sampling.samples, **sampling.step,
            )  # fmt: skip

    def go_on(graphdef, state, decoding, until, sampling):
        with use_partitioning(partitioning):
            return continue_decoding(nnx.merge(graphdef, state), decoding, until, **sampling.step)

    return jax.jit(start, static_argnums=(0, 7)), jax.jit(go_on, static_argnums=(0, 4), donate_argnums=2)


def _own_keys(
    key: Array, prompts: Int[Array, " B*samples"], samples: Int[Array, " B*samples"]
) -> Key[Array, " B*samples"]:
    """A key for each sample of each prompt."""
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(key, prompt), sample))(
        prompts, samples
    )
