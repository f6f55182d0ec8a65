"""The reward of greedy responses to test prompts: what GRPO is after, on problems that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxmoe.config import QuestionAnswerSource, ReasoningSource
from jaxmoe.post_training.prompts import Prompt, prompts_of
from jaxmoe.post_training.rewards import Rewards
from jaxmoe.post_training.rollout import Sampling, respond
from jaxmoe.processes import numbers_of_first
from jaxmoe.training import EvaluationContext

SPLIT = "test"


def validation_rewards(context: EvaluationContext) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each source of questions, trained on or not: its name, and numbers on at most `evaluation.examples` of them.

    The numbers are `reward`, the mean, with its `reward_standard_error`; `examples`, and `skipped` for prompts that
    are too long; `response_tokens_mean` and `truncated_fraction`, as in training.

    Raises:
      EvaluationStopped: the run was asked to stop.
    """
    run = context.run
    with Rewards(run.grpo.reward) as rewards:
        for source in context.mixture.sources:
            if not isinstance(source.config, QuestionAnswerSource | ReasoningSource) or not source.example_count(SPLIT):
                continue
            prompts = prompts_of(source, SPLIT, context.tokenizer, run.evaluation.examples)
            fitting = [prompt for prompt in prompts if 1 <= len(prompt.tokens) <= run.grpo.max_prompt_tokens]
            yield source.name, {**_measured(context, rewards, fitting), "skipped": len(prompts) - len(fitting)}


def _measured(context: EvaluationContext, rewards: Rewards, prompts: list[Prompt]) -> dict[str, Any]:
    count = len(prompts)
    if not count:
        return {"reward": math.nan, "reward_standard_error": math.nan, "examples": 0}
    grpo = context.run.grpo
    sampling = Sampling(
        max_tokens=grpo.max_response_tokens, temperature=0.0, top_p=1.0, batch_size=grpo.rollout_batch_size,
        width=max(len(prompt.tokens) for prompt in prompts),
    )  # fmt: skip
    responses = respond(
        context.graphdef, (context.params, context.others), [prompt.tokens for prompt in prompts], context.tokenizer,
        sampling, jax.random.key(0), partitioning=context.partitioning, between=context.check_stop,
    )  # fmt: skip
    texts = [response.text(context.tokenizer) for response in responses]
    given = numbers_of_first(lambda: rewards([prompt.example for prompt in prompts], texts), (count,))
    return {
        "reward": float(given.mean(dtype=np.float64)),
        "reward_standard_error": float(given.std(ddof=1, dtype=np.float64) / math.sqrt(count)) if count > 1 else None,
        "examples": count,
        "response_tokens_mean": float(np.mean([len(response.tokens) for response in responses])),
        "truncated_fraction": float(np.mean([not response.finished for response in responses])),
    }
