"""Rewards: 1 for the true answer however it is written, 0 for everything else, whatever it tries."""

import pytest

from jaxmoe.config import ConfigError
from jaxmoe.data import Example
from jaxmoe.post_training import Rewards, check_reward, verification

GSM8K = Example("Question: how many?\nAnswer:", " 48 / 2 = <<48/2=24>>24\n#### 1,072", "1072")
MATH = Example("What is half of 3/2?", r"Half of it is $\boxed{\frac{3}{4}}$.")
REASONING = Example("R3+4*2=", "74")


@pytest.fixture(scope="module")
def program_rewards():
    pytest.importorskip("math_verify", reason="comparing mathematical answers needs `pip install jaxmoe[post]`")
    with Rewards("program") as rewards:
        yield rewards


@pytest.mark.parametrize(
    ("reward", "example", "response", "worth"),
    [
        ("final_number", GSM8K, "so it is 1072.0", 1),
        ("final_number", GSM8K, "1072, or 3", 0),
        ("final_number", GSM8K, "I do not know", 0),
        ("exact", REASONING, "74", 1),
        ("exact", REASONING, "745", 0),
        ("exact", REASONING, "", 0),
    ],
)
def test_what_the_library_reads_itself(reward, example, response, worth):
    assert Rewards(reward)([example], [response]).tolist() == [worth]


def test_answers_are_compared_as_mathematics_and_programs_are_evaluated(program_rewards):
    responses = {
        "The answer is $1072$.": GSM8K,
        "#### 1,072": GSM8K,
        "\ndef simple_math_problem():\n    return 1000 + 72.0": GSM8K,
        "<llm-code>\n2 * 536\n</llm-code>": GSM8K,
        r"\boxed{0.75}": MATH,
        r"It is $\frac{6}{8}$": MATH,
    }
    assert program_rewards(list(responses.values()), list(responses)).tolist() == [1] * 6
    wrong = {
        "1071": GSM8K,
        "1072\ndef simple_math_problem():\n    return 5": GSM8K,  # what the program computes counts
        "1072\ndef simple_math_problem():\n    while True: pass": GSM8K,
        "1072\ndef simple_math_problem():\n    import os": GSM8K,
        "": GSM8K,
        r"\boxed{\frac{3}{5}}": MATH,
    }
    assert program_rewards(list(wrong.values()), list(wrong)).tolist() == [0] * 6


def test_a_worker_that_hangs_or_dies_costs_its_answer_alone(program_rewards, monkeypatch):
    with verification.MathVerifier(workers=1) as verifier:
        assert verifier.equal([("72", "72")]) == [True]
        verifier._workers[0]._process.kill()
        assert verifier.equal([("72", "72"), ("72", "72")]) == [False, True]
        with monkeypatch.context() as impatient:
            impatient.setattr(verification, "_ANSWER_SECONDS", 0.0)
            assert verifier.equal([("72", "$9^{9^{9^{9^{9}}}}$")]) == [False]
        assert verifier._workers[0]._process is None
        assert verifier.equal([("72", "72")]) == [True]


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(verification.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"math-verify, which is not installed: `pip install 'jaxmoe\[post\]'`"):
        check_reward("program")
    check_reward("exact")
