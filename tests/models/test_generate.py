"""Generation with a cache against the full forward pass, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.models import Decoder, generate
from jaxmoe.models.generate import sample_token

MOE = MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=6, capacity_factor=0.5)
SHAPE = {"vocab_size": 23, "width": 8, "num_heads": 4, "init_std": 0.5, "max_sequence_length": 12}
CONFIGS = {
    "moe": ModelConfig(num_layers=2, moe=MOE, **SHAPE),
    "dense, grouped-query, tied": ModelConfig(
        num_layers=2, dense_hidden=8, num_kv_heads=2, tie_embeddings=True, qk_norm="head", **SHAPE
    ),
    "mixed": ModelConfig(num_layers=4, moe=MOE, first_dense_layers=1, moe_every=2, document_mask=True, **SHAPE),
}
PROMPTS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0], [6, 0, 0, 0, 0]])
LENGTHS = np.array([5, 2, 1])
NEW = 7


@nnx.jit(static_argnums=0)
def build(config: ModelConfig) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(1))


greedy = nnx.jit(generate, static_argnames=("max_new_tokens", "stop_token", "temperature", "top_p", "pad_token"))


@pytest.fixture(scope="module")
def moe_model():
    return build(CONFIGS["moe"])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_equals_the_full_forward_pass_at_every_step(name):
    """Each row's own prefix is run from scratch, without limits on experts, and its likeliest token taken."""
    model = build(CONFIGS[name])
    free = nnx.view(model, dropless=True, raise_if_not_found=False)
    new = greedy(model, PROMPTS, LENGTHS, max_new_tokens=NEW)
    assert new.dtype == jnp.int32
    forward = nnx.jit(lambda model, tokens, segments: model(tokens, segment_ids=segments).logits)
    rows = np.zeros((3, 12), np.int32)
    for row, length in enumerate(LENGTHS):
        rows[row, :length] = PROMPTS[row, :length]
    for step in range(NEW):
        ends = LENGTHS + step
        logits = forward(free, rows, (np.arange(12) < ends[:, None]).astype(np.int32))
        expected = np.argmax(logits[np.arange(3), ends - 1], axis=-1)
        np.testing.assert_array_equal(new[:, step], expected)
        rows[np.arange(3), ends] = expected


def test_rows_do_not_depend_on_their_neighbours(moe_model):
    together = greedy(moe_model, PROMPTS, LENGTHS, max_new_tokens=NEW)
    alone = greedy(moe_model, PROMPTS[1:2, :3], LENGTHS[1:2], max_new_tokens=NEW)
    np.testing.assert_array_equal(together[1:2], alone)


def test_what_follows_the_stop_token_is_padding(moe_model):
    plain = np.asarray(greedy(moe_model, PROMPTS, LENGTHS, max_new_tokens=NEW))
    stop = int(plain[0, 2])
    stopped = greedy(moe_model, PROMPTS, LENGTHS, max_new_tokens=NEW, stop_token=stop, pad_token=22)
    for row, expected in enumerate(plain):
        found = np.flatnonzero(expected == stop)
        end = found[0] + 1 if found.size else NEW
        np.testing.assert_array_equal(stopped[row, :end], expected[:end])
        np.testing.assert_array_equal(stopped[row, end:], 22)


def test_sampling_follows_the_key_and_differs_between_steps(moe_model):
    def sample(seed):
        return np.asarray(
            greedy(moe_model, PROMPTS, LENGTHS, max_new_tokens=NEW, temperature=5.0, key=jax.random.key(seed))
        )

    first, other = sample(0), sample(1)
    np.testing.assert_array_equal(first, sample(0))
    assert (first != other).any()
    assert len(np.unique(first)) > 3


def test_nucleus_keeps_the_likeliest_tokens_of_the_given_mass():
    probability = np.array([0.15, 0.5, 0.05, 0.3])
    logits = jnp.tile(jnp.log(probability), (4000, 1))

    def frequencies(temperature, top_p):
        drawn = sample_token(logits, jax.random.key(0), temperature, top_p)
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(frequencies(1.0, 1.0), probability, atol=0.03)
    np.testing.assert_allclose(frequencies(1.0, 0.79), [0, 5 / 8, 0, 3 / 8], atol=0.03)
    np.testing.assert_allclose(frequencies(1.0, 0.81), np.array([3, 10, 0, 6]) / 19, atol=0.03)
    np.testing.assert_array_equal(frequencies(1.0, 1e-6), [0, 1, 0, 0])
    squared = probability**2
    np.testing.assert_allclose(frequencies(0.5, 1.0), squared / squared.sum(), atol=0.03)
    np.testing.assert_array_equal(frequencies(0.0, 1.0), [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 8}, "5 tokens and max_new_tokens=8 need 13 positions.*max_sequence_length=12"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; it must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0}, "give key="),
        ({"top_p": 0.0}, "choose 0 < top_p <= 1"),
        ({"temperature": 1.0, "key": jax.random.PRNGKey(0)}, r"array of uint32.*give jax.random.key\(seed\)"),
        ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 2)}, r"key has shape \(2,\).*\(3,\)"),
    ],
)
def test_misuse_is_an_error_in_the_users_terms(moe_model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(moe_model, PROMPTS, LENGTHS, **({"max_new_tokens": 3} | change))


def test_prompt_lengths_may_be_a_list(moe_model):
    ours, theirs = (
        generate(moe_model, PROMPTS, lengths, max_new_tokens=1) for lengths in (LENGTHS.tolist(), jnp.asarray(LENGTHS))
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 0, 1], r"prompt_lengths\[1\]=0; prompts of 5 columns have 1\.\.5 tokens"),
        (np.array([5, 2, 6]), r"prompt_lengths\[2\]=6"),
        ([5, 2], r"prompt_lengths has shape \(2,\); \(3,\) is expected"),
    ],
)
def test_impossible_prompt_lengths_are_refused(moe_model, lengths, message):
    with pytest.raises(ValueError, match=message):
        generate(moe_model, PROMPTS, lengths, max_new_tokens=3)
