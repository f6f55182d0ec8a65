"""The mixture: exact proportions, exact accounts, the same batches on any number of hosts."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.config import ConfigError, DataConfig, KnowledgeSource, QuestionAnswerSource, ReasoningSource, TextSource
from jaxmoe.data import Mixture, describe_accounting
from jaxmoe.data.mixture import LONGEST_PERIOD, Pattern, whole_proportions

WEIGHTS = st.lists(
    st.one_of(st.integers(0, 9).map(float), st.sampled_from([0.1, 0.25, 1 / 3, 0.7, 1e-3, math.pi])),
    min_size=1, max_size=6,
).filter(any)


def small_sources(tmp_path):
    """Sources of every kind, small enough for many epochs in few steps."""
    text = "".join(json.dumps({"text": f"document {i} " * (i % 5 + 1)}) + "\n" for i in range(20))
    (tmp_path / "text.jsonl").write_text(text)
    questions = "".join(json.dumps({"question": f"q{i}" * (i + 1), "answer": f"#### {i}"}) + "\n" for i in range(9))
    (tmp_path / "questions.jsonl").write_text(questions)
    questions = str(tmp_path / "questions.jsonl")
    return {
        "facts": KnowledgeSource(entities=7, test_entities=2, attributes=3, symbols=8),
        "sums": ReasoningSource(problems=11, test_problems=2),
        "text": TextSource(paths=(str(tmp_path / "text.jsonl"),), test_fraction=0.1),
        "packed": QuestionAnswerSource(train_paths=(questions,)),
        "padded": QuestionAnswerSource(train_paths=(questions,), packed=False),
    }


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    sources = small_sources(folder)

    def make(weights, *, batch_size=12, sequence_length=64, steps=40, seed=0, **options):
        weighted = {
            name: type(source)(**{**vars(source), "weight": weight})
            for (name, source), weight in zip(sources.items(), weights)
        }
        data = DataConfig(sources=weighted, cache_dir=str(folder / "cache"))
        return Mixture(data, batch_size=batch_size, sequence_length=sequence_length, steps=steps, seed=seed, **options)

    return make


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@given(WEIGHTS, st.integers(0, 3), st.integers(0, 2000))
def test_the_pattern_numbers_the_rows_of_each_source_in_turn(weights, periods, more):
    pattern = Pattern(weights)
    first = periods * pattern.period
    rows = np.arange(first, first + more + 1)
    source, number = pattern(rows)
    seen = pattern.rows_before(first)
    for s in range(len(weights)):
        own = number[source == s]
        np.testing.assert_array_equal(own, seen[s] + np.arange(len(own)))
    np.testing.assert_array_equal(
        pattern.rows_before(first + more + 1), seen + np.bincount(source, minlength=len(weights))
    )


@given(WEIGHTS)
def test_no_stretch_of_rows_is_far_from_the_proportions(weights):
    pattern = Pattern(weights)
    rows = np.arange(min(pattern.period, 3000))
    source, _ = pattern(rows)
    share = pattern.counts / pattern.period
    counted = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    deviation = np.abs(counted - (rows[:, None] + 1) * share)
    assert deviation.max() <= 1 + len(weights) / 2


@given(WEIGHTS)
def test_proportions_are_the_weights(weights):
    counts = whole_proportions(weights)
    shares = np.array(weights) / sum(weights)
    assert counts.sum() <= LONGEST_PERIOD
    assert ((counts > 0) == (shares > 0)).all()
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=1 / LONGEST_PERIOD)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((1.0, 1.0), [1, 1]), ((0.3, 0.7), [3, 7]), ((1 / 3, 2 / 3), [1, 2]), ((50.0, 0.0, 25.0), [2, 0, 1]),
        ((0.1, 0.2, 0.7), [1, 2, 7]), ((4e9, 2e9), [2, 1]), ((1.0, 1e-12), [LONGEST_PERIOD - 1, 1]),
    ],
)
def test_simple_weights_are_exact(weights, counts):
    assert whole_proportions(weights).tolist() == counts


def test_equal_weights_alternate():
    source, number = Pattern([1.0, 1.0])(np.arange(6))
    assert source.tolist() == [0, 1, 0, 1, 0, 1]
    assert number.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_batch_of_the_recipe_is_half_knowledge_half_reasoning():
    data = DataConfig(
        tokenizer="symbols", sources={"knowledge": KnowledgeSource(), "reasoning": ReasoningSource(corruption=0.2)}
    )
    mixture = Mixture(data, batch_size=128, sequence_length=16, steps=1200, seed=0)
    assert np.bincount(mixture.batch(777)["source"]).tolist() == [64, 64]
    accounts = mixture.accounting()
    knowledge, reasoning = accounts["knowledge"], accounts["reasoning"]
    assert (knowledge.rows, knowledge.tokens, knowledge.epochs) == (76_800, 1_228_800, 19.2)
    assert (reasoning.rows, reasoning.tokens, reasoning.epochs) == (76_800, 921_600, 25.6)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=5, max_size=5).filter(any),
    batch_size=st.integers(1, 13),
    steps=st.integers(0, 30),
    seed=st.integers(0, 2),
)
def test_accounts_equal_a_count_over_the_batches(build, weights, batch_size, steps, seed):
    mixture = build(weights, batch_size=batch_size, seed=seed)
    rows, tokens = np.zeros(5, int), np.zeros(5, int)
    for step in range(steps):
        batch = mixture.batch(step)
        np.add.at(rows, batch["source"], 1)
        np.add.at(tokens, batch["source"], (batch["segment_ids"] > 0).sum(axis=1))
    accounts = mixture.accounting(steps).values()
    assert [account.rows for account in accounts] == rows.tolist()
    assert [account.tokens for account in accounts] == tokens.tolist()
    for account in accounts:
        assert account.epochs == account.rows / account.rows_per_epoch


@pytest.mark.parametrize("hosts", [2, 3, 4, 12])
def test_hosts_together_hold_the_batch_of_one(build, hosts):
    weights = (1.0, 2.0, 1.5, 0.5, 1.0)
    alone = build(weights)
    shares = [build(weights, rows=rows) for rows in np.split(np.arange(12), hosts)]
    for step in (0, 1, 17):
        parts = [share.batch(step) for share in shares]
        together = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert equal(together, alone.batch(step))


def test_a_batch_depends_on_the_step_alone(build):
    mixture, other = build((1.0, 1.0, 1.0, 1.0, 1.0)), build((1.0, 1.0, 1.0, 1.0, 1.0))
    forward = [mixture.batch(step) for step in range(20)]
    for step in (19, 3, 11, 0):
        assert equal(other.batch(step), forward[step])
    assert not equal(forward[0], forward[1])
    assert not equal(build((1.0, 1.0, 1.0, 1.0, 1.0), seed=1).batch(0), forward[0])


def test_the_fingerprint_shows_whatever_changes_a_batch(build):
    weights = (1.0, 1.0, 1.0, 1.0, 1.0)
    fingerprint = build(weights).fingerprint
    assert fingerprint == build(weights, steps=3, rows=range(6)).fingerprint
    others = [
        build(weights, seed=1), build(weights, batch_size=10), build(weights, sequence_length=80),
        build((2.0, 1.0, 1.0, 1.0, 1.0)), build(weights[:4]),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize("name", ["text", "packed", "padded"])
def test_the_fingerprint_shows_that_a_file_changed(name, tmp_path):
    def fingerprint():
        data = DataConfig(sources={name: small_sources_of[name]})
        return Mixture(data, batch_size=2, sequence_length=64, steps=1, seed=0).fingerprint

    small_sources_of = small_sources(tmp_path)
    before = fingerprint()
    assert fingerprint() == before
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace("#### 3", "#### 4").replace("document 3", "document x"))
    assert fingerprint() != before


def test_each_epoch_has_every_row_once(build):
    mixture = build((1.0,), batch_size=7, steps=4)
    epochs = [mixture.batch(step) for step in range(4)]
    names = [sorted(map(tuple, epoch["inputs"].tolist())) for epoch in epochs]
    assert len(set(names[0])) == 7
    assert names.count(names[0]) == 4
    assert len({epoch["inputs"].tobytes() for epoch in epochs}) > 1


def test_a_source_of_weight_0_is_there_to_be_evaluated(build):
    mixture = build((1.0, 0.0))
    assert mixture.source_names == ("facts", "sums")
    assert all((mixture.batch(step)["source"] == 0).all() for step in range(20))
    assert len(mixture.sources[1].examples("test")) == 2
    assert mixture.sources[1].rows([0, 1], "test")["source"].tolist() == [1, 1]
    assert mixture.accounting()["sums"].rows == 0


def test_rows_beyond_a_finite_split_are_an_error(build):
    source = build((1.0,)).sources[0]
    with pytest.raises(IndexError, match=r"'facts', which has 2 test rows"):
        source.rows([2], "test")
    with pytest.raises(ValueError, match="'facts' has no validation rows"):
        source.rows([0], "validation")


def test_only_rows_of_the_batch_can_be_asked_for(build):
    with pytest.raises(ConfigError, match=r"rows=\[11, 12\]; choose of 0..11"):
        build((1.0,), rows=[11, 12])


def test_the_table_of_accounts_names_every_source(build):
    lines = describe_accounting(build((1.0, 3.0)).accounting(10)).splitlines()
    assert [line.split()[0] for line in lines] == ["source", "facts", "sums"]
    assert lines[2].split()[1:3] == ["75.00%", "90"]
    assert len({len(line) for line in lines}) == 1
