"""Layouts: how tokenized documents become rows of S inputs and S targets.

A row holds S+1 tokens; inputs are the first S, targets the last S. `PaddedLayout` puts one document in a row,
`PackedLayout` concatenates them. A position counts as a token when its target is one: everything else is padding,
with input pad_id, loss weight 0 and segment 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Batch = dict[str, np.ndarray]
"""Arrays of (rows, S): inputs, targets, positions, segment_ids int32, loss_weights float32; source (rows,) int32."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenized documents, end token included, in one flat array.

    Attributes:
      tokens: (total,) integers; may be memory-mapped.
      starts: (documents,) int64 where each begins in `tokens`.
      lengths: (documents,) int64 tokens of each, end token included.
      answer_starts: (documents,) where the answer begins within each document, counted in tokens; None: at 0.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    answer_starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def select(self, chosen: np.ndarray) -> Documents:
        """Some of the documents, by index or mask, over the same tokens."""
        answer_starts = None if self.answer_starts is None else self.answer_starts[chosen]
        return Documents(self.tokens, self.starts[chosen], self.lengths[chosen], answer_starts)

    def digest(self) -> bytes:
        """A hash of all tokens, for documents in memory."""
        sha = hashlib.sha256(np.ascontiguousarray(self.tokens))
        sha.update(np.ascontiguousarray(self.lengths))
        return sha.digest()

    @classmethod
    def from_arrays(cls, tokens: Sequence[np.ndarray], end: int, answer_starts: np.ndarray | None = None) -> Documents:
        """Documents from the ids of each, to which `end` is added."""
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens)) + 1
        flat = np.full(lengths.sum(), end, np.int32)
        starts = np.cumsum(lengths) - lengths
        if len(flat):
            within = np.ones(len(flat), bool)
            within[starts + lengths - 1] = False
            flat[within] = np.concatenate(tokens)
        return cls(flat, starts, lengths, answer_starts)


class Arrangement(Protocol):
    """The rows of one epoch."""

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows at `indices`, each in [0, row_count)."""

    def tokens_before(self, row: int) -> int:
        """Tokens (predicted positions) of rows 0..row-1."""


class Layout(Protocol):
    """Documents as `row_count` rows with `token_count` predicted positions in all."""

    @property
    def row_count(self) -> int:
        """Rows of an epoch."""

    @property
    def token_count(self) -> int:
        """Predicted positions of an epoch."""

    def arrange(self, random: np.random.Generator | None) -> Arrangement:
        """The rows in an order drawn from `random`, or in that of the documents."""


@dataclasses.dataclass(frozen=True)
class PaddedLayout:
    """One document a row, padded at the end. Documents are at most S+1 tokens long."""

    documents: Documents
    sequence_length: int
    pad_id: int
    prompt_weight: float = 1.0

    @property
    def row_count(self) -> int:
        """Rows of an epoch: one a document."""
        return len(self.documents)

    @property
    def token_count(self) -> int:
        """Predicted positions of an epoch: all tokens but the first of each document."""
        return int(self.documents.lengths.sum()) - len(self.documents)

    def arrange(self, random: np.random.Generator | None) -> PaddedArrangement:
        """The rows in an order drawn from `random`, or in that of the documents."""
        return PaddedArrangement(self, _order(random, self.row_count))


@dataclasses.dataclass(frozen=True)
class PaddedArrangement:
    """Row r is document order[r]."""

    layout: PaddedLayout
    order: np.ndarray

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows at `indices`, each in [0, row_count)."""
        documents, layout = self.layout.documents, self.layout
        chosen = self.order[indices]
        starts, lengths = documents.starts[chosen, None], documents.lengths[chosen, None]
        place = np.arange(layout.sequence_length + 1)
        tokens = documents.tokens[np.minimum(starts + place, len(documents.tokens) - 1)].astype(np.int32)
        predicted = place[1:] < lengths
        weights = predicted.astype(np.float32)
        if documents.answer_starts is not None:
            in_prompt = place[1:] < documents.answer_starts[chosen][:, None]
            weights[in_prompt] *= layout.prompt_weight
        return {
            "inputs": np.where(predicted, tokens[:, :-1], np.int32(layout.pad_id)),
            "targets": np.where(predicted, tokens[:, 1:], np.int32(layout.pad_id)),
            "loss_weights": weights,
            "positions": np.where(predicted, place[:-1], 0).astype(np.int32),
            "segment_ids": predicted.astype(np.int32),
        }

    def tokens_before(self, row: int) -> int:
        """Predicted positions of rows 0..row-1."""
        return int((self.layout.documents.lengths[self.order[:row]] - 1).sum())


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """Documents one after the other, cut into rows; an epoch draws the order of both.

    Neighbouring rows share one token, the last target of one being the first input of the next, so every token of
    the stream but its first is predicted exactly once an epoch. The last row is padded. A document may be cut.
    """

    documents: Documents
    sequence_length: int
    pad_id: int
    prompt_weight: float = 1.0

    @property
    def token_count(self) -> int:
        """Predicted positions of an epoch: all tokens of the stream but its first."""
        return max(int(self.documents.lengths.sum()) - 1, 0)

    @property
    def row_count(self) -> int:
        """Rows of an epoch, the last of them perhaps padded."""
        return -(-self.token_count // self.sequence_length)

    def arrange(self, random: np.random.Generator | None) -> PackedArrangement:
        """Documents in an order drawn from `random` and their rows in another, or both as they come."""
        order = _order(random, len(self.documents))
        starts = np.concatenate([[0], np.cumsum(self.documents.lengths[order])])
        return PackedArrangement(self, order, starts, _order(random, self.row_count))


@dataclasses.dataclass(frozen=True)
class PackedArrangement:
    """The stream of documents order[0], order[1], ..., cut into rows that come in `row_order`.

    `starts` (documents + 1,) is where each document begins in the stream.
    """

    layout: PackedLayout
    order: np.ndarray
    starts: np.ndarray
    row_order: np.ndarray

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows at `indices`, each in [0, row_count)."""
        layout, documents = self.layout, self.layout.documents
        width = layout.sequence_length + 1
        row_begin = self.row_order[indices] * layout.sequence_length
        row_end = np.minimum(row_begin + width, self.starts[-1])

        # One piece for each document that a row touches; pieces of a row follow one another.
        first = np.searchsorted(self.starts, row_begin, side="right") - 1
        last = np.searchsorted(self.starts, row_end, side="left") - 1
        pieces = last - first + 1
        row = np.repeat(np.arange(len(row_begin)), pieces)
        ordinal = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        document = first[row] + ordinal
        begin = np.maximum(self.starts[document], row_begin[row])
        length = np.minimum(self.starts[document + 1], row_end[row]) - begin
        skipped = begin - self.starts[document]  # tokens of the document that lie in earlier rows

        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        target = np.repeat(row * width + begin - row_begin[row], length) + within
        source = np.repeat(documents.starts[self.order[document]] + skipped, length) + within

        tokens = np.full(len(row_begin) * width, layout.pad_id, np.int32)
        tokens[target] = documents.tokens[source]
        segments = np.zeros(len(tokens), np.int32)
        segments[target] = np.repeat(ordinal + 1, length)
        positions = np.zeros(len(tokens), np.int32)
        positions[target] = within
        weights = np.zeros(len(tokens), np.float32)
        weights[target] = 1
        if documents.answer_starts is not None:
            in_prompt = within + np.repeat(skipped - documents.answer_starts[self.order[document]], length) < 0
            weights[target[in_prompt]] = layout.prompt_weight

        tokens, segments, positions, weights = (a.reshape(-1, width) for a in (tokens, segments, positions, weights))
        predicted = segments[:, 1:] > 0
        return {
            "inputs": np.where(predicted, tokens[:, :-1], np.int32(layout.pad_id)),
            "targets": tokens[:, 1:].copy(),
            "loss_weights": weights[:, 1:].copy(),
            "positions": np.where(predicted, positions[:, :-1], 0).astype(np.int32),
            "segment_ids": np.where(predicted, segments[:, :-1], 0).astype(np.int32),
        }

    def tokens_before(self, row: int) -> int:
        """Predicted positions of rows 0..row-1; only the last row of the stream has padding."""
        length, last = self.layout.sequence_length, self.layout.row_count - 1
        padding = (last + 1) * length - self.layout.token_count
        return row * length - padding * int((self.row_order[:row] == last).any())


def _order(random: np.random.Generator | None, count: int) -> np.ndarray:
    return np.arange(count) if random is None else random.permutation(count)
