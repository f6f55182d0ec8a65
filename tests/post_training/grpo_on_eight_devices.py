"""GRPO over a mesh; run by test_grpo_mesh.py in a process with eight devices."""

import jax
import numpy as np
import pytest

from jaxmoe.config import GRPOConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from jaxmoe.data import load_tokenizer
from jaxmoe.post_training.loss import Rows
from jaxmoe.post_training.rollout import Sampling, respond
from jaxmoe.post_training.update import make_scorer, make_updates
from jaxmoe.sharding import make_partitioning, placed
from jaxmoe.training.state import _initializer, model_graph, relevant_to_step

MODEL = ModelConfig(
    vocab_size=280, width=16, num_layers=1, num_heads=2, max_sequence_length=16, init_std=0.3,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=16),
)  # fmt: skip
TRAIN = TrainConfig(steps=4, batch_size=16, sequence_length=8, learning_rate=1e-3, schedule="constant")
GRPO = GRPOConfig(max_prompt_tokens=4, max_response_tokens=4, updates_per_step=2, kl_coefficient=0.1)


def rows():
    """(2 updates, 2 micro-batches, 8 responses, 8 positions)."""
    random = np.random.default_rng(0)
    shape = (2, 2, 8, 8)
    tokens = random.integers(3, 280, (*shape[:-1], 9)).astype(np.int32)
    return {
        "inputs": tokens[..., :-1], "targets": tokens[..., 1:],
        "segment_ids": np.broadcast_to(np.arange(8) < 7, shape).astype(np.int32),
        "weights": np.broadcast_to((np.arange(8) > 2) & (np.arange(8) < 7), shape).astype(np.float32),
        "advantages": random.choice([1.0, -0.7], shape[:-1]).astype(np.float32),
        "old": -random.random(shape).astype(np.float32) * 6, "reference": -random.random(shape).astype(np.float32) * 6,
    }  # fmt: skip


def computed(mesh):
    partitioning = None if mesh is None else make_partitioning(mesh)
    state = _initializer(MODEL, relevant_to_step(TRAIN), 1, partitioning)(jax.random.key(0))
    arrays = rows()
    spread = Rows(**{
        name: placed(array, partitioning, None, None, *("batch", "sequence")[: array.ndim - 2])
        for name, array in arrays.items()
    })  # fmt: skip
    names = ("inputs", "targets", "segment_ids")
    own = [placed(arrays[name][0, 0], partitioning, "batch", "sequence") for name in names]
    scores, overflowed = make_scorer(MODEL, GRPO, partitioning)(state.params, state.others, *own)
    prompts = [np.arange(3, 6 + place % 2) for place in range(16)]
    sampling = Sampling(max_tokens=4, temperature=0.0, top_p=1.0, batch_size=8, width=4)
    responses = respond(
        model_graph(MODEL), (state.params, state.others), prompts, load_tokenizer("symbols"), sampling,
        jax.random.key(1), partitioning=partitioning,
    )  # fmt: skip
    following, metrics = make_updates(MODEL, TRAIN, GRPO, 1, partitioning)(state, spread)
    assert float(overflowed) == 0
    return (
        np.asarray(scores), [response.tokens.tolist() for response in responses],
        {name: np.asarray(metrics[name]) for name in ("loss", "kl", "clip_fraction", "grad_norm")},
        [np.asarray(leaf) for leaf in jax.tree.leaves(following.params)],
    )  # fmt: skip


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, expert=4)])
def test_a_mesh_changes_no_number_beyond_rounding(mesh):
    scores, responses, metrics, params = computed(None)
    scores_there, responses_there, metrics_there, params_there = computed(mesh)
    np.testing.assert_allclose(scores_there, scores, rtol=1e-4, atol=1e-4)
    assert responses_there == responses
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_there[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    for there, here in zip(params_there, params, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=2e-4)  # Adam's first steps magnify rounding
