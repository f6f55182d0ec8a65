"""Multiple choice by likelihood, in the convention of lm-evaluation-harness.

Every choice follows the context after a space. The answer is the choice of the largest log-likelihood (`acc` there), or
of the largest log-likelihood over its characters (`acc_norm`), which does not favour short ones. The choice's tokens
are those from position len(encode(context)) of encode(context + choice) on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmoe.config import ConfigError
from jaxmoe.data import Example, Tokenizer
from jaxmoe.evaluation.scoring import ratio_standard_error, score_each
from jaxmoe.models import Decoder


@dataclasses.dataclass(frozen=True)
class Question:
    """A context and its possible continuations.

    Attributes:
      context: without a space at its end.
      choices: without the space before them.
      answer: index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self):
        if not 0 <= self.answer < len(self.choices) or not all(self.choices):
            raise ConfigError(
                f"a question about {self.context!r:.80} has answer={self.answer} and {len(self.choices)} choices; none "
                "of them may be empty, and the answer is the index of one."
            )


@dataclasses.dataclass(frozen=True)
class MultipleChoiceScore:
    """How many questions a model answers.

    Attributes:
      accuracy: share of questions whose likeliest choice is right.
      normalized_accuracy: the same with log-likelihoods over characters.
      questions: scored ones, which the two are shares of.
      skipped: questions with a choice that is too long for the model, or has no token of its own.
    """

    accuracy: float
    accuracy_standard_error: float
    normalized_accuracy: float
    normalized_accuracy_standard_error: float
    questions: int
    skipped: int


def score_questions(
    model: Decoder, questions: Sequence[Question], tokenizer: Tokenizer, *, batch_size: int = 128
) -> MultipleChoiceScore:
    """Answers every question by likelihood; see this module's docstring.

    Args:
      model: evaluated without capacity limits.
      questions: any number of choices each.
      tokenizer: the model's.
      batch_size: choices at once, at most.
    """
    likelihoods = choice_likelihoods(model, questions, tokenizer, batch_size=batch_size)
    right, normalized_right = [], []
    for question, found in zip(questions, likelihoods, strict=True):
        if found is not None:
            characters = np.array([len(choice) for choice in question.choices])
            right.append(int(np.argmax(found)) == question.answer)
            normalized_right.append(int(np.argmax(found / characters)) == question.answer)

    def share(answers: list[bool]) -> tuple[float, float]:
        values = np.array(answers, np.float64)
        mean = float(values.mean()) if len(values) else float("nan")
        return mean, ratio_standard_error(values, np.ones_like(values))

    return MultipleChoiceScore(
        *share(right), *share(normalized_right), questions=len(right), skipped=len(questions) - len(right)
    )


def choice_likelihoods(
    model: Decoder, questions: Sequence[Question], tokenizer: Tokenizer, *, batch_size: int = 128
) -> list[Float[np.ndarray, " choices"] | None]:
    """Log-likelihood in nats of every choice of each question; None where one cannot be scored."""
    examples = [Example(question.context, f" {choice}") for question in questions for choice in question.choices]
    scores = score_each(model, examples, tokenizer, batch_size=batch_size)
    found = np.full(len(examples), np.nan)
    found[scores.index] = -scores.nll
    ends = np.cumsum([len(question.choices) for question in questions])
    parts = np.split(found, ends[:-1]) if len(questions) else []
    return [None if np.isnan(part).any() else part for part in parts]


def hellaswag_question(row: Mapping[str, Any]) -> Question:
    """A row of HellaSwag (`activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`) as the harness asks it."""

    def cleaned(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(
        context=cleaned(f"{row['activity_label']}: {context}"),
        choices=tuple(cleaned(ending) for ending in row["endings"]),
        answer=int(row["label"]),
    )
