"""Tiles of rows that start where their group starts: the work list of the GPU's grouped kernels.

A GPU reads a block from any row on, so no tile straddles two groups, and every row belongs to one tile. How many
tiles there are is known only when the program runs; their most is static, and those past the end hold no rows.

N rows, E groups, M rows per tile, V the most tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GroupTiles(NamedTuple):
    """Tiles in the order of the rows.

    Attributes:
      group: (V,) int32; E for rows of no group, and for tiles that hold no rows.
      start: (V,) int32, the first row.
      stop: (V,) int32, the row after the last; at most start + M.
    """

    group: jax.Array
    start: jax.Array
    stop: jax.Array


def most_tiles(num_rows: int, num_groups: int, block: int) -> int:
    """V: what groups that each end one row into a new tile would need, the rows of no group counted as a group."""
    return min(num_rows, (num_rows + (num_groups + 1) * (block - 1)) // block)


def tiles_of_groups(group_sizes: jax.Array, num_rows: int, block: int) -> GroupTiles:
    """The tiles for groups of these sizes, (E,) int32, whose sum is at most N."""
    num_groups = group_sizes.shape[0]
    ends = jnp.append(jnp.cumsum(group_sizes, dtype=jnp.int32), jnp.int32(num_rows))
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]])
    needed = jax.lax.div(ends - starts + (block - 1), jnp.int32(block))
    ending = jnp.cumsum(needed, dtype=jnp.int32)
    tile = jnp.arange(most_tiles(num_rows, num_groups, block), dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= ending, axis=1, dtype=jnp.int32)
    exists = group <= num_groups
    group = jnp.minimum(group, num_groups)
    start = jnp.where(exists, starts[group] + (tile - (ending - needed)[group]) * block, num_rows)
    return GroupTiles(group, start, jnp.minimum(start + block, ends[group]))
