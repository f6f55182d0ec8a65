"""Sampling that ends at stop texts: nothing else changes, and a batch ends with its last row."""

import pytest
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.data import load_tokenizer
from jaxmoe.evaluation import generation
from jaxmoe.evaluation.generation import Generated, sample_answers
from jaxmoe.models import Decoder

TOKENIZER = load_tokenizer("symbols")
PROMPTS = ["1+2=", "3+4+5=", "6="]
NEW = 12


@pytest.fixture(scope="module")
def model():
    """Draws digits and signs, at a high temperature almost evenly."""
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=2, dense_hidden=8, max_sequence_length=24,
        init_std=0.3,
    )  # fmt: skip
    return nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


def sampled(model, stops=()):
    """Three samples of each prompt, all in one batch."""
    answers = {}
    for batch in sample_answers(
        model, PROMPTS, TOKENIZER, samples=3, temperature=1.0, max_new_tokens=NEW, batch_size=16, stops=stops
    ):
        answers |= batch
    return [one for number in range(len(PROMPTS)) for one in answers[number]]


@pytest.fixture
def looks(monkeypatch):
    """New tokens of the batch at each look at its texts, of which there is one after every 2 tokens."""
    seen = []
    monkeypatch.setattr(generation, "TOKENS_BETWEEN_LOOKS", 2)
    pieces = generation._compiled_pieces(None)

    def go_on(*arguments):
        decoding = pieces[1](*arguments)
        seen.append(int(decoding.step))
        return decoding

    monkeypatch.setattr(generation, "_compiled_pieces", lambda partitioning: (pieces[0], go_on))
    return seen


def cut(plain, stops):
    """The samples as stop texts of one symbol end them."""
    ends = [min((one.text.find(stop) for stop in stops if stop in one.text), default=None) for one in plain]
    return [
        one if end is None else Generated(one.text[:end], finished=True, tokens=end + 1)
        for one, end in zip(plain, ends, strict=True)
    ]


def test_a_batch_ends_when_all_of_its_rows_have_met_a_stop(model, looks):
    plain = sampled(model)
    stops = tuple(sorted({one.text[4] for one in plain}))
    assert sampled(model, stops) == cut(plain, stops)
    assert looks == [3, 5]


def test_a_row_without_a_stop_is_written_to_its_end(model, looks):
    plain = sampled(model)
    stops = (plain[0].text[4], "no such text")
    found = sampled(model, stops)
    assert found == cut(plain, stops)
    assert [one.finished for one in found].count(False) >= len(found) // 2
    assert looks == [3, 5, 7, 9, 11, 12]


def test_a_stop_text_of_several_tokens_is_found_across_looks(model, looks):
    plain = sampled(model)
    stop = plain[0].text[2:4]
    assert sampled(model, (stop,))[0] == Generated(plain[0].text[:2], finished=True, tokens=4)
    assert looks[-1] == NEW
