"""Task loss and accuracy of prompt-answer examples under teacher forcing.

The rule is that of the study's task-loss code (arXiv 2508.18672, `taskloss-eval`): with text = prompt + answer, the
answer's tokens are those from position len(encode(prompt)) of encode(text) on; bits per token divides their summed
negative log-likelihood by their number, bits per byte by the UTF-8 bytes of the answer, and both are averaged over
examples (macro mean). Rows are as in training: no beginning token, and the end token is not scored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmoe.data import Example, Tokenizer, encode_examples
from jaxmoe.evaluation.forward import SHORTEST_ROW, Evaluator, batches_of
from jaxmoe.models import Decoder


@dataclasses.dataclass(frozen=True)
class ExampleScores:
    """What teacher forcing gives for n examples, in their order.

    Attributes:
      nll: nats of each whole answer.
      answer_tokens, answer_bytes: length of each answer.
      correct_tokens: answer tokens that were the likeliest given the true ones before them.
      values, correct_values: values that each answer marks, and those of them all of whose tokens were correct.
      index: which of the examples given these are; the others were skipped.
      positions: input positions of each row, its prompt's included.
      skipped: examples too long for the model, or without a token to score.
      dropped_fraction: share of expert assignments dropped; 0, since evaluation has no capacity limit.
    """

    nll: Float[np.ndarray, " n"]
    answer_tokens: Int[np.ndarray, " n"]
    answer_bytes: Int[np.ndarray, " n"]
    correct_tokens: Int[np.ndarray, " n"]
    values: Int[np.ndarray, " n"]
    correct_values: Int[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]
    skipped: int
    dropped_fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Scores of a set of examples. Standard errors are over examples; NaN where there is nothing to average.

    Attributes:
      bits_per_token, bits_per_byte: mean over examples of each answer's bits per token, per UTF-8 byte.
      loss: nats per answer token, pooled over all tokens of all answers.
      token_accuracy: share of all answer tokens that are the likeliest, given the true answer up to them.
      exact_match: share of answers all of whose tokens are; equal to exact match of greedy decoding up to the
        answer's length (the end token is not scored).
      value_recall: share of the values that the examples mark all of whose tokens are the likeliest; the tokens of
        fixed words do not count.
      examples, skipped, answer_tokens, answer_bytes, values: counts.
      examples_beyond_training_length: of `examples`, those with more positions than a row of training, which measure
        extrapolation; 0 where that length was not given.
      dropped_fraction: as in `ExampleScores`.
    """

    bits_per_token: float
    bits_per_token_standard_error: float
    bits_per_byte: float
    loss: float
    token_accuracy: float
    token_accuracy_standard_error: float
    exact_match: float
    exact_match_standard_error: float
    value_recall: float
    value_recall_standard_error: float
    examples: int
    skipped: int
    examples_beyond_training_length: int
    answer_tokens: int
    answer_bytes: int
    values: int
    dropped_fraction: float

    @classmethod
    def from_examples(cls, scores: ExampleScores, training_length: int | None = None) -> TaskScore:
        """Means and standard errors over examples."""
        longest = np.inf if training_length is None else training_length
        bits = scores.nll / math.log(2)
        per_token = bits / scores.answer_tokens
        exact = (scores.correct_tokens == scores.answer_tokens).astype(np.float64)
        marked = scores.values > 0
        values, recalled = scores.values[marked], scores.correct_values[marked]
        return cls(
            bits_per_token=_mean(per_token),
            bits_per_token_standard_error=ratio_standard_error(per_token, np.ones_like(per_token)),
            bits_per_byte=_mean(bits / np.maximum(scores.answer_bytes, 1)),
            loss=_ratio(scores.nll, scores.answer_tokens),
            token_accuracy=_ratio(scores.correct_tokens, scores.answer_tokens),
            token_accuracy_standard_error=ratio_standard_error(scores.correct_tokens, scores.answer_tokens),
            exact_match=_mean(exact),
            exact_match_standard_error=ratio_standard_error(exact, np.ones_like(exact)),
            value_recall=_ratio(recalled, values),
            value_recall_standard_error=ratio_standard_error(recalled, values),
            examples=len(scores.nll),
            skipped=scores.skipped,
            examples_beyond_training_length=int(np.sum(scores.positions > longest)),
            answer_tokens=int(scores.answer_tokens.sum()),
            answer_bytes=int(scores.answer_bytes.sum()),
            values=int(scores.values.sum()),
            dropped_fraction=scores.dropped_fraction,
        )


def score_examples(
    model: Decoder,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 128,
    training_length: int | None = None,
) -> TaskScore:
    """Task loss and accuracy of `model` on `examples`; see `TaskScore` and this module's docstring.

    Args:
      model: evaluated without capacity limits, whatever its configuration says.
      examples: any lengths; those over the model's max_sequence_length are skipped and counted.
      tokenizer: the model's.
      batch_size: rows at once, at most.
      training_length: of the rows that the model was trained on; longer examples are scored and counted.
    """
    scores = score_each(model, examples, tokenizer, batch_size=batch_size)
    return TaskScore.from_examples(scores, training_length)


def score_each(
    model: Decoder, examples: Sequence[Example], tokenizer: Tokenizer, *, batch_size: int = 128
) -> ExampleScores:
    """`score_examples` before averaging: one entry for each example that could be scored."""
    evaluator = Evaluator(model)
    tokens, answer_starts = encode_examples(tokenizer, examples)
    lengths = np.array([len(ids) - 1 for ids in tokens], np.int64)
    starts = np.array(answer_starts, np.int64)
    # Without a token before it nothing predicts the first answer token.
    scorable = (starts >= 1) & (lengths >= starts) & (lengths <= model.config.max_sequence_length)
    nll, correct, recalled = np.zeros(len(examples)), *np.zeros((2, len(examples)), np.int64)
    owner, value_starts, value_ends = value_tokens(tokenizer, examples, lengths + 1)
    buckets = length_buckets(lengths, scorable, model.config.max_sequence_length, evaluator.shortest_row)
    for length, members in buckets.items():
        rows = evaluator.rows_together(min(batch_size, 1 << (len(members) - 1).bit_length()), length)
        for chosen, present in batches_of(len(members), rows):
            batch = _padded([tokens[member] for member in members[chosen]], length, tokenizer.pad_id)
            losses, right = evaluator(batch)
            in_answer = np.arange(length) >= starts[members[chosen]][:, None] - 1
            group = members[chosen[:present]]
            nll[group] = np.where(in_answer, losses, 0).sum(1, dtype=np.float64)[:present]
            correct[group] = (in_answer & right).sum(1)[:present]
            row_of = np.full(len(examples), -1)
            row_of[group] = np.arange(present)
            here = np.flatnonzero(row_of[owner] >= 0)
            # Token t is predicted at position t - 1.
            whole = all_right(right, row_of[owner[here]], value_starts[here] - 1, value_ends[here] - 1)
            np.add.at(recalled, owner[here], whole)
    index = np.flatnonzero(scorable)
    answer_bytes = np.array([len(example.answer.encode()) for example in examples], np.int64)
    return ExampleScores(
        nll=nll[index],
        answer_tokens=(lengths + 1 - starts)[index],
        answer_bytes=answer_bytes[index],
        correct_tokens=correct[index],
        values=np.bincount(owner, minlength=len(examples))[index],
        correct_values=recalled[index],
        index=index,
        positions=lengths[index],
        skipped=len(examples) - len(index),
        dropped_fraction=evaluator.dropped_fraction,
    )


def value_tokens(
    tokenizer: Tokenizer, examples: Sequence[Example], counts: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " v"], Int[np.ndarray, " v"], Int[np.ndarray, " v"]]:
    """Where the values that examples mark stand among the tokens of prompt + answer.

    As with the boundary of the answer, a place is the number of tokens of the text before it. A value has one token
    at least: the next one, where it is merged with what stands before it.

    Args:
      tokenizer: of the examples.
      examples: with `values`, or without.
      counts: tokens of each prompt + answer.

    Returns:
      For each value the number of its example, its first token, and the one after its last.
    """
    places = [
        (number, example.prompt + example.answer[:start], example.prompt + example.answer[:end])
        for number, example in enumerate(examples)
        for start, end in example.values
    ]
    if not places:
        return (np.zeros(0, np.int64),) * 3
    texts = list(dict.fromkeys(text for _, *before in places for text in before))
    tokens = dict(zip(texts, map(len, tokenizer.encode_arrays(texts)), strict=True))
    owner = np.array([number for number, *_ in places], np.int64)
    starts = np.minimum([tokens[start] for _, start, _ in places], counts[owner] - 1)
    ends = np.clip([tokens[end] for _, _, end in places], starts + 1, counts[owner])
    return owner, starts, ends


def all_right(
    right: Bool[np.ndarray, "B S"],
    rows: Int[np.ndarray, " v"],
    starts: Int[np.ndarray, " v"],
    ends: Int[np.ndarray, " v"],
) -> Bool[np.ndarray, " v"]:
    """Whether row `rows[i]` is right at every position from `starts[i]` to before `ends[i]`."""
    mistakes = np.cumsum(~right, axis=1, dtype=np.int64)
    mistakes = np.concatenate([np.zeros((len(right), 1), np.int64), mistakes], axis=1)
    return mistakes[rows, ends] == mistakes[rows, starts]


def padded_length(length: int | np.ndarray, longest: int, shortest: int = SHORTEST_ROW) -> np.ndarray:
    """The row length that an item is padded to: `shortest` times a power of two, or `longest`.

    So the number of shapes to compile grows with the logarithm of the longest item only.
    """
    exponent = np.ceil(np.log2(np.maximum(length, shortest) / shortest)).astype(np.int64)
    return np.minimum(shortest * 2**exponent, longest)


def length_buckets(
    lengths: Int[np.ndarray, " n"], keep: Bool[np.ndarray, " n"], longest: int, shortest: int = SHORTEST_ROW
) -> Mapping[int, Int[np.ndarray, " m"]]:
    """Indices of the kept items by `padded_length`."""
    padded = padded_length(lengths, longest, shortest)
    return {int(length): np.flatnonzero(keep & (padded == length)) for length in np.unique(padded[keep])}


def _padded(tokens: Sequence[Sequence[int]], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """One example a row, right-padded: inputs are all but its last token, targets all but its first."""
    inputs = np.full((len(tokens), length), pad_id, np.int32)
    targets, segment_ids = inputs.copy(), np.zeros_like(inputs)
    for row, ids in enumerate(tokens):
        inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        segment_ids[row, : len(ids) - 1] = 1
    return {"inputs": inputs, "targets": targets, "segment_ids": segment_ids}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    return float(np.sum(numerators) / np.sum(denominators)) if len(denominators) else math.nan


def ratio_standard_error(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """Standard error of sum(numerators) / sum(denominators) over independent items (linearized ratio estimator).

    With denominators of one it is that of a mean; with 0 and 1 as numerators besides, the binomial one (with n - 1).
    NaN for fewer than two items.
    """
    count = len(numerators)
    if count < 2:
        return math.nan
    residuals = numerators - numerators.sum() / denominators.sum() * denominators
    return float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / denominators.sum())
