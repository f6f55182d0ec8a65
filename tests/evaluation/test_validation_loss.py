"""Validation loss against the definition, on rows with weights and padding."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import DataConfig, KnowledgeSource, ModelConfig, MoEConfig, ReasoningSource
from jaxmoe.data import Mixture
from jaxmoe.evaluation import validation_loss
from jaxmoe.models import Decoder, token_nll


@pytest.fixture(scope="module")
def mixture():
    sources = {
        "knowledge": KnowledgeSource(entities=40, test_entities=10),
        "reasoning": ReasoningSource(problems=60, test_problems=20, prompt_weight=0.1),
    }
    return Mixture(
        DataConfig(tokenizer="symbols", sources=sources), batch_size=4, sequence_length=16, steps=2, seed=0
    )


@pytest.fixture(scope="module")
def model():
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=8, capacity_factor=0.4)
    config = ModelConfig(vocab_size=280, width=16, num_layers=1, num_heads=2, max_sequence_length=16, moe=moe)
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("split", ["train", "test"])
def test_loss_is_weighted_as_in_training(model, mixture, split):
    source = mixture.sources[1]
    dropless = Decoder(
        ModelConfig(
            vocab_size=280, width=16, num_layers=1, num_heads=2, max_sequence_length=16,
            moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=8),
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    rows = source.rows(np.arange(13), split)
    logits = dropless(jnp.asarray(rows["inputs"]), segment_ids=jnp.asarray(rows["segment_ids"])).logits
    nll = np.asarray(token_nll(logits, jnp.asarray(rows["targets"])), np.float64)
    weights = rows["loss_weights"].astype(np.float64)
    score = validation_loss(model, source, split, rows=13, batch_size=8)
    assert score.loss == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-5)
    real = rows["segment_ids"] != 0
    assert score.unweighted_loss == pytest.approx(nll[real].mean(), rel=1e-5)
    assert (score.rows, score.validation_tokens) == (13, real.sum())
    assert score.dropped_fraction == 0.0


def test_no_more_rows_than_there_are(model, mixture):
    assert validation_loss(model, mixture.sources[0], "test", rows=500, batch_size=8).rows == 10


def test_a_split_without_rows_is_an_error(model, mixture):
    with pytest.raises(ValueError, match="has no dev rows"):
        validation_loss(model, mixture.sources[0], "dev")
