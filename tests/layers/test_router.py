"""The router: which experts are chosen, what their gates are, and what reaches its weights."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.layers import Router
from jaxmoe.layers.router import scores_of, top_experts

TOKENS, WIDTH, EXPERTS = 7, 6, 5


def make_router(**settings) -> Router:
    settings = {"num_experts": EXPERTS, "experts_per_token": 2, "init_std": 1.0} | settings
    return Router(WIDTH, rngs=nnx.Rngs(0), **settings)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))


def softmax(scores):
    exponential = np.exp(scores - scores.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def logits_of(router, x):
    return np.asarray(x, np.float64) @ np.asarray(router.weight[...], np.float64)


@given(
    scores=st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=5),
    k=st.integers(1, 4),
)
def test_largest_scores_are_chosen_and_ties_go_to_the_lowest_index(scores, k):
    scores = np.asarray(scores, np.float32)
    expected = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(top_experts(jnp.asarray(scores), k), expected)


def test_scores_that_are_not_numbers_still_give_indices_of_experts():
    chosen = top_experts(jnp.full((3, 4), jnp.nan), 2)
    assert ((chosen >= 0) & (chosen < 4)).all()


def test_topk_then_softmax_normalizes_the_kept_logits(x):
    router = make_router(experts_per_token=3)
    routing, logits = router(x), logits_of(router, x)
    order = np.argsort(-logits, axis=-1)[:, :3]
    np.testing.assert_array_equal(routing.expert_index, order)
    np.testing.assert_allclose(routing.gate, softmax(np.take_along_axis(logits, order, -1)), rtol=1e-5)
    np.testing.assert_allclose(routing.probabilities, softmax(logits), rtol=1e-5)
    np.testing.assert_allclose(routing.log_normalizer, np.log(np.exp(logits).sum(-1)), rtol=1e-5)


def test_softmax_then_topk_keeps_the_probabilities(x):
    router = make_router(score_order="softmax_then_topk", renormalize=False)
    routing = router(x)
    expected = np.take_along_axis(softmax(logits_of(router, x)), np.asarray(routing.expert_index), -1)
    np.testing.assert_allclose(routing.gate, expected, rtol=1e-5)


def test_renormalized_score_orders_are_one_function(x):
    first, second = make_router()(x), make_router(score_order="softmax_then_topk", renormalize=True)(x)
    np.testing.assert_array_equal(first.expert_index, second.expert_index)
    np.testing.assert_allclose(first.gate, second.gate, rtol=1e-6)
    np.testing.assert_allclose(second.gate.sum(-1), 1.0, rtol=1e-6)


def test_gates_are_scaled_after_they_are_normalized(x):
    plain, scaled = make_router()(x), make_router(routed_scaling=2.5)(x)
    np.testing.assert_allclose(scaled.gate, 2.5 * plain.gate, rtol=1e-6)
    np.testing.assert_array_equal(scaled.probabilities, plain.probabilities)


def test_bfloat16_router_rounds_logits_and_gates_but_not_probabilities(x):
    router = make_router(router_dtype="bfloat16")
    routing = router(x)
    logits = jnp.asarray(x, jnp.bfloat16) @ router.weight[...].astype(jnp.bfloat16)
    assert routing.gate.dtype == jnp.bfloat16
    assert routing.probabilities.dtype == routing.log_normalizer.dtype == jnp.float32
    np.testing.assert_allclose(routing.probabilities, softmax(np.asarray(logits, np.float64)), rtol=1e-5)


def test_kept_scores_have_the_gradient_of_a_gather_without_a_scatter():
    scores = jax.random.normal(jax.random.key(0), (6, 5))
    index = top_experts(scores, 3)
    weight = jax.random.normal(jax.random.key(1), (6, 3))

    def ours(scores):
        return jnp.sum(weight * scores_of(scores, index))

    def gathered(scores):
        return jnp.sum(weight * jnp.take_along_axis(scores, index, axis=-1))

    np.testing.assert_array_equal(jax.grad(ours)(scores), jax.grad(gathered)(scores))
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(ours))(scores))
    assert "scatter" in str(jax.make_jaxpr(jax.grad(gathered))(scores))


def task_gradient(router, x):
    return nnx.grad(lambda router: jnp.sum(router(x).gate ** 2))(router).weight[...]


@pytest.mark.parametrize("k", [0, EXPERTS + 1])
def test_more_experts_per_token_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=rf"experts_per_token={k} but the layer has {EXPERTS} experts; choose .* in 1"):
        make_router(experts_per_token=k)


def test_one_expert_per_token_warns_that_its_gate_is_constant(x):
    with pytest.warns(UserWarning, match="softmax_then_topk"):
        router = make_router(experts_per_token=1)
    np.testing.assert_array_equal(router(x).gate, 1.0)
    np.testing.assert_array_equal(task_gradient(router, x), 0.0)


def test_one_expert_per_token_learns_from_the_task_with_its_probability_as_gate(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router = make_router(experts_per_token=1, score_order="softmax_then_topk", renormalize=False)
    assert np.abs(task_gradient(router, x)).max() > 1e-3
