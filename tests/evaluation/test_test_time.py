"""Coverage and majority of several samples, against counting every subset and order."""

import itertools
import math

import numpy as np
import pytest

from jaxmoe.evaluation import Votes, budgets, covered, expected_majority, majority, pass_at, sampling_numbers

VOTES = [
    Votes(("1", "2", "2", None, "1", "3"), "1"),  # two against two: a tie
    Votes(("2", "1", "1", "3", "3", "2"), "1"),  # a tie of three
    Votes((None, None, "1", None, None, None), "1"),
    Votes((None,) * 5, "1"),
    Votes(("1",) * 4, "1"),
    Votes(("2", "3", "2"), "1"),
    Votes(("1", "2", "1"), None),
]


@pytest.mark.parametrize("votes", VOTES)
def test_expectations_equal_the_mean_over_every_ordered_subset(votes):
    total = len(votes.answers)
    for n in range(1, total + 1):
        ordered = list(itertools.permutations(votes.answers, n))
        won = np.mean([votes.truth is not None and majority(answers) == votes.truth for answers in ordered])
        any_right = np.mean([votes.truth is not None and votes.truth in answers for answers in ordered])
        assert expected_majority(votes, [n])[0] == pytest.approx(won, abs=1e-12)
        assert pass_at(votes.correct, total, n) == pytest.approx(any_right, abs=1e-12)


def test_random_answers_agree_with_every_ordered_subset():
    random = np.random.default_rng(0)
    for _ in range(20):
        answers = tuple(None if one == 0 else str(one) for one in random.integers(0, 4, size=6))
        votes = Votes(answers, "1")
        expected = [
            np.mean([majority(ordered) == "1" for ordered in itertools.permutations(answers, n)]) for n in (2, 5, 6)
        ]
        np.testing.assert_allclose(expected_majority(votes, (2, 5, 6)), expected, atol=1e-12)


def test_most_samples_stay_finite_and_in_order():
    votes = Votes(("1",) * 300 + ("2",) * 200 + ("3",) * 200 + (None,) * 324, "1")
    expected = expected_majority(votes, budgets(1024))
    assert expected[0] == pytest.approx(300 / 1024)
    assert expected[-1] == pytest.approx(1.0)
    assert np.isfinite(expected).all()
    assert (np.diff(expected) > -1e-12).all()
    with pytest.raises(ValueError, match="at most 1024"):
        expected_majority(Votes(("1",) * 1025, "1"), [1])


def test_a_tie_goes_to_the_answer_that_came_first_and_invalid_ones_have_no_vote():
    assert majority(["2", "1", "1", "2"]) == "2"
    assert majority([None, None, None, "7"]) == "7"
    assert majority([None, None]) is None


def test_the_first_n_are_a_single_draw():
    votes = Votes(("2", None, "1"), "1")
    assert [covered(votes, n) for n in (1, 2, 3)] == [False, False, True]
    assert not covered(Votes((None,), None), 1)


@pytest.mark.parametrize(("samples", "expected"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_budgets(samples, expected):
    assert budgets(samples) == expected


@pytest.mark.parametrize(("correct", "samples", "n"), [(0, 4, 0), (0, 4, 5), (5, 4, 1), (-1, 4, 1)])
def test_what_is_out_of_range_is_refused(correct, samples, n):
    with pytest.raises(ValueError, match="choose"):
        pass_at(correct, samples, n)


def test_the_numbers_of_a_record():
    numbers = sampling_numbers([Votes(("1", "2"), "1"), Votes((None, "3"), "3")])
    assert (numbers["samples"], numbers["problems"], numbers["answered"]) == (2, 2, 0.75)
    assert (numbers["coverage_1"], numbers["coverage_2"]) == (0.5, 1.0)
    assert (numbers["majority_1"], numbers["majority_2"]) == (0.5, 1.0)
    assert (numbers["expected_coverage_1"], numbers["expected_coverage_2"]) == (0.5, 1.0)
    assert (numbers["expected_majority_1"], numbers["expected_majority_2"]) == (0.5, 0.75)
    # of (0.5, 1): a standard deviation of sqrt(1 / 8), over sqrt(2)
    assert numbers["expected_majority_2_standard_error"] == pytest.approx(math.sqrt(1 / 8 / 2))
