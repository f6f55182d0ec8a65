"""GRPO post-training: `GRPOConfig`, and what it asks of the run that it is part of.

n responses in a group, one group for each prompt.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from jaxmoe.config.data import QuestionAnswerSource, ReasoningSource
from jaxmoe.config.errors import require, require_declared, require_non_negative, require_positive

if TYPE_CHECKING:
    from jaxmoe.config.run import RunConfig, TrainConfig

Reward = Literal["final_number", "exact", "math", "program"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300); docs/grpo.md has the formulae.

    In a run with this section `train.steps` counts rollout steps, `train.batch_size` the prompts of a step,
    `train.gradient_accumulation` the micro-batches of an update, and `train.sequence_length` the positions of a row,
    which holds a prompt and one response. `train.schedule` follows rollout steps. Defaults are the paper's.

    Attributes:
      group_size: n, responses sampled for each prompt.
      updates_per_step: optimizer updates on the responses of one step, each on its share of the prompts.
      max_prompt_tokens: prompts of more are left out, and counted.
      max_response_tokens: of a response, the end token included.
      temperature: responses are sampled from, and probabilities are those of, softmax(logits / temperature).
      top_p: mass of the nucleus that is sampled from; 1 samples from all. Probabilities are of the whole
        vocabulary, whatever it is.
      clip_ratio: the probability ratio is clipped to 1 - clip_ratio .. 1 + clip_ratio.
      kl_coefficient: of the divergence from the start's parameters, which is part of the loss.
      reward: 1 or 0 for a response. `final_number` and `exact` compare as `jaxmoe.data.extract_answer` reads;
        `math` compares by `math-verify`; `program` is `math`, but where a response holds a program (an <llm-code>
        block, or a function definition), what that computes is compared.
      rollout_batch_size: responses that are decoded together, which bounds the memory of the cache.
    """

    group_size: int = 5
    updates_per_step: int = 4
    max_prompt_tokens: int = 512
    max_response_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    clip_ratio: float = 0.2
    kl_coefficient: float = 0.001
    reward: Reward = "final_number"
    rollout_batch_size: int = 256

    def __post_init__(self):
        require_declared(self)
        require_positive(
            self, "group_size", "updates_per_step", "max_prompt_tokens", "max_response_tokens", "rollout_batch_size"
        )
        require_non_negative(self, "kl_coefficient")
        require(self.temperature > 0, f"temperature={self.temperature}; GRPO samples: it must be positive.")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}; choose 0 < top_p <= 1.")
        require(0 < self.clip_ratio < 1, f"clip_ratio={self.clip_ratio}; choose 0 < clip_ratio < 1.")

    def responses_per_update(self, train: TrainConfig) -> int:
        """Rows of one optimizer update."""
        return train.batch_size // self.updates_per_step * self.group_size


def check_grpo(run: RunConfig) -> None:
    """Checks a run that has a `grpo` section against it.

    Raises:
      ConfigError: with both values, and what would fit.
    """
    grpo, train = run.grpo, run.train
    require(
        run.start_from is not None,
        "grpo trains a model that is there: name the run directory of its training, start_from=runs/STUDY/MEMBER.",
    )
    longest = grpo.max_prompt_tokens + grpo.max_response_tokens
    require(
        longest <= train.sequence_length,
        f"grpo.max_prompt_tokens + grpo.max_response_tokens = {longest} exceeds train.sequence_length="
        f"{train.sequence_length}, which is the row of a prompt with a response.",
    )
    require(
        train.batch_size % grpo.updates_per_step == 0,
        f"train.batch_size={train.batch_size} prompts cannot be divided among grpo.updates_per_step="
        f"{grpo.updates_per_step} updates.",
    )
    rows = grpo.responses_per_update(train)
    require(
        rows % train.gradient_accumulation == 0,
        f"the {rows} responses of an update (train.batch_size / grpo.updates_per_step x grpo.group_size) cannot be "
        f"divided by train.gradient_accumulation={train.gradient_accumulation}.",
    )
    require(
        train.spike_action == "off",
        f"train.spike_action={train.spike_action!r}: the loss of GRPO is about 0 whatever the model is worth, so that "
        "no spike can be told from it; use 'off'.",
    )
    for name, source in run.data.sources.items():
        require(
            source.weight == 0 or isinstance(source, QuestionAnswerSource | ReasoningSource),
            f"data.sources.{name} is of kind {source.kind!r}, which has no prompts to answer; grpo takes "
            "question_answer and reasoning. Give it weight=0, and it is evaluated all the same.",
        )
