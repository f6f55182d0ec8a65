"""The reasoning task: chained arithmetic mod m, left to right, with every partial result written out.

    prompt  R3+4*2-9=
    answer  745        (3+4=7; 7*2=14=4; 4-9=-5=5, mod 10)

Numbers up to 9 are one character; with modulus > 10 every number is two digits, so that no separator is needed. In
the training split a written result may be corrupted: it is replaced by a number drawn uniformly (which is right by
chance once in m), and the next step goes on from what was written.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmoe.config import ReasoningSource
from jaxmoe.data.seeding import distinct_rows, generator
from jaxmoe.data.source import Example, Source
from jaxmoe.data.tasks import task_source, texts_of
from jaxmoe.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Problems:
    """Problems and what is written as their solution; n problems of `o` operations.

    Attributes:
      numbers: (n, o + 1) operands in [0, modulus).
      operators: (n, o) indices into the operators.
      results: (n, o) written partial results.
    """

    numbers: np.ndarray
    operators: np.ndarray
    results: np.ndarray


def reasoning_source(
    name: str, config: ReasoningSource, tokenizer: Tokenizer, *, sequence_length: int, run_seed: int, index: int = 0
) -> Source:
    """Problems as padded rows; the statement weighs `config.prompt_weight`, the solution 1.

    Splits: `train` as trained on, `train_clean` the same problems with correct solutions, `test` other problems.

    Raises:
      ConfigError: a row too short for a problem.
    """
    named = (run_seed, name) if config.seed is None else (config.seed, "")
    splits = {split: write_problems(config, problems) for split, problems in draw_problems(config, *named).items()}
    return task_source(
        name, config, splits, tokenizer,
        sequence_length=sequence_length, run_seed=run_seed, index=index, prompt_weight=config.prompt_weight,
    )


def draw_problems(config: ReasoningSource, seed: int, name: str = "") -> dict[str, Problems]:
    """Distinct problems, split: the test split shares none with the training split.

    Returns:
      `train`, `train_clean` and `test`.
    """
    random = generator(seed, name, "reasoning")
    numbers_count, steps = config.operations + 1, config.operations
    radices = (config.modulus,) * numbers_count + (len(config.operators),) * steps
    drawn = distinct_rows(random, radices, config.problems + config.test_problems)
    numbers, operators = drawn[:, :numbers_count], drawn[:, numbers_count:]
    corrupted = random.random((config.problems, steps)) < config.corruption
    replacements = random.integers(0, config.modulus, size=(config.problems, steps))
    train, test = slice(0, config.problems), slice(config.problems, None)

    def solved(part: slice, written: np.ndarray | None = None) -> Problems:
        results = solve(numbers[part], operators[part], config.operators, config.modulus, written)
        return Problems(numbers[part], operators[part], results)

    return {
        "train": solved(train, np.where(corrupted, replacements, -1)),
        "train_clean": solved(train),
        "test": solved(test),
    }


def solve(
    numbers: np.ndarray, operators: np.ndarray, symbols: str, modulus: int, written: np.ndarray | None = None
) -> np.ndarray:
    """Partial results, left to right.

    Args:
      numbers: (n, o + 1) operands.
      operators: (n, o) indices into `symbols`.
      symbols: the operators, of "+-*".
      modulus: results are in [0, modulus).
      written: (n, o), where >= 0 it is written instead of the result, and calculated on from.

    Returns:
      (n, o) results.
    """
    results = np.empty_like(operators)
    value = numbers[:, 0]
    for step in range(operators.shape[1]):
        operand = numbers[:, step + 1]
        outcomes = {"+": value + operand, "-": value - operand, "*": value * operand}
        value = np.choose(operators[:, step], [outcomes[symbol] for symbol in symbols]) % modulus
        if written is not None:
            value = np.where(written[:, step] >= 0, written[:, step], value)
        results[:, step] = value
    return results


def write_problems(config: ReasoningSource, problems: Problems) -> list[Example]:
    """The problems as text."""
    digits = 1 if config.modulus <= 10 else 2
    numerals = np.array([list(f"{number:0{digits}d}") for number in range(config.modulus)])
    symbols = np.array(list(config.operators))
    count, steps = problems.operators.shape
    pieces = [np.full((count, 1), "R"), numerals[problems.numbers[:, 0]]]
    for step in range(steps):
        pieces += [symbols[problems.operators[:, step, None]], numerals[problems.numbers[:, step + 1]]]
    pieces.append(np.full((count, 1), "="))
    prompts = texts_of(np.concatenate(pieces, axis=1))
    answers = texts_of(numerals[problems.results].reshape(count, steps * digits))
    return [Example(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
