"""A run small enough to sample and update in a blink, and one that it starts from."""

import dataclasses

import pytest

from jaxmoe.config import (
    DataConfig,
    EvaluationConfig,
    GRPOConfig,
    ModelConfig,
    MoEConfig,
    ReasoningSource,
    RunConfig,
    TrainConfig,
)
from jaxmoe.training import train

PRETRAINED = RunConfig(
    name="pretrained",
    seed=3,
    model=ModelConfig(
        vocab_size=280, width=16, num_layers=1, num_heads=2, max_sequence_length=16, init_std=0.1,
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=16),
    ),
    data=DataConfig(
        tokenizer="symbols",
        sources={"reasoning": ReasoningSource(problems=20, test_problems=8, operations=2, modulus=3, corruption=0.5)},
    ),
    train=TrainConfig(steps=60, batch_size=16, sequence_length=12, learning_rate=1e-2, log_every=60),
    evaluation=EvaluationConfig(points=2, examples=8, batch_size=8, validation_rows=8),
)  # fmt: skip

GRPO_TRAIN = TrainConfig(
    steps=4, batch_size=4, sequence_length=12, learning_rate=1e-3, schedule="constant", log_every=1,
    checkpoint_every=3,
)  # fmt: skip
GRPO = GRPOConfig(
    group_size=5, updates_per_step=2, max_prompt_tokens=8, max_response_tokens=4, reward="exact",
    rollout_batch_size=10, kl_coefficient=0.01,
)  # fmt: skip


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The directory of a run of 60 steps, whose model writes digits, right ones about as often as by chance."""
    directory = tmp_path_factory.mktemp("pretrained")
    train(PRETRAINED, directory)
    return directory


@pytest.fixture(scope="session")
def grpo_run(pretrained) -> RunConfig:
    """4 rollout steps of 4 prompts, 5 responses each, 2 updates a step; checkpoints after 3 and 4."""
    return dataclasses.replace(PRETRAINED, name="grpo", train=GRPO_TRAIN, grpo=GRPO, start_from=str(pretrained))
