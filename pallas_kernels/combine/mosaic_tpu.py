"""`combine` on TPU: the K rows of each token are copied from HBM to VMEM and summed there.

T tokens, K experts per token, D width, N rows, M tokens per block, L = D/128.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic
from pallas_kernels.execution import Target
from pallas_kernels.tiles import Tiling
from pallas_kernels.varying import struct
from pallas_kernels.visits import tiles_of


class Tile(NamedTuple):
    """M."""

    tokens: int


def _bytes(tile: Tile, experts_per_token: int, width: int, itemsize: int) -> int:
    return tile.tokens * width * (2 * experts_per_token * itemsize + 2 * itemsize + 8)


def combine_tile(experts_per_token: int, width: int, itemsize: int, chip: str | None) -> Tile:
    """256 tokens, fewer (at least 16) where two buffers of their K rows would fill half of VMEM.

    Raises:
      Misfit: so many and so long rows that those of 16 tokens are too many: of v4, 16 of 8,192 float32 numbers.
    """
    tokens = 256
    while tokens > 16 and _bytes(Tile(tokens), experts_per_token, width, itemsize) > mosaic.vmem_budget(chip) // 2:
        tokens //= 2
    needed = _bytes(Tile(tokens), experts_per_token, width, itemsize)
    mosaic.require_room_for_rows(tokens * experts_per_token, width, itemsize, needed, chip)
    return Tile(tokens)


def _fitted(tile: Tile, experts_per_token: int, width: int, itemsize: int, chip: str | None) -> Tile:
    mosaic.require_multiple("tokens", tile.tokens, 16)
    mosaic.require_room(_bytes(tile, experts_per_token, width, itemsize), chip)
    return tile


COMBINE = Tiling("combine", Tile, combine_tile, _fitted)


def _kernel(num_routed, index, next_index, inverse, *arguments, experts_per_token, width, weighted):
    gate, rows, out, buffer, semaphore = arguments if weighted else (None, *arguments)
    size = out.shape[0]
    slot = mosaic.RowFetcher(rows, buffer, semaphore).blocks_in_turn(index, next_index)
    total = jnp.zeros(out.shape, jnp.float32)
    for j in range(experts_per_token):
        taken = mosaic.from_lanes(buffer[slot, j * size : (j + 1) * size], width).astype(jnp.float32)
        if weighted:
            taken = taken * gate[:, j : j + 1]
        row = jnp.broadcast_to(inverse[:, j : j + 1], taken.shape)
        total += jnp.where(row < num_routed[0], taken, 0)
    out[...] = total.astype(out.dtype)


def sum_rows(
    rows: jax.Array, inverse: jax.Array, num_routed: jax.Array, gate: jax.Array | None, target: Target
) -> jax.Array:
    """Each token's K rows, times its gate where there is one, summed in float32.

    Args:
      rows: (N, D), or (N, L, 128) where its kernel wrote it so, which saves a copy.
      inverse: (T, K) int32 in [0, N); a row at or past num_routed counts nothing.
      num_routed: () int32.
      gate: (T, K) or None.
      target: of backend `tpu`.

    Returns:
      (T, D) in the dtype of rows.
    """
    tokens, k = inverse.shape
    lanes = mosaic.as_lanes(rows)
    width = rows.shape[1] if rows.ndim == 2 else rows.shape[1] * rows.shape[2]
    block = COMBINE.choose(rows.dtype, target.chip, experts_per_token=k, width=width).tokens
    blocks = tiles_of(tokens, block)
    # The order of the copies: a block's first choices, then its second ones, and so on.
    index = jnp.pad(inverse, ((0, blocks * block - tokens), (0, 0)))
    index = index.reshape(blocks, block, k).swapaxes(1, 2).reshape(blocks, block * k)
    stride = max(mosaic.LANES, 1 << (block * k - 1).bit_length())  # what a block in scalar memory may measure
    index = jnp.pad(index, ((0, 0), (0, stride - block * k))).reshape(-1)
    per_token = pl.BlockSpec((block, k), lambda i, _: (i, 0))
    weighted = gate is not None
    return pl.pallas_call(
        functools.partial(_kernel, experts_per_token=k, width=width, weighted=weighted),
        out_shape=struct((tokens, width), rows.dtype, rows, inverse, num_routed, gate),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks,),
            in_specs=[
                *mosaic.index_blocks(stride, blocks),
                per_token,
                *([per_token] if weighted else []),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((block, width), lambda i, _: (i, 0)),
            scratch_shapes=[pltpu.VMEM((2, block * k, *lanes.shape[1:]), rows.dtype), pltpu.SemaphoreType.DMA((2,))],
        ),
        compiler_params=mosaic.compiler_params(target.chip, "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * k * width,
            transcendentals=0,
            bytes_accessed=(tokens * k + tokens) * width * rows.dtype.itemsize + 8 * tokens * k,
        ),
        interpret=mosaic.interpret_of(target),
        name="combine_tpu",
    )(num_routed.reshape(1), index, index, inverse, *([gate.astype(jnp.float32)] if weighted else []), lanes)
