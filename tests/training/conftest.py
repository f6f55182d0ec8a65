"""A run small enough to train in a blink, shared by all tests so that its step is compiled once."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.config import (
    DataConfig,
    EvaluationConfig,
    KnowledgeSource,
    ModelConfig,
    MoEConfig,
    ReasoningSource,
    RunConfig,
    TrainConfig,
)
from jaxmoe.data import Mixture

TINY = RunConfig(
    name="tiny",
    seed=3,
    model=ModelConfig(
        vocab_size=288, width=16, num_layers=2, num_heads=2, max_sequence_length=16, init_std=0.1,
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=16),
    ),
    data=DataConfig(
        tokenizer="symbols",
        sources={
            "knowledge": KnowledgeSource(entities=40, test_entities=8),
            "reasoning": ReasoningSource(problems=40, test_problems=8),
        },
    ),
    train=TrainConfig(
        steps=24, batch_size=8, sequence_length=16, learning_rate=1e-2, warmup_steps=4, log_every=2,
        checkpoint_every=6, max_nonfinite_steps=3,
    ),
    evaluation=EvaluationConfig(points=3),
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run() -> RunConfig:
    """2 MoE layers of width 16, two sources, 24 steps; checkpoints after 6, 12, ..., evaluations after 8, 16, 24."""
    return TINY


@pytest.fixture(scope="session")
def tiny_batches(tiny_run) -> list[dict[str, np.ndarray]]:
    """Its first batches."""
    train = tiny_run.train
    mixture = Mixture(
        tiny_run.data, batch_size=train.batch_size, sequence_length=train.sequence_length, steps=train.steps, seed=0
    )
    return [mixture.batch(step) for step in range(8)]


@pytest.fixture(scope="session")
def copied():
    """Copies a tree to NumPy arrays of their own; random keys become their numbers."""

    def copy(tree):
        def leaf(x):
            return np.array(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

        return jax.tree.map(leaf, tree)

    return copy


@pytest.fixture(scope="session")
def replace_train():
    """A run with other values in its `train` section."""

    def replace(run: RunConfig, **changes) -> RunConfig:
        return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))

    return replace
