"""Visits of a grouped matmul: which (group, row tile) pairs a kernel's static grid has to touch.

Groups start anywhere, tiles of M rows do not, so a tile is visited once for every group that has rows in it. The
number of visits is known only when the program runs; their most, ceil(N/M) + E, is static.

N rows, E groups, M rows per tile, V the most visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """Visits in the order of the rows; those past `count` repeat the last one.

    Attributes:
      group: (V,) int32; E stands for the rows of no group.
      tile: (V,) int32.
      offsets: (E+2,) int32, the first row of each group, of the rows of no group, and N.
      count: () int32, how many there are: the size of the grid.
    """

    group: jax.Array
    tile: jax.Array
    offsets: jax.Array
    count: jax.Array

    @property
    def prefetched(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What a kernel holds in scalar memory."""
        return self.group, self.tile, self.offsets


def tiles_of(num_rows: int, block: int) -> int:
    """ceil(N/M)."""
    return -(-num_rows // block)


def visits_of(
    group_sizes: jax.Array, num_rows: int, block: int, *, of_groups: bool, empty_groups: bool = True
) -> Visits:
    """The visits for groups of these sizes, (E,) int32.

    Args:
      group_sizes: their sum is at most N.
      num_rows: N.
      block: M.
      of_groups: rows of no group are not visited (a kernel that writes one result per group). Otherwise every tile is
        visited, those of no group too, and empty groups are not (one result per row).
      empty_groups: with `of_groups`, visit the groups without rows too, once; else there may be no visit at all.
    """
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    offsets = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends, jnp.full((1,), num_rows, jnp.int32)])
    starts = offsets[:-1] if not of_groups else offsets[:num_groups]
    stops = offsets[1:] if not of_groups else ends
    size = jnp.int32(block)
    first = jax.lax.div(starts, size)
    of_empty = 1 if of_groups and empty_groups else 0
    needed = jnp.where(stops > starts, jax.lax.div(stops - 1, size) - first + 1, of_empty)
    ending = jnp.cumsum(needed, dtype=jnp.int32)
    count = ending[-1]
    visit = jnp.minimum(jnp.arange(tiles_of(num_rows, block) + num_groups, dtype=jnp.int32), jnp.maximum(count, 1) - 1)
    group = jnp.minimum(jnp.sum(visit[:, None] >= ending, axis=1, dtype=jnp.int32), needed.shape[0] - 1)
    tile = first[group] + visit - (ending - needed)[group]
    return Visits(group, jnp.clip(tile, 0, tiles_of(num_rows, block) - 1), offsets, count)
