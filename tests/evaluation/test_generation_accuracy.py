"""Greedy answers and the accuracy read from them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.data import Example, load_tokenizer
from jaxmoe.evaluation import generation
from jaxmoe.evaluation.generation import Generated, generation_accuracy, greedy_answers
from jaxmoe.models import Decoder

CONFIG = ModelConfig(
    vocab_size=259, width=16, num_layers=1, num_heads=2, max_sequence_length=48, init_std=0.5,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@nnx.jit
def likeliest(model, tokens, place):
    return jnp.argmax(model(tokens).logits[0, place])


def test_greedy_answers_take_the_likeliest_token_each_time(model):
    tokenizer = load_tokenizer("bytes")
    prompts = ["a", "what is 3+4?", "abcdefghijklmnopqrst", "zz"]
    answers = greedy_answers(model, prompts, tokenizer, max_new_tokens=6, batch_size=2)
    for prompt, answer in zip(prompts, answers):
        ids = tokenizer.encode(prompt)
        for _ in range(6):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(likeliest(model, padded, len(ids) - 1)))
            if ids[-1] == tokenizer.eos_id:
                break
        assert answer.text == tokenizer.decode(ids[len(tokenizer.encode(prompt)) :])
        assert answer.finished == (ids[-1] == tokenizer.eos_id)


def test_a_prompt_without_room_for_an_answer_is_left_out(model):
    answers = greedy_answers(model, ["x" * 40, "", "y"], load_tokenizer("bytes"), max_new_tokens=12)
    assert answers[0] is None
    assert answers[1] is None
    assert answers[2] is not None


def test_accuracy_compares_final_answers(monkeypatch):
    texts = {
        "right": Generated("3 apples and 4: #### 1,250", True, 9),
        "right by last number": Generated("so it is $1250.00", False, 9),
        "wrong": Generated("#### 7", True, 9),
        "nothing": Generated("no idea", False, 9),
        "too long": None,
    }
    monkeypatch.setattr(generation, "greedy_answers", lambda *args, **kwargs: list(texts.values()))
    examples = [Example(name, " 1000+250 #### 1250", "1250") for name in texts]
    score = generation_accuracy(None, examples, None)
    assert score.accuracy == pytest.approx(2 / 4)
    assert score.accuracy_standard_error == pytest.approx(math.sqrt(0.25 / 3))
    assert score.answered == pytest.approx(3 / 4)
    assert score.finished == pytest.approx(2 / 4)
    assert (score.examples, score.skipped) == (4, 1)


def test_without_a_final_the_answer_is_read_and_exact_means_white_space_apart(monkeypatch):
    answers = [Generated("  New\nYork ", True, 9), Generated("York", True, 9)]
    monkeypatch.setattr(generation, "greedy_answers", lambda *args, **kwargs: answers)
    examples = [Example("q", " New York"), Example("q", " New York")]
    assert generation_accuracy(None, examples, None, answer_format="exact").accuracy == 0.5


def test_no_examples_give_no_number(model):
    assert math.isnan(generation_accuracy(model, [], load_tokenizer("bytes")).accuracy)
