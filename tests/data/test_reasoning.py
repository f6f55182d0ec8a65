"""The reasoning task: right solutions, corruption at its rate, no test problem in training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.config import ReasoningSource
from jaxmoe.data import build_source, load_tokenizer
from jaxmoe.data.reasoning import draw_problems, solve, write_problems

RECIPE = ReasoningSource(corruption=0.2)


def steps_of(config, example):
    """(first operand, [(operator, operand), ...], [written result, ...]) read back from the text."""
    digits = 1 if config.modulus <= 10 else 2
    assert example.prompt[0] == "R"
    assert example.prompt[-1] == "="
    body = example.prompt[1:-1]
    first, rest = int(body[:digits]), body[digits:]
    operations = [(rest[i], int(rest[i + 1 : i + 1 + digits])) for i in range(0, len(rest), 1 + digits)]
    results = [int(example.answer[i : i + digits]) for i in range(0, len(example.answer), digits)]
    return first, operations, results


def rule_followed(config, example):
    """Which written results follow from what is written before them."""
    value, operations, results = steps_of(config, example)
    followed = []
    for (operator, operand), written in zip(operations, results, strict=True):
        right = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % config.modulus
        followed.append(right == written)
        value = written
    return followed


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 100), st.integers(1, 5), st.sampled_from(["+", "-*", "+-*", "*+"]), st.integers(0, 5))
def test_clean_solutions_follow_the_rule(modulus, operations, operators, seed):
    distinct = modulus ** (operations + 1) * len(operators) ** operations
    config = ReasoningSource(
        problems=min(20, distinct // 4), test_problems=1, operations=operations, modulus=modulus, operators=operators,
        corruption=1.0,
    )
    drawn = draw_problems(config, seed)
    for split in ("train_clean", "test"):
        for example in write_problems(config, drawn[split]):
            assert all(rule_followed(config, example))


def test_train_and_test_share_no_problem():
    drawn = draw_problems(RECIPE, 0)
    prompts = {split: [example.prompt for example in write_problems(RECIPE, drawn[split])] for split in drawn}
    assert len(set(prompts["train"]) | set(prompts["test"])) == 3000 + 1024
    assert prompts["train"] == prompts["train_clean"]


def test_half_of_a_small_space_is_split_without_overlap():
    config = ReasoningSource(problems=12, test_problems=12, operations=1, modulus=4, operators="+-*")
    drawn = draw_problems(config, 0)
    prompts = [example.prompt for split in ("train", "test") for example in write_problems(config, drawn[split])]
    assert len(set(prompts)) == 24


@pytest.mark.parametrize(("corruption", "modulus"), [(0.2, 10), (0.5, 17), (1.0, 10)])
def test_a_rule_follower_scores_what_the_corruption_leaves(corruption, modulus):
    """Exact match of a rule-following model on the corrupted labels is (1 - p (1 - 1/m))^3."""
    config = ReasoningSource(problems=20_000, test_problems=1, modulus=modulus, corruption=corruption)
    trained_on = write_problems(config, draw_problems(config, 0)["train"])
    followed = np.array([rule_followed(config, example) for example in trained_on])
    step = 1 - corruption * (1 - 1 / modulus)
    for observed, expected in ((followed, step), (followed.all(axis=1), step**3)):
        assert abs(observed.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / observed.size)


def test_a_corrupted_result_is_calculated_on_from():
    results = solve(np.array([[3, 4, 2]]), np.array([[0, 1]]), "+*", 10, np.array([[5, -1]]))
    assert results.tolist() == [[5, 0]]
    assert solve(np.array([[3, 4, 2]]), np.array([[0, 1]]), "+*", 10).tolist() == [[7, 4]]


def test_without_corruption_the_training_split_is_clean():
    config = ReasoningSource()
    drawn = draw_problems(config, 0)
    np.testing.assert_array_equal(drawn["train"].results, drawn["train_clean"].results)


def test_corruption_changes_the_solutions_alone():
    noisy, clean = draw_problems(RECIPE, 0), draw_problems(ReasoningSource(), 0)
    np.testing.assert_array_equal(noisy["train"].numbers, clean["train"].numbers)
    np.testing.assert_array_equal(noisy["train_clean"].results, clean["train"].results)
    np.testing.assert_array_equal(noisy["test"].results, clean["test"].results)


@pytest.mark.parametrize("modulus", [2, 10, 11, 100])
def test_all_texts_have_one_length_and_fit_the_symbols(modulus):
    config = ReasoningSource(problems=40, test_problems=20, modulus=modulus)
    tokenizer = load_tokenizer("symbols")
    examples = [e for problems in draw_problems(config, 0).values() for e in write_problems(config, problems)]
    digits = 1 if modulus <= 10 else 2
    assert {len(e.prompt) for e in examples} == {2 + 4 * digits + 3}
    assert {len(e.answer) for e in examples} == {3 * digits}
    assert all(tokenizer.decode(tokenizer.encode(e.prompt + e.answer)) == e.prompt + e.answer for e in examples)


def test_a_row_of_the_recipe():
    """12 of 16 positions are tokens; the statement weighs a tenth of the solution."""
    source = build_source("r", RECIPE, load_tokenizer("symbols"), sequence_length=16, run_seed=0)
    batch = source.rows(np.arange(64))
    assert (batch["segment_ids"] == [1] * 12 + [0] * 4).all()
    np.testing.assert_allclose(batch["loss_weights"], np.tile([0.1] * 8 + [1.0] * 4 + [0.0] * 4, (64, 1)), rtol=1e-6)
    assert source.tokens_per_epoch == 36_000
    assert source.example_count("train_clean") == 3000


def test_examples_are_a_fixed_subset():
    source = build_source("r", RECIPE, load_tokenizer("symbols"), sequence_length=16, run_seed=0)
    some = source.examples("train", 100, seed=1)
    assert some == source.examples("train", 100, seed=1)
    assert some != source.examples("train", 100, seed=2)
    assert set(some) <= set(source.examples("train"))
    pairs = zip(some, source.examples("train_clean", 100, seed=1), strict=True)
    assert all(noisy.prompt == clean.prompt for noisy, clean in pairs)
    assert len(source.examples("test", 5000)) == 1024
    assert source.examples("validation") == []
