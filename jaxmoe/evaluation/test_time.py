"""Test-time compute in numbers: what several sampled answers to each problem are worth, by any of them or by a vote.

N samples of each problem, n of them used, c of the N right.

Two figures each. Of *the first n* samples, as the study's code has it (arXiv 2508.18672; a fork of "Large Language
Monkeys", Brown et al. 2024): a single draw. And *expected*, the mean over all subsets of n of the N samples: the same
quantity without the luck of the order.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxmoe.config import TestTimeConfig
from jaxmoe.evaluation.scoring import ratio_standard_error


@dataclasses.dataclass(frozen=True)
class Votes:
    """The samples of one problem as they are counted.

    Attributes:
      answers: extracted from the samples, in their order; None where there is none to read.
      truth: what a right one equals; None where the problem has none, and every answer is wrong.
      tokens: that each sample took; may be empty.
    """

    answers: tuple[str | None, ...]
    truth: str | None
    tokens: tuple[int, ...] = ()

    @property
    def correct(self) -> int:
        """c, how many are right."""
        return 0 if self.truth is None else self.answers.count(self.truth)


def budgets(samples: int) -> tuple[int, ...]:
    """The n of a curve: 1, 2, 4, ... up to `samples`, and that itself."""
    return (*(2**power for power in range((samples - 1).bit_length())), samples)


def covered(votes: Votes, n: int) -> bool:
    """Whether any of the first n answers is right."""
    return votes.truth is not None and votes.truth in votes.answers[:n]


def majority(answers: Sequence[str | None]) -> str | None:
    """The most common answer; of equally common ones the one that came first. None, where all are invalid."""
    counted = collections.Counter(answer for answer in answers if answer is not None)
    return counted.most_common(1)[0][0] if counted else None


def pass_at(correct: int, samples: int, n: int) -> float:
    r"""Probability that any of n samples, drawn without replacement from N of which c are right, is right.

    $1 - \binom{N-c}{n} / \binom{N}{n} = 1 - \prod_{j=N-c+1}^{N} (1 - n/j)$, the unbiased estimator of pass@n (Chen et
    al. 2021, eq. 1), in their numerically stable form.

    Args:
      correct: c.
      samples: N.
      n: in 1..N.

    Raises:
      ValueError: c or n is out of range.
    """
    _check(samples, n)
    if not 0 <= correct <= samples:
        raise ValueError(f"correct={correct} of samples={samples}; choose 0..{samples}.")
    if samples - correct < n:
        return 1.0
    return float(1.0 - np.prod(1.0 - n / np.arange(samples - correct + 1, samples + 1)))


def expected_majority(votes: Votes, budget: Sequence[int]) -> Float[np.ndarray, " budgets"]:
    r"""Probability that the majority of n samples, drawn without replacement in random order, is right; for each n.

    Exact, by counting subsets. Let the right answer be given c times, wrong answer a $m_a$ times, and z samples be
    invalid. Of the $\binom{N}{n}$ subsets, those in which the right answer has k votes and t wrong ones have as many,
    none more, number $\binom{c}{k}$ times the coefficient of $x^{n-k} y^t$ in
    $(1+x)^z \prod_a \left(\sum_{j<k} \binom{m_a}{j} x^j + y \binom{m_a}{k} x^k\right)$. The tie goes to the answer that
    came first (`majority`), which in random order is the right one with probability 1 / (1 + t).

    Args:
      votes: at most `TestTimeConfig.MOST_SAMPLES` answers, so that all numbers fit float64; every term is positive,
        so that none is lost by cancellation.
      budget: each n, in 1..N.

    Raises:
      ValueError: an n, or the number of answers, is out of range.
    """
    total, correct = len(votes.answers), votes.correct
    for n in budget:
        _check(total, n)
    if total > TestTimeConfig.MOST_SAMPLES:
        raise ValueError(f"{total} answers; subsets of at most {TestTimeConfig.MOST_SAMPLES} are counted.")
    wrong = collections.Counter(answer for answer in votes.answers if answer is not None and answer != votes.truth)
    subsets = np.zeros(len(budget))
    for k in range(1, min(correct, max(budget)) + 1):
        rivals = [count for count in wrong.values() if count >= k]
        free = total - correct - sum(rivals)  # invalid, and answers that can never have k votes
        counted = np.zeros((len(rivals) + 1, max(budget) + 1))
        counted[0] = _binomials(free, max(budget))
        for count in rivals:
            terms = _binomials(count, min(count, k))
            fewer, as_many = terms[:k], terms[k]
            beside = np.zeros_like(counted)
            for j, ways in enumerate(fewer[: counted.shape[1]]):
                beside[:, j:] += ways * counted[:, : counted.shape[1] - j]
            if k < counted.shape[1]:
                beside[1:, k:] += as_many * counted[:-1, :-k]
            counted = beside
        won = (counted / (1.0 + np.arange(len(counted))[:, None])).sum(0)
        for place, n in enumerate(budget):
            if k <= n:
                subsets[place] += math.comb(correct, k) * won[n - k]
    return subsets / np.array([math.comb(total, n) for n in budget], np.float64)


def _binomials(total: int, most: int) -> Float[np.ndarray, " most+1"]:
    """The number of subsets of 0..most of `total` things."""
    return np.array([math.comb(total, size) for size in range(most + 1)], np.float64)


def _check(samples: int, n: int) -> None:
    if not 1 <= n <= samples:
        raise ValueError(f"n={n} of {samples} samples; choose 1..{samples}.")


def sampling_numbers(problems: Sequence[Votes]) -> dict[str, float | int]:
    """The curves over n as the flat fields of a record.

    For each n of `budgets`: `coverage_n` and `majority_n`, of the first n samples, and `expected_coverage_n` (pass@n)
    and `expected_majority_n`, of all subsets; each with `..._standard_error` over problems: the standard deviation of
    the problems' numbers over the square root of how many there are, which for the first n is the binomial one (with
    n - 1). Besides `samples`, `problems`, `answered` (share of samples with an answer to read), and, where they are
    told, `tokens_per_sample`, mean.

    Args:
      problems: at least one, all with equally many answers.
    """
    samples = len(problems[0].answers)
    curve = budgets(samples)
    expected = np.array([expected_majority(votes, curve) for votes in problems])
    columns: dict[str, np.ndarray] = {}
    for place, n in enumerate(curve):
        columns[f"coverage_{n}"] = np.array([covered(votes, n) for votes in problems], np.float64)
        columns[f"expected_coverage_{n}"] = np.array([pass_at(votes.correct, samples, n) for votes in problems])
        columns[f"majority_{n}"] = np.array(
            [votes.truth is not None and majority(votes.answers[:n]) == votes.truth for votes in problems], np.float64
        )
        columns[f"expected_majority_{n}"] = expected[:, place]
    numbers: dict[str, float | int] = {
        "samples": samples,
        "problems": len(problems),
        "answered": float(np.mean([answer is not None for votes in problems for answer in votes.answers])),
    }
    if problems[0].tokens:
        numbers["tokens_per_sample"] = float(np.mean([votes.tokens for votes in problems]))
    for name, values in columns.items():
        numbers[name] = float(values.mean())
        numbers[f"{name}_standard_error"] = ratio_standard_error(values, np.ones_like(values))
    return numbers
