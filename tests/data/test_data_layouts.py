"""Layouts: every row against a plain loop over tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.data.layouts import Documents, PackedLayout, PaddedLayout
from jaxmoe.data.seeding import generator

PAD, END = 0, 1


@st.composite
def corpora(draw, longest=12):
    """Documents of distinct ids, each with an answer start."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=8))
    first = np.cumsum([0, *lengths]) + 2
    tokens = [np.arange(first[i], first[i + 1], dtype=np.int32) for i in range(len(lengths))]
    starts = [draw(st.integers(0, length)) for length in lengths]
    return Documents.from_arrays(tokens, END, np.array(starts, np.int32))


def unpacked(documents, order):
    """(token, weight, document, place) of every token of the stream."""
    for d in order:
        for place in range(documents.lengths[d]):
            weight = 1.0 if place >= documents.answer_starts[d] else 0.25
            yield documents.tokens[documents.starts[d] + place], weight, d, place


def expected_row(pieces, sequence_length):
    """One row from at most S+1 pieces, by the definition."""
    row = {key: [] for key in ("inputs", "targets", "loss_weights", "positions", "segment_ids")}
    segment, position = 0, 0
    for i in range(sequence_length):
        if i + 1 >= len(pieces):
            for key in row:
                row[key].append(0)
            continue
        (token, _, document, _), (target, weight, _, _) = pieces[i], pieces[i + 1]
        if i == 0 or pieces[i - 1][2] != document:
            segment, position = segment + 1, 0
        row["inputs"].append(token)
        row["targets"].append(target)
        row["loss_weights"].append(weight)
        row["positions"].append(position)
        row["segment_ids"].append(segment)
        position += 1
    return row


def assert_row(batch, row, expected):
    for key, values in expected.items():
        np.testing.assert_array_equal(batch[key][row], values, err_msg=f"{key} of row {row}")


@settings(max_examples=200)
@given(corpora(), st.integers(1, 9), st.integers(0, 3))
def test_packed_rows_cut_the_stream(documents, sequence_length, seed):
    layout = PackedLayout(documents, sequence_length, PAD, prompt_weight=0.25)
    arrangement = layout.arrange(generator(seed))
    stream = list(unpacked(documents, arrangement.order))
    assert layout.token_count == len(stream) - 1
    assert layout.row_count == -(-(len(stream) - 1) // sequence_length)
    batch = arrangement.rows(np.arange(layout.row_count))
    for row, place in enumerate(arrangement.row_order):
        pieces = stream[place * sequence_length : (place + 1) * sequence_length + 1]
        assert_row(batch, row, expected_row(pieces, sequence_length))


@settings(max_examples=100)
@given(corpora(), st.integers(1, 9), st.integers(0, 3))
def test_packed_rows_predict_every_token_but_the_first_once(documents, sequence_length, seed):
    layout = PackedLayout(documents, sequence_length, PAD)
    arrangement = layout.arrange(generator(seed))
    batch = arrangement.rows(np.arange(layout.row_count))
    predicted = batch["targets"][batch["segment_ids"] > 0]
    stream = [token for token, *_ in unpacked(documents, arrangement.order)]
    assert sorted(predicted) == sorted(stream[1:])
    assert [(batch["segment_ids"][:row] > 0).sum() for row in range(layout.row_count + 1)] == [
        arrangement.tokens_before(row) for row in range(layout.row_count + 1)
    ]


@settings(max_examples=100)
@given(corpora(), st.integers(0, 4), st.integers(0, 3))
def test_padded_rows_hold_one_document_each(documents, spare, seed):
    sequence_length = int(documents.lengths.max()) - 1 + spare
    if sequence_length == 0:
        return
    layout = PaddedLayout(documents, sequence_length, PAD, prompt_weight=0.25)
    arrangement = layout.arrange(generator(seed))
    assert sorted(arrangement.order) == list(range(len(documents)))
    batch = arrangement.rows(np.arange(layout.row_count))
    for row, document in enumerate(arrangement.order):
        assert_row(batch, row, expected_row(list(unpacked(documents, [document])), sequence_length))
    tokens = (batch["segment_ids"] > 0).sum(axis=1)
    assert layout.token_count == tokens.sum()
    assert [arrangement.tokens_before(row) for row in range(layout.row_count + 1)] == [0, *np.cumsum(tokens)]


def test_without_a_generator_the_order_is_that_of_the_documents():
    documents = Documents.from_arrays([np.array([5, 6]), np.array([7])], END)
    packed = PackedLayout(documents, 4, PAD).arrange(None).rows(np.array([0]))
    assert packed["inputs"].tolist() == [[5, 6, 1, 7]]
    assert packed["targets"].tolist() == [[6, 1, 7, 1]]
    assert packed["positions"].tolist() == [[0, 1, 2, 0]]
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 2]]
    padded = PaddedLayout(documents, 3, PAD).arrange(None).rows(np.array([1, 0]))
    assert padded["inputs"].tolist() == [[7, 0, 0], [5, 6, 0]]
    assert padded["targets"].tolist() == [[1, 0, 0], [6, 1, 0]]


def test_selected_documents_keep_their_tokens_and_answers():
    documents = Documents.from_arrays([np.array([5]), np.array([6, 7])], END, np.array([0, 1], np.int32))
    chosen = documents.select(np.array([False, True]))
    rows = PaddedLayout(chosen, 2, PAD, prompt_weight=0.5).arrange(None).rows(np.array([0]))
    assert rows["inputs"].tolist() == [[6, 7]]
    assert rows["targets"].tolist() == [[7, 1]]
    assert rows["loss_weights"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("layout", [PackedLayout, PaddedLayout])
def test_types(layout):
    documents = Documents.from_arrays([np.arange(2, 6)], END)
    batch = layout(documents, 4, PAD).arrange(None).rows(np.array([0]))
    types = {key: values.dtype.name for key, values in batch.items()}
    assert types == {
        "inputs": "int32", "targets": "int32", "loss_weights": "float32", "positions": "int32", "segment_ids": "int32",
    }
