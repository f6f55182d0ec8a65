"""The reward of a response: 1 if its answer is the true one, else 0.

No reward is given for form. Sources: `final_number` and `exact` are how this library's evaluation reads answers;
`program` is the reward of arXiv 2508.18672 (repository, post-training): what a program in the response computes, else
what math-verify reads in the whole response, compared with the true answer by math-verify.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxmoe.config.grpo import Reward
from jaxmoe.data import Example, extract_answer
from jaxmoe.post_training import programs
from jaxmoe.post_training.verification import MathVerifier, require_math_verify

_MARK = "####"


def check_reward(reward: Reward) -> None:
    """Checks that what a reward needs is installed.

    Raises:
      ConfigError: it is not; the message names the extra.
    """
    if reward in ("math", "program"):
        require_math_verify()


class Rewards:
    """Rewards of responses; a context manager.

    Args:
      reward: which.
    """

    def __init__(self, reward: Reward):
        self._reward = reward
        self._verifier = MathVerifier() if reward in ("math", "program") else None

    def __call__(self, examples: Sequence[Example], responses: Sequence[str]) -> Float[np.ndarray, " n"]:
        """The reward of each response to the example of the same place."""
        if self._verifier is None:
            return np.array([self._agrees(*pair) for pair in zip(examples, responses, strict=True)], np.float32)
        given = [self._given(response) for response in responses]
        asked = [place for place, answer in enumerate(given) if answer is not None]
        equal = self._verifier.equal([(_true_answer(examples[place]), given[place]) for place in asked])
        rewards = np.zeros(len(responses), np.float32)
        rewards[asked] = equal
        return rewards

    def _agrees(self, example: Example, response: str) -> bool:
        true = extract_answer(example.answer, self._reward)
        return true is not None and extract_answer(response, self._reward) == true

    def _given(self, response: str) -> str | None:
        """What math-verify is to read; None where a program has no answer."""
        if self._reward == "program" and programs.has_program(response):
            return programs.answer_of(response)
        return response

    def close(self) -> None:
        """Ends the processes that compare."""
        if self._verifier is not None:
            self._verifier.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _true_answer(example: Example) -> str:
    """What of an example's answer is compared: after GSM8K's mark what follows it, else all, where a box may be."""
    return example.answer.rsplit(_MARK, 1)[-1].strip()
