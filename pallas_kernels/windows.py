"""A padded layout of grouped rows for backends that need static shapes: windows, and blocks for what exceeds them.

Every expert has a window of C rows, so that one batched matmul over (E, C, ·) does most of the work. The rows of a
group past its C-th are cut into blocks of M rows; a loop visits the blocks that exist, B at a time. The work is
that of E·C rows plus the overflow, whatever the routing, and no row is ever left out.

N routed rows, E experts, C window, M block, B blocks per turn of the loop.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.gather import take, take_valid

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static numbers of a layout.

    Attributes:
      window: C; 0 when there are fewer rows than experts, and all rows go to blocks.
      block: M.
      batch: B.
      max_blocks: room for the blocks of any routing, a multiple of B.
    """

    window: int
    block: int
    batch: int
    max_blocks: int


_CACHED_WEIGHTS = 2**16
"""Numbers of one expert's weights up to which copying them for a block is cheap beside multiplying with them."""

_MANY_ROWS = 64
"""Rows an expert up to which its window is no larger than the mean: the deviation would be an eighth of it or more."""


def tiling_for(num_rows: int, num_experts: int, weights_per_expert: int) -> Tiling:
    """Window and block for N rows over E experts of so many weights.

    The window is the mean load: a row of a window that stays empty costs about what an overflowing row saves, for that
    one costs about twice a window's row, so the best window lies near the median load. Where a block's copy of its
    expert's weights does not stay in the cache, overflow is dearer, and above 64 rows an expert the window is larger by
    the standard deviation that the load has under random routing. Blocks are small, so that a group's last one is not
    mostly empty, larger where each copies much, and a turn of the loop takes up to 256 rows of them, of no more than
    four experts where those are large.
    """
    mean = num_rows / num_experts
    large = weights_per_expert > _CACHED_WEIGHTS
    spare = math.sqrt(mean) if large and mean > _MANY_ROWS else 0
    window = min(math.ceil(mean + spare), num_rows) if mean >= 1 else 0
    limits = ((_MANY_ROWS + 1, 64), (48, 32), (9, 16), (0, 8)) if large else ((129, 64), (25, 32), (9, 16), (0, 8))
    block = next(size for least, size in limits if mean >= least)
    batch = 4 if large or block == 64 else 8
    blocks = most_blocks(num_rows, num_experts, window, block)
    return Tiling(window, block, batch, -(-blocks // batch) * batch)


def most_blocks(num_rows: int, num_experts: int, window: int, block: int) -> int:
    """How many blocks of M rows any routing of N rows can need beside windows of C.

    An expert that needs some has more than C rows, and its last block may hold a single row. So k experts need at most
    (N - k·C + k·(M-1)) / M, for the one or for the most k that there can be.
    """
    overflowing = min(num_experts, num_rows // (window + 1))
    return max(1, *((num_rows - k * (window - block + 1)) // block for k in (1, overflowing) if overflowing), 1)


class Rows(NamedTuple):
    """Rows of the grouped order taken together.

    Attributes:
      index: (groups, rows) int32, in [0, N) also where not valid.
      valid: (groups, rows) bool.
    """

    index: jax.Array
    valid: jax.Array


class Slots(NamedTuple):
    """Where rows of the grouped order lie in the layout; all of one shape.

    Attributes:
      in_window, in_block: bool; neither for rows of no expert.
      window: int32 index into E·C window rows, 0 where not in a window.
      block: int32 index into the block rows, 0 where not in a block.
    """

    in_window: jax.Array
    in_block: jax.Array
    window: jax.Array
    block: jax.Array

    def choice(self, j: int) -> "Slots":
        """Of slots (T, K), those of each token's j-th choice."""
        return Slots(*(part[:, j] for part in self))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of one routing. Build with `layout_of`."""

    tiling: Tiling
    num_rows: int
    offsets: jax.Array  # (E,) first row of each group
    sizes: jax.Array  # (E,)
    block_ends: jax.Array  # (E,) blocks of experts 0..e

    @property
    def num_experts(self) -> int:
        """E."""
        return self.sizes.shape[0]

    def with_batch(self, batch: int) -> "Layout":
        """The same layout, fewer blocks a turn; B must be a multiple of the batch."""
        return dataclasses.replace(self, tiling=dataclasses.replace(self.tiling, batch=batch))

    @property
    def block_capacity(self) -> int:
        """Rows that a buffer for the blocks needs."""
        return self.tiling.max_blocks * self.tiling.block

    def _block_counts(self) -> jax.Array:
        return -(-jnp.maximum(self.sizes - self.tiling.window, 0) // self.tiling.block)

    def windows(self) -> Rows:
        """(E, C): the first rows of each group."""
        position = jnp.arange(self.tiling.window, dtype=jnp.int32)
        index = jnp.minimum(self.offsets[:, None] + position, self.num_rows - 1)
        return Rows(index, position < self.sizes[:, None])

    def _blocks(self, turn: jax.Array) -> tuple[jax.Array, Rows]:
        """Experts (B,) and rows (B, M) of one turn of the loop; blocks past the last have no valid row."""
        tiling = self.tiling
        block = turn * tiling.batch + jnp.arange(tiling.batch, dtype=jnp.int32)
        expert = jnp.sum(block[:, None] >= self.block_ends, axis=1, dtype=jnp.int32)
        expert = jnp.minimum(expert, self.num_experts - 1)
        within = block - (self.block_ends - self._block_counts())[expert]
        first = self.offsets[expert] + tiling.window + within * tiling.block
        index = first[:, None] + jnp.arange(tiling.block, dtype=jnp.int32)
        valid = (index < (self.offsets + self.sizes)[expert][:, None]) & (block < self.block_ends[-1])[:, None]
        return expert, Rows(jnp.clip(index, 0, self.num_rows - 1), valid)

    def for_blocks(self, step: Callable[[jax.Array, Rows, jax.Array, Carry], Carry], carry: Carry) -> Carry:
        """Loops over the blocks that exist.

        Args:
          step: called with experts (B,), rows (B, M), the first slot of its B·M rows, and the carry.
          carry: what the loop starts with.
        """

        def body(state):
            turn, carry = state
            expert, rows = self._blocks(turn)
            return turn + 1, step(expert, rows, turn * (self.tiling.batch * self.tiling.block), carry)

        count = self.block_ends[-1]
        return jax.lax.while_loop(lambda state: state[0] * self.tiling.batch < count, body, (jnp.int32(0), carry))[1]

    def slots(self, row: jax.Array, expert: jax.Array) -> Slots:
        """Slots of rows of the grouped order.

        Args:
          row: int32, any shape.
          expert: int32, of the same shape; E for none.
        """
        known = expert < self.num_experts
        expert = jnp.minimum(expert, self.num_experts - 1)
        rank = row - self.offsets[expert]
        in_window = known & (rank < self.tiling.window)
        in_block = known & (rank >= self.tiling.window)
        first_block = (self.block_ends - self._block_counts())[expert]
        return Slots(
            in_window,
            in_block,
            jnp.where(in_window, expert * self.tiling.window + rank, 0),
            jnp.where(in_block, first_block * self.tiling.block + rank - self.tiling.window, 0),
        )


def layout_of(group_sizes: jax.Array, num_rows: int, weights_per_expert: int) -> Layout:
    """The layout of groups of these sizes, (E,) int32, among N rows, for experts of so many weights."""
    tiling = tiling_for(num_rows, group_sizes.shape[0], weights_per_expert)
    overflow = jnp.maximum(group_sizes - tiling.window, 0)
    return Layout(
        tiling=tiling,
        num_rows=num_rows,
        offsets=jnp.cumsum(group_sizes, dtype=jnp.int32) - group_sizes,
        sizes=group_sizes,
        block_ends=jnp.cumsum(-(-overflow // tiling.block), dtype=jnp.int32),
    )


def collect(window_rows: jax.Array, block_rows: jax.Array, slots: Slots) -> jax.Array:
    """Rows by their slots: (E, C, ...) windows and (block_capacity, ...) blocks to (*slots, ...); else zero."""
    flat = window_rows.reshape(-1, *window_rows.shape[2:])
    blocks = take_valid(block_rows, slots.block, slots.in_block)
    if flat.shape[0] == 0:
        return blocks
    in_window = slots.in_window.reshape(slots.in_window.shape + (1,) * (flat.ndim - 1))
    return jnp.where(in_window, take(flat, slots.window), blocks)


def add_at(total: jax.Array, index: jax.Array, parts: jax.Array) -> jax.Array:
    """`total[index[b]] += parts[b]`, one after the other and in place."""
    for b in range(index.shape[0]):
        updated = jax.lax.dynamic_index_in_dim(total, index[b]) + parts[b][None]
        total = jax.lax.dynamic_update_index_in_dim(total, updated, index[b], axis=0)
    return total
