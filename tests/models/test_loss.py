"""The chunked loss against the loss of all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.models import language_model_loss, token_nll

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 10, 4, 11


@pytest.fixture(scope="module")
def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
    head = jax.random.normal(keys[1], (WIDTH, VOCABULARY))
    targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCABULARY)
    weights = jax.random.uniform(keys[3], (BATCH, LENGTH)).at[:, -3:].set(0.0)
    return hidden, head, targets, weights


def whole_loss(hidden, head, targets, weights):
    nll = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * nll), nll


@pytest.mark.parametrize("chunk_logits", [10**6, 4 * BATCH * VOCABULARY, BATCH * VOCABULARY, 1])
def test_any_chunking_equals_the_whole(arguments, chunk_logits):
    """One chunk; chunks of 4, which do not divide 10; of single positions; and a bound too small to keep."""
    hidden, head, targets, weights = arguments

    def ours(hidden, head):
        total, nll = language_model_loss(hidden, head, targets, weights, chunk_logits=chunk_logits)
        return 3.0 * total, nll

    def expected(hidden, head):
        total, nll = whole_loss(hidden, head, targets, weights)
        return 3.0 * total, nll

    (total, nll), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(hidden, head)
    expected_value, expected_gradients = jax.value_and_grad(expected, (0, 1), has_aux=True)(hidden, head)
    expected_total, expected_nll = expected_value
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    undifferentiated, _ = ours(hidden, head)
    np.testing.assert_allclose(undifferentiated, expected_total, rtol=1e-5)


def test_token_losses_carry_no_gradient(arguments):
    hidden, head, targets, weights = arguments
    gradient = jax.grad(lambda hidden: language_model_loss(hidden, head, targets, weights)[1].sum())(hidden)
    np.testing.assert_array_equal(gradient, 0.0)


def test_huge_logits_stay_finite(arguments):
    hidden, head, targets, weights = arguments
    total, gradient = jax.value_and_grad(lambda h: language_model_loss(1e4 * h, head, targets, weights)[0])(hidden)
    assert np.isfinite(total)
    assert np.isfinite(gradient).all()


def test_bfloat16_hidden_states_give_a_float32_loss_and_head_gradient(arguments):
    hidden, head, targets, weights = arguments
    hidden = hidden.astype(jnp.bfloat16)

    def loss(hidden, head):
        return language_model_loss(hidden, head, targets, weights)[0]

    total, (by_hidden, by_head) = jax.value_and_grad(loss, (0, 1))(hidden, head)
    rounded = (hidden.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32))
    assert (total.dtype, by_hidden.dtype, by_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(total, whole_loss(*rounded, targets, weights)[0], rtol=1e-4)
    expected = jax.grad(lambda head: whole_loss(rounded[0], head, targets, weights)[0])(rounded[1])
    np.testing.assert_allclose(by_head, expected, rtol=0.05, atol=0.05)


def test_gradient_never_holds_all_logits():
    batch, length, width, vocabulary = 2, 64, 8, 4096
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((batch, length, width), jnp.float32), ((width, vocabulary), jnp.float32),
            ((batch, length), jnp.int32), ((batch, length), jnp.float32),
        ]
    ]

    def temporary_bytes(loss):
        compiled = jax.jit(jax.grad(lambda *a: loss(*a)[0], argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = 4 * batch * length * vocabulary
    assert temporary_bytes(whole_loss) >= all_logits
    assert temporary_bytes(lambda *a: language_model_loss(*a, chunk_logits=2**15)) < all_logits / 2


def test_token_nll_by_hand_and_its_gradient_does_not_scatter():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    targets = jnp.array([0, 2])
    np.testing.assert_allclose(token_nll(logits, targets), -np.log([0.5, 0.7]), rtol=1e-6)
    gradient = jax.grad(lambda logits: token_nll(logits, targets).sum())
    np.testing.assert_allclose(gradient(logits), [[-0.5, 0.25, 0.25], [0.1, 0.2, -0.3]], atol=1e-6)
    assert "scatter" not in str(jax.make_jaxpr(gradient)(logits))
