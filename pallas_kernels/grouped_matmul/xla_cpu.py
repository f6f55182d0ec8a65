"""`grouped_matmul` on CPU: a batched matmul over windows, and a loop over blocks of what exceeds them.

Layout and its cost: `pallas_kernels.windows`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import expert_products
from pallas_kernels.gather import take, take_valid
from pallas_kernels.varying import zeros
from pallas_kernels.windows import add_at, collect, layout_of


def product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transpose_weights: bool) -> jax.Array:
    """(N, D) x (E, D, F) to (N, F); with `transpose_weights` the weights are (E, F, D)."""
    num_rows = rows.shape[0]
    multiply = expert_products.product_transposed if transpose_weights else expert_products.product
    width = weights.shape[1 if transpose_weights else 2]
    layout = layout_of(group_sizes, num_rows, rows.shape[1] * width)
    windows = layout.windows()
    window_out = multiply(take_valid(rows, windows.index, windows.valid), weights)

    def overflow(expert, block, slot, block_out):
        out = multiply(take_valid(rows, block.index, block.valid), take(weights, expert))
        return jax.lax.dynamic_update_slice(block_out, out.reshape(-1, width), (slot, 0))

    block_out = layout.for_blocks(overflow, zeros((layout.block_capacity, width), jnp.float32, window_out))
    row = jnp.arange(num_rows, dtype=jnp.int32)
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), row, side="right", method="scan_unrolled").astype(jnp.int32)
    return collect(window_out, block_out, layout.slots(row, expert)).astype(rows.dtype)


def weight_gradient(rows: jax.Array, out_gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """(N, D), (N, F) to (E, D, F) float32: the outer products of each group's rows, summed."""
    layout = layout_of(group_sizes, rows.shape[0], rows.shape[1] * out_gradient.shape[1])

    def outer(part):
        left, right = (take_valid(array, part.index, part.valid) for array in (rows, out_gradient))
        return expert_products.outer_product(left, right)

    def overflow(expert, block, slot, total):
        return add_at(total, expert, outer(block))

    return layout.for_blocks(overflow, outer(layout.windows()))
