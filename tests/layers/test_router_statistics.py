"""Auxiliary losses and load metrics, from sums over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import MoEConfig
from jaxmoe.layers import RouterStatistics, auxiliary_losses, load_balance_loss, load_metrics


def statistics(count, probability_sum, tokens, z_sum=0.0, dropped=0.0, overflowed=0.0) -> RouterStatistics:
    values = (count, probability_sum, z_sum, tokens, dropped, overflowed)
    return RouterStatistics(*(jnp.asarray(value, jnp.float32) for value in values))


UNIFORM = statistics([4, 4, 4, 4], [2, 2, 2, 2], 8.0, z_sum=24.0)
COLLAPSED = statistics([8, 8, 0, 0], [4, 4, 0, 0], 8.0, z_sum=8.0, dropped=4.0, overflowed=2.0)
BOTH = jax.tree.map(lambda *layers: jnp.stack(layers), UNIFORM, COLLAPSED)


def test_balance_loss_is_one_when_uniform_and_grows_with_concentration():
    assert load_balance_loss(UNIFORM) == pytest.approx(1.0)
    assert load_balance_loss(COLLAPSED) == pytest.approx(2.0)  # 4 · (1/2·1/2 + 1/2·1/2)
    np.testing.assert_allclose(load_balance_loss(BOTH), [1.0, 2.0])


@pytest.mark.parametrize(
    ("settings", "load_balance", "router_z"),
    [
        ({}, 3.0, 4.0),
        ({"auxiliary_reduction": "mean"}, 1.5, 2.0),
        ({"load_balance_definition": "switch_times_k"}, 6.0, 4.0),
        ({"load_balance_definition": "switch_times_k", "auxiliary_reduction": "mean"}, 3.0, 2.0),
    ],
)
def test_definitions_of_the_auxiliary_losses(settings, load_balance, router_z):
    losses = auxiliary_losses(BOTH, MoEConfig(num_experts=4, experts_per_token=2, **settings))
    assert losses["load_balance"] == pytest.approx(load_balance)
    assert losses["router_z"] == pytest.approx(router_z)


@given(
    count=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    probability=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    split=st.integers(0, 6),
)
def test_statistics_of_parts_add_up_to_those_of_the_whole(count, probability, split):
    """Rows of one expert choice and one probability each, cut in two anywhere."""
    one_hot = np.eye(10)[count]
    other = np.asarray(probability)[:, None] * np.ones(10)

    def part(rows):
        return statistics(one_hot[rows].sum(0), other[rows].sum(0), len(one_hot[rows]), other[rows].sum())

    config = MoEConfig(num_experts=10, experts_per_token=1)
    whole = auxiliary_losses(part(slice(None)), config)
    added = auxiliary_losses(part(slice(split)) + part(slice(split, None)), config)
    for name, value in whole.items():
        np.testing.assert_allclose(added[name], value, rtol=1e-5, atol=1e-6)


def test_balance_loss_differentiates_the_probabilities_alone():
    def loss(count, probability_sum):
        return load_balance_loss(dataclasses.replace(UNIFORM, expert_count=count, probability_sum=probability_sum))

    by_count, by_probability = jax.grad(loss, argnums=(0, 1))(COLLAPSED.expert_count, COLLAPSED.probability_sum)
    np.testing.assert_array_equal(by_count, 0.0)
    np.testing.assert_allclose(by_probability, [0.25, 0.25, 0.0, 0.0])  # E · f_e / T


def test_one_layer_alone_needs_no_config():
    losses = auxiliary_losses(COLLAPSED)
    assert (losses["load_balance"], losses["router_z"]) == (pytest.approx(2.0), pytest.approx(1.0))
    metrics = load_metrics(COLLAPSED)
    assert metrics["dead_experts"] == 2
    assert metrics["load_max_over_mean"] == pytest.approx(2.0)
    np.testing.assert_allclose(metrics["expert_load"], [0.5, 0.5, 0, 0])


def test_load_metrics_of_a_balanced_and_a_collapsed_layer():
    metrics = load_metrics(BOTH)
    assert metrics["dropped_fraction"] == pytest.approx(4 / 32)
    assert metrics["overflow_fraction"] == pytest.approx(2 / 32)
    assert metrics["dead_experts"] == 2
    assert metrics["load_max_over_mean"] == pytest.approx((1 + 2) / 2)
    assert metrics["load_cv"] == pytest.approx((0 + 1) / 2)
    np.testing.assert_allclose(metrics["expert_load"], [[0.25] * 4, [0.5, 0.5, 0, 0]])


def test_no_tokens_give_numbers():
    empty = jax.tree.map(jnp.zeros_like, BOTH)
    values = [*auxiliary_losses(empty, MoEConfig(num_experts=4)).values(), *load_metrics(empty).values()]
    assert all(np.isfinite(value).all() for value in values)
