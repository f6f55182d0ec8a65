"""Grouping by counting, for chips whose matrix unit counts faster than memory is searched.

The row of an assignment is the first row of its expert plus the number of earlier assignments to that expert. Earlier
blocks are counted by sums; inside a block of B assignments, a triangular (B, B) matrix times the block's one-hot
(B, E+1) matrix counts those before each. No gather, no search and no scatter. Only the other direction, which
assignment a row holds, takes a sort: a permutation's inverse without a scatter is one.

N assignments, E experts, B assignments per block.
"""

import jax
import jax.numpy as jnp

_BLOCK = 256  # counts within a block are exact in bfloat16 products that are summed in float32
_INT32_MAX = 2**31 - 1


def group(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Groups assignments by expert, their order kept inside each group.

    Args:
      expert: (N,) int32 in [0, E], E standing for none.
      num_experts: E.

    Returns:
      order (N,), the assignment at each row; inverse (N,), the row of each assignment; offsets (E+1,), the first row of
      each expert and of those of none; all int32.
    """
    rows = expert.shape[0]
    inverse, offsets = _rows_of(expert, num_experts)
    assignment = jnp.arange(rows, dtype=jnp.int32)
    if (num_experts + 1) * rows <= _INT32_MAX:
        order = jax.lax.sort(expert * rows + assignment, is_stable=False) % max(rows, 1)  # no two keys are equal
    else:
        order = jax.lax.sort((expert, assignment), num_keys=1, is_stable=True)[1]
    return order, inverse, offsets


def _rows_of(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    rows = expert.shape[0]
    blocks = -(-rows // _BLOCK)
    # Padding is of no expert at all: E+1 is no column of the one-hot matrix.
    padded = jnp.pad(expert, (0, blocks * _BLOCK - rows), constant_values=num_experts + 1).reshape(blocks, _BLOCK)
    own = padded[:, :, None] == jnp.arange(num_experts + 1, dtype=jnp.int32)  # (blocks, B, E+1)
    in_block = jnp.sum(own, axis=1, dtype=jnp.int32)
    before_block = jnp.cumsum(in_block, axis=0, dtype=jnp.int32) - in_block
    sizes = jnp.sum(in_block, axis=0, dtype=jnp.int32)
    offsets = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    earlier = jnp.tril(jnp.ones((_BLOCK, _BLOCK), jnp.bfloat16), -1)
    within = jnp.einsum(
        "ij,bje->bie", earlier, own.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    ).astype(jnp.int32)
    row = jnp.sum(jnp.where(own, within + (before_block + offsets)[:, None, :], 0), axis=2, dtype=jnp.int32)
    return row.reshape(-1)[:rows], offsets
