"""Norm, embedding and the dense MLP, by their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.layers import DenseMLP, Embedding, RMSNorm


def test_rms_norm_by_hand():
    norm = RMSNorm(3, epsilon=2.0)
    norm.scale[...] = jnp.array([1.0, 2.0, -1.0])
    np.testing.assert_allclose(norm(jnp.array([[1.0, 2.0, 5.0]])), np.array([[1, 4, -5]]) / np.sqrt(12), rtol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    norm = RMSNorm(64)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_embedding_looks_up_and_adds_gradients_of_equal_tokens():
    embedding = Embedding(5, 3, init_std=1.0, rngs=nnx.Rngs(0))
    tokens = jnp.array([[4, 0, 4]])
    np.testing.assert_array_equal(embedding(tokens)[0], np.asarray(embedding.table[...])[[4, 0, 4]])
    gradient = nnx.grad(lambda embedding: embedding(tokens).sum())(embedding).table[...]
    np.testing.assert_array_equal(gradient, np.array([1, 0, 0, 0, 2])[:, None] * np.ones(3))


def test_embedding_of_an_unknown_token_is_not_a_number():
    embedding = Embedding(5, 3, rngs=nnx.Rngs(0))
    found = embedding(jnp.array([4, 5]))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


def test_dense_mlp_by_its_formula():
    mlp = DenseMLP(4, 6, init_std=0.7, rngs=nnx.Rngs(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 3, 4)))
    gate, up = np.split(x @ np.asarray(mlp.gate_up[...]), 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * up @ np.asarray(mlp.down[...])
    np.testing.assert_allclose(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_output_matrix_has_its_own_init():
    mlp = DenseMLP(64, 64, init_std=1.0, output_init_std=0.25, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.std(mlp.gate_up[...]), 1.0, rtol=0.03)
    np.testing.assert_allclose(np.std(mlp.down[...]), 0.25, rtol=0.03)
