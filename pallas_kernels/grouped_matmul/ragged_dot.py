"""`grouped_matmul` by `jax.lax.ragged_dot`.

XLA lowers the weight gradient to E dense products on every platform, and on CPU and GPU the forward too
(jax 0.10): E times the work. It is here because it runs everywhere, and as a second opinion.
"""

import jax
import jax.numpy as jnp

_WEIGHT_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _zero_past(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None], rows, 0)


def product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transpose_weights: bool) -> jax.Array:
    """(N, D) x (E, D, F) to (N, F); with `transpose_weights` the weights are (E, F, D)."""
    matrices = weights.swapaxes(1, 2) if transpose_weights else weights
    out = jax.lax.ragged_dot(_zero_past(rows, group_sizes), matrices, group_sizes, preferred_element_type=jnp.float32)
    return _zero_past(out, group_sizes).astype(rows.dtype)


def weight_gradient(rows: jax.Array, out_gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """(N, D), (N, F) to (E, D, F): each group's outer products, summed."""
    return jax.lax.ragged_dot_general(
        _zero_past(rows, group_sizes),
        _zero_past(out_gradient, group_sizes),
        group_sizes,
        _WEIGHT_GRADIENT,
        preferred_element_type=jnp.float32,
    )
