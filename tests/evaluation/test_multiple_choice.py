"""Multiple choice: against a sum of log-probabilities token by token, and the harness' conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import ConfigError, ModelConfig
from jaxmoe.data import load_tokenizer
from jaxmoe.evaluation import Question, hellaswag_question, score_questions
from jaxmoe.evaluation.multiple_choice import choice_likelihoods
from jaxmoe.models import Decoder

QUESTIONS = [
    Question("one two", ("three", "thirteen hundred", "four"), 0),
    Question("a", ("b", "cc"), 1),
    Question("the sky is", ("blue today and tomorrow", "x"), 0),
]


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=259, width=16, num_layers=1, num_heads=2, dense_hidden=16, max_sequence_length=40, init_std=0.5
    )
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


def test_likelihoods_are_sums_over_the_choice_s_tokens(model, tokenizer):
    likelihoods = choice_likelihoods(model, QUESTIONS, tokenizer)
    logits_of = nnx.jit(lambda model, tokens: model(tokens).logits)
    for question, found in zip(QUESTIONS, likelihoods, strict=True):
        for choice, likelihood in zip(question.choices, found, strict=True):
            tokens = tokenizer.encode(f"{question.context} {choice}")
            padded = jnp.asarray([tokens + [0] * (40 - len(tokens))])
            log_probability = jax.nn.log_softmax(logits_of(model, padded)[0])
            start = len(tokenizer.encode(question.context))
            expected = sum(log_probability[i - 1, tokens[i]] for i in range(start, len(tokens)))
            assert likelihood == pytest.approx(float(expected), rel=1e-4)


def test_accuracy_takes_the_likeliest_choice_and_the_normalized_one_by_character(model, tokenizer):
    likelihoods = choice_likelihoods(model, QUESTIONS, tokenizer)
    score = score_questions(model, QUESTIONS, tokenizer)
    right = [np.argmax(found) == q.answer for q, found in zip(QUESTIONS, likelihoods, strict=True)]
    by_character = [
        np.argmax([likelihood / len(choice) for likelihood, choice in zip(found, q.choices, strict=True)]) == q.answer
        for q, found in zip(QUESTIONS, likelihoods, strict=True)
    ]
    assert score.accuracy == pytest.approx(np.mean(right))
    assert score.normalized_accuracy == pytest.approx(np.mean(by_character))
    assert right != by_character  # the long right choice of the last question needs the normalization
    assert (score.questions, score.skipped) == (3, 0)
    assert score.accuracy_standard_error == pytest.approx(np.std(right, ddof=1) / np.sqrt(3))


def test_a_question_with_a_choice_that_does_not_fit_is_skipped_and_counted(model, tokenizer):
    score = score_questions(model, [*QUESTIONS, Question("q", ("x" * 60, "y"), 1)], tokenizer)
    assert (score.questions, score.skipped) == (3, 1)
    assert score.accuracy == score_questions(model, QUESTIONS, tokenizer).accuracy


def test_hellaswag_rows_are_asked_as_the_harness_does():
    row = {
        "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting [header] on a roof.", "ctx_b": "he",
        "endings": [" starts [title] pulling. ", "is  ripping."], "label": "1",
    }  # fmt: skip
    assert hellaswag_question(row) == Question(
        "Roof shingle removal: A man is sitting on a roof. He", ("starts. pulling.", "is ripping."), 1
    )


def test_a_question_without_its_answer_is_refused():
    with pytest.raises(ConfigError, match="answer=2 and 2 choices"):
        Question("q", ("a", "b"), 2)
