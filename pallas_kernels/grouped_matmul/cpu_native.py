"""`grouped_matmul` on CPU by the compiled kernels of `pallas_kernels.native`, in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native


def product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transpose_weights: bool) -> jax.Array:
    """(N, D) x (E, D, F) to (N, F); with `transpose_weights` the weights are (E, F, D)."""
    shape = rows.shape[0], weights.shape[1 if transpose_weights else 2]
    transpose = np.bool_(transpose_weights)
    return native.call("Product", (shape,), rows, weights, _offsets(group_sizes), transpose=transpose)[0]


def weight_gradient(rows: jax.Array, out_gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """(N, D), (N, F) to (E, D, F): the outer products of each group's rows, summed."""
    shape = group_sizes.shape[0], rows.shape[1], out_gradient.shape[1]
    past_cache = np.bool_(math.prod(shape) >= native.CACHED_NUMBERS)
    offsets = _offsets(group_sizes)
    return native.call("WeightGradient", (shape,), rows, out_gradient, offsets, past_cache=past_cache)[0]


def _offsets(group_sizes: jax.Array) -> jax.Array:
    return jnp.pad(jnp.cumsum(group_sizes, dtype=jnp.int32), (1, 0))
