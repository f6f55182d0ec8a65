"""Teacher-forced scores against a computation that is one example, one token at a time."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.data import Example
from jaxmoe.evaluation import TaskScore, evaluate, forward, greedy_answers, score_each, score_examples
from jaxmoe.evaluation.forward import Evaluator, batches_of
from jaxmoe.evaluation.scoring import ExampleScores, length_buckets, ratio_standard_error, value_tokens
from jaxmoe.models import Decoder

CONFIG = ModelConfig(
    vocab_size=50, width=16, num_layers=2, num_heads=2, max_sequence_length=40, init_std=0.4,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=8),
)  # fmt: skip


class Numbers:
    """A tokenizer of which the test chooses every id: "5 6" is [5, 6]. `8 9` together merge into 48."""

    vocab_size, pad_id, bos_id, eos_id, fingerprint = 50, 0, None, 1, "numbers"

    def encode(self, text):
        return [int(word) for word in text.replace("8 9", "48").split()]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts):
        return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids):
        return "".join(f" {i}" for i in ids)


def sequence(random, length):
    return "".join(f" {i}" for i in random.integers(10, 48, length))


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def examples():
    random = np.random.default_rng(0)
    lengths = [(1, 1), (3, 2), (5, 12), (10, 6), (12, 20), (2, 30), (7, 1)]
    return [Example(sequence(random, prompt), sequence(random, answer)) for prompt, answer in lengths]


@nnx.jit
def forward_pass(model, tokens):
    return model(tokens).logits


def brute_force(model, example):
    """(nats of the answer, tokens of it, tokens right), from the logits of the one row, unpadded."""
    tokenizer = Numbers()
    tokens = tokenizer.encode(example.prompt + example.answer)
    begin = len(tokenizer.encode(example.prompt))
    row = np.zeros((1, 64), np.int32)  # what follows a token does not change what the model says at it
    row[0, : len(tokens)] = tokens
    logits = np.asarray(forward_pass(model, row)[0], np.float64)
    nll, right = 0.0, 0
    for place in range(begin, len(tokens)):
        scores = logits[place - 1]
        nll -= scores[tokens[place]] - math.log(np.sum(np.exp(scores - scores.max()))) - scores.max()
        right += int(np.argmax(scores) == tokens[place])
    return nll, len(tokens) - begin, right


def test_scores_equal_a_token_by_token_computation(model, examples):
    scores = score_each(model, examples, Numbers(), batch_size=4)
    expected = [brute_force(model, example) for example in examples]
    np.testing.assert_allclose(scores.nll, [nll for nll, _, _ in expected], rtol=2e-5)
    np.testing.assert_array_equal(scores.answer_tokens, [tokens for _, tokens, _ in expected])
    np.testing.assert_array_equal(scores.correct_tokens, [right for _, _, right in expected])
    np.testing.assert_array_equal(scores.answer_bytes, [len(example.answer.encode()) for example in examples])
    assert scores.skipped == 0


def test_scores_do_not_depend_on_the_batch(model, examples):
    together = score_each(model, examples, Numbers(), batch_size=4)
    alone = np.array([score_each(model, [example], Numbers(), batch_size=1).nll[0] for example in examples[:3]])
    np.testing.assert_allclose(together.nll[:3], alone, rtol=1e-5)


def test_examples_longer_than_rows_of_training_are_counted(model, examples):
    """A row of n tokens has n - 1 input positions; lengths are 2, 5, 17, 16, 32, 32 and 8 tokens."""
    count = score_examples(model, examples, Numbers(), training_length=16).examples_beyond_training_length
    assert count == 2
    assert score_examples(model, examples, Numbers(), training_length=31).examples_beyond_training_length == 0


def test_a_source_and_split_is_warned_of_once(caplog):
    for _ in range(2):
        evaluate._warn_of_extrapolation("sums", "test", 3, 10, 12)
    (message,) = caplog.messages
    assert "sums (test): 3 of 10 examples are longer than train.sequence_length=12" in message


def test_macro_and_pooled_means_are_what_they_say():
    scores = ExampleScores(
        nll=np.array([math.log(2) * 4, math.log(2) * 3]),
        answer_tokens=np.array([4, 1]),
        answer_bytes=np.array([8, 2]),
        correct_tokens=np.array([1, 1]),
        values=np.array([3, 0]),
        correct_values=np.array([1, 0]),
        index=np.arange(2),
        positions=np.array([9, 10]),
        skipped=0,
        dropped_fraction=0.0,
    )
    score = TaskScore.from_examples(scores)
    assert score.bits_per_token == pytest.approx((4 / 4 + 3 / 1) / 2)
    assert score.bits_per_byte == pytest.approx((4 / 8 + 3 / 2) / 2)
    assert score.loss == pytest.approx(7 * math.log(2) / 5)
    assert score.token_accuracy == pytest.approx(2 / 5)
    assert score.examples_beyond_training_length == 0
    assert TaskScore.from_examples(scores, training_length=9).examples_beyond_training_length == 1
    assert score.exact_match == pytest.approx(1 / 2)
    assert score.value_recall == pytest.approx(1 / 3)
    assert (score.examples, score.answer_tokens, score.answer_bytes, score.values) == (2, 5, 10, 3)


def test_a_value_is_recalled_when_all_of_its_tokens_are_right(model):
    """Values of one, two and three tokens; the fixed tokens between them count for nothing."""
    random = np.random.default_rng(4)
    prompt = sequence(random, 3)
    (written,) = greedy_answers(model, [prompt], Numbers(), max_new_tokens=9)
    words = [f" {word}" for word in written.text.split()]
    assert len(words) == 9
    assert "8 9" not in written.text
    places = [len("".join(words[:number])) for number in range(10)]
    values = ((places[0], places[1]), (places[2], places[4]), (places[5], places[8]))

    def recall(*changed):
        """Of the three values, with other tokens than the model writes at some places; the last is not followed."""
        other = [" 47" if word == " 49" else " 49" for word in words]
        answer = "".join(other[number] if number in changed else word for number, word in enumerate(words))
        right = brute_force_right(model, prompt, answer)
        expected = [all(right[begin:end]) for begin, end in ((0, 1), (2, 4), (5, 8))]
        score = score_examples(model, [Example(prompt, answer, values=values)], Numbers())
        assert score.values == 3
        assert score.value_recall == pytest.approx(sum(expected) / 3)
        return expected

    assert recall() == [True, True, True]
    assert recall(8) == [True, True, True]
    assert recall(7) == [True, True, False]
    assert recall(0)[0] is False


def brute_force_right(model, prompt, answer):
    """Whether each token of an answer is the likeliest."""
    tokens = Numbers().encode(prompt + answer)
    row = np.zeros((1, 64), np.int32)
    row[0, : len(tokens)] = tokens
    likeliest = np.asarray(forward_pass(model, row)[0]).argmax(-1)
    return [bool(likeliest[place - 1] == tokens[place]) for place in range(len(prompt.split()), len(tokens))]


def test_values_stand_where_the_tokens_before_them_end():
    """A value merged with what is before it ("8" + " 9") is the next token; it never reaches past the text."""
    examples = [
        Example("7", " 5 6 8 9", values=((0, 2), (2, 4))),
        Example("7", " 8 9", values=((2, 4),)),
        Example("7 7", " 5"),
    ]
    counts = np.array([len(Numbers().encode(example.prompt + example.answer)) for example in examples])
    assert counts.tolist() == [4, 2, 3]
    owner, starts, ends = value_tokens(Numbers(), examples, counts)
    assert list(zip(owner.tolist(), starts.tolist(), ends.tolist())) == [(0, 1, 2), (0, 2, 3), (1, 1, 2)]
    assert [array.size for array in value_tokens(Numbers(), examples[2:], counts[2:])] == [0, 0, 0]


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(examples):
    silent = Decoder(dataclasses.replace(CONFIG, init_std=1e-12, residual_init="same"), rngs=nnx.Rngs(0))
    score = score_examples(silent, examples, Numbers())
    assert score.bits_per_token == pytest.approx(math.log2(50), rel=1e-6)
    assert score.loss == pytest.approx(math.log(50), rel=1e-6)
    assert score.bits_per_token_standard_error < 1e-5


def test_exact_match_under_teacher_forcing_is_that_of_greedy_decoding(model):
    random = np.random.default_rng(1)
    prompts = [sequence(random, length) for length in (2, 3, 5, 6, 9, 11, 4, 8, 2, 3)]
    written = zip(prompts, greedy_answers(model, prompts, Numbers(), max_new_tokens=4))
    whole = [(prompt, answer.text) for prompt, answer in written if not answer.finished and "8 9" not in answer.text]
    assert len(whole) >= 6
    examples, expected = [], []
    for number, (prompt, text) in enumerate(whole[:6]):
        other = " 49" if text.split()[number % 3] != "49" else " 47"
        words = text.split()
        words[number % 3] = other.strip()
        examples.append(Example(prompt, text if number % 2 else " " + " ".join(words)))
        expected.append(number % 2 == 1)
    scores = score_each(model, examples, Numbers())
    np.testing.assert_array_equal(scores.correct_tokens == scores.answer_tokens, expected)
    assert score_examples(model, examples, Numbers()).exact_match == 0.5


def test_the_boundary_is_the_prompts_number_of_tokens(model):
    """A merge across the boundary moves it: "8" + " 9 10" is two tokens, the first of them not counted."""
    merged = Example("7 8", " 9 10")
    scores = score_each(model, [merged, Example("7 8", " 9")], Numbers())
    assert Numbers().encode("7 8 9 10") == [7, 48, 10]
    np.testing.assert_array_equal(scores.answer_tokens, [1])
    np.testing.assert_allclose(scores.nll, [brute_force(model, merged)[0]], rtol=2e-5)
    assert scores.skipped == 1, "an answer that merged away has nothing to score"


def test_too_long_and_promptless_examples_are_skipped_and_counted(model, examples):
    random = np.random.default_rng(2)
    extra = [Example(sequence(random, 20), sequence(random, 30)), Example("", sequence(random, 3))]
    scores = score_each(model, [extra[0], *examples[:2], extra[1]], Numbers())
    np.testing.assert_array_equal(scores.index, [1, 2])
    assert scores.skipped == 2
    fits = Example(sequence(random, 1), sequence(random, CONFIG.max_sequence_length))
    assert score_each(model, [fits], Numbers()).skipped == 0


def test_capacity_limits_do_not_reach_the_evaluation(model, examples):
    limited = Decoder(
        dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, capacity_factor=0.3)), rngs=nnx.Rngs(3)
    )
    assert float(limited(jnp.full((2, 8), 11)).router.dropped.sum()) > 0
    score = score_examples(limited, examples, Numbers(), batch_size=4)
    assert score.dropped_fraction == 0.0
    assert score == score_examples(model, examples, Numbers(), batch_size=4)


def test_the_dropped_share_is_read_from_the_routers(model):
    evaluator = Evaluator(model)
    inputs = np.full((2, 16), 11, np.int32)
    evaluator({"inputs": inputs, "targets": inputs, "segment_ids": np.ones_like(inputs)})
    assert evaluator.statistics.expert_count.sum() == CONFIG.num_layers * 2 * 16 * CONFIG.moe.experts_per_token
    assert evaluator.dropped_fraction == 0.0


def test_no_examples_give_no_number(model):
    score = score_examples(model, [], Numbers())
    assert score.examples == 0
    assert math.isnan(score.loss)
    assert math.isnan(score.exact_match)


def test_members_that_differ_in_their_seed_share_what_is_compiled(model, examples):
    score_each(model, examples, Numbers(), batch_size=4)
    before = forward._compiled(None)._cache_size()
    score_each(Decoder(CONFIG, rngs=nnx.Rngs(9)), examples, Numbers(), batch_size=4)
    assert forward._compiled(None)._cache_size() == before


def test_a_vocabulary_too_large_for_memory_is_taken_in_parts(monkeypatch, examples):
    config = dataclasses.replace(CONFIG, num_layers=1)
    whole = score_each(Decoder(config, rngs=nnx.Rngs(0)), examples, Numbers(), batch_size=4)
    monkeypatch.setattr(forward, "ELEMENTS", 500)
    forward._compiled.cache_clear()
    parts = score_each(Decoder(config, rngs=nnx.Rngs(0)), examples, Numbers(), batch_size=4)
    forward._compiled.cache_clear()
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-5)


@pytest.mark.parametrize(("rows", "length", "expected"), [(128, 16, 128), (128, 4096, 2), (6, 16, 6)])
def test_rows_together_respect_memory(model, rows, length, expected):
    """Attention scores: 2 heads · 4096^2 per row, so one row of 2^25 numbers; 16 positions bother nobody."""
    evaluator = Evaluator(model)
    together = evaluator.rows_together(rows, length)
    assert together == (expected if length < 4096 else 1)


def test_rows_are_as_long_as_an_attention_that_was_asked_for_takes_them(model):
    """Splash refuses rows of 16 positions, which most tasks have."""
    assert Evaluator(model).shortest_row == 16
    splash = Decoder(dataclasses.replace(CONFIG, attention="splash"), rngs=nnx.Rngs(3))
    assert Evaluator(splash).shortest_row == 128
    lengths = np.array([3, 128, 129, 1000])
    assert list(length_buckets(lengths, lengths > 0, 1024, shortest=128)) == [128, 256, 1024]


@given(st.lists(st.integers(1, 200), max_size=40), st.integers(16, 150))
def test_buckets_hold_every_item_that_fits_once(lengths, longest):
    lengths = np.array(lengths, np.int64)
    buckets = length_buckets(lengths, lengths <= longest, longest)
    found = np.sort(np.concatenate([*buckets.values(), np.zeros(0, np.int64)]))
    np.testing.assert_array_equal(found, np.flatnonzero(lengths <= longest))
    for padded, members in buckets.items():
        assert padded <= longest
        assert (lengths[members] <= padded).all()
    assert len(buckets) <= 2 + math.log2(longest / 16)


@given(st.integers(0, 50), st.integers(1, 8))
def test_batches_cover_every_item_in_order(count, rows):
    covered = []
    for indices, present in batches_of(count, rows):
        assert len(indices) == rows
        covered += indices[:present].tolist()
    assert covered == list(range(count))


def test_standard_errors():
    right = np.array([1, 1, 1, 0, 0, 1, 0, 1, 1, 1.0])
    assert ratio_standard_error(right, np.ones(10)) == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
    values = np.array([1.0, 2.0, 4.0])
    assert ratio_standard_error(values, np.ones(3)) == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert ratio_standard_error(2 * np.array([1, 3, 2]), np.array([1, 3, 2])) == pytest.approx(0)
    assert math.isnan(ratio_standard_error(np.array([1.0]), np.ones(1)))
