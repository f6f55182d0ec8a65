"""The loss: each token's against plain NumPy, its gradient against formulae and against all logits at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import GRPOConfig
from jaxmoe.post_training import kl_estimate, token_loss
from jaxmoe.post_training.loss import Rows, response_loss

OPTIONS = {"clip_ratio": 0.2, "kl_coefficient": 0.001}


def numpy_loss(log_probability, old, reference, advantage):
    ratio = np.exp(log_probability - old)
    clipped = np.clip(ratio, 0.8, 1.2)
    difference = reference - log_probability
    kl = np.clip(np.exp(difference) - difference - 1, -10, 10)
    return np.maximum(-advantage * ratio, -advantage * clipped) + 0.001 * kl


@pytest.mark.parametrize("advantage", [1.095443, -0.730295, 0.0])
def test_tokens_have_the_loss_of_the_formula(advantage):
    random = np.random.default_rng(0)
    log_probability, old, reference = -random.random((3, 1, 50)) * 2
    found, kl, clipped = token_loss(
        jnp.asarray(log_probability), jnp.asarray(old), jnp.asarray(reference), jnp.array([advantage]), **OPTIONS
    )
    np.testing.assert_allclose(found, numpy_loss(log_probability, old, reference, advantage), rtol=1e-5, atol=1e-6)
    ratio = np.exp(log_probability - old)
    np.testing.assert_array_equal(clipped, (advantage > 0) * (ratio > 1.2) + (advantage < 0) * (ratio < 0.8))
    assert (np.asarray(kl) >= 0).all()


def test_the_divergence_is_clipped_and_0_where_nothing_differs():
    np.testing.assert_allclose(kl_estimate(jnp.array([-1.0, -9.0, -1.0]), jnp.array([-1.0, -1.0, -3.0])),
                               [0.0, 10.0, np.exp(-2) + 1], rtol=1e-6)  # fmt: skip


def test_the_gradient_at_ratio_1_is_that_of_the_policy_gradient():
    """d/dl of the policy's part is -A, and of the divergence 1 - exp(reference - l)."""
    log_probability, reference, advantage = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]]), jnp.array([0.7])
    slope = jax.grad(
        lambda own: token_loss(own, log_probability, reference, advantage, **OPTIONS)[0].sum()
    )(log_probability)
    np.testing.assert_allclose(slope, -0.7 + 0.001 * (1 - np.exp(np.array([[-0.5, 1.0]]))), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_are_those_with_all_logits_at_once(temperature):
    grpo = GRPOConfig(temperature=temperature, clip_ratio=0.2, kl_coefficient=0.05)
    keys = jax.random.split(jax.random.key(0), 6)
    hidden, head = jax.random.normal(keys[0], (3, 7, 8)), jax.random.normal(keys[1], (8, 11))
    targets = jax.random.randint(keys[2], (3, 7), 0, 11)

    def chosen(hidden, head):
        logits = jax.nn.log_softmax(hidden @ head / temperature)
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    here = chosen(hidden, head)
    rows = Rows(
        inputs=targets, targets=targets, segment_ids=jnp.ones_like(targets),
        weights=(jax.random.uniform(keys[3], (3, 7)) < 0.6).astype(jnp.float32),
        advantages=jnp.array([1.0, -0.5, 0.0]),
        old=here + 0.3 * jax.random.normal(keys[4], here.shape),
        reference=here + 0.3 * jax.random.normal(keys[5], here.shape),
    )  # fmt: skip
    tokens = rows.weights.sum()

    def plain(hidden, head):
        losses = token_loss(chosen(hidden, head), rows.old, rows.reference, rows.advantages,
                            clip_ratio=0.2, kl_coefficient=0.05)[0]  # fmt: skip
        return jnp.sum(rows.weights * losses) / tokens

    def chunked(hidden, head):
        return response_loss(hidden, head, rows, tokens, grpo)[0]

    expected, expected_gradient = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    found, gradient = jax.value_and_grad(chunked, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)
    _, sums = response_loss(hidden, head, rows, tokens, grpo)
    np.testing.assert_allclose(sums.kl, jnp.sum(rows.weights * kl_estimate(here, rows.reference)), rtol=1e-4)
    nothing = dataclasses.replace(rows, weights=jnp.zeros_like(rows.weights))
    assert response_loss(hidden, head, nothing, jnp.array(1.0), grpo)[0] == 0
