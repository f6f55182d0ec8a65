"""`dispatch` on TPU: each row is one copy from HBM to VMEM, a block of rows at a time.

While a block is laid out and written, the next one's copies are in flight.

T tokens, D width, N rows, M rows per block, L = D/128.
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

    rows: int


def _bytes(tile: Tile, width: int, itemsize: int) -> int:
    return 6 * tile.rows * width * itemsize


def dispatch_tile(width: int, itemsize: int, chip: str | None) -> Tile:
    """256 rows, 128 where three buffers of them would fill VMEM.

    Raises:
      Misfit: rows so long that 128 are too many: of v4, from 5,462 float32 numbers on.
    """
    tile = Tile(256)
    if _bytes(tile, width, itemsize) <= mosaic.vmem_budget(chip):
        return tile
    mosaic.require_room_for_rows(128, width, itemsize, _bytes(Tile(128), width, itemsize), chip)
    return Tile(128)


def _fitted(tile: Tile, width: int, itemsize: int, chip: str | None) -> Tile:
    mosaic.require_multiple("rows", tile.rows, mosaic.LANES)
    mosaic.require_room(_bytes(tile, width, itemsize), chip)
    return tile


DISPATCH = Tiling("dispatch", Tile, dispatch_tile, _fitted)


def _kernel(num_routed, index, next_index, x, out, buffer, semaphore, *, width):
    slot = mosaic.RowFetcher(x, buffer, semaphore).blocks_in_turn(index, next_index)
    rows = mosaic.from_lanes(buffer[slot], width)
    first = pl.program_id(0) * buffer.shape[1]
    row = first + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    out[...] = jnp.where(row < num_routed[0], rows.astype(jnp.float32), 0).astype(out.dtype)


def gather_tokens(x: jax.Array, token: jax.Array, num_routed: jax.Array, target: Target) -> jax.Array:
    """Row n is x[token[n]], zero from num_routed on.

    Args:
      x: (T, D), or (T, L, 128) as `mosaic.as_lanes` lays it out where D is a multiple of 128.
      token: (N,) int32 in [0, T).
      num_routed: () int32.
      target: of backend `tpu`.

    Returns:
      (N, D) in the dtype of x.
    """
    lanes = mosaic.as_lanes(x)
    num_rows, width = token.shape[0], x.shape[1] if x.ndim == 2 else lanes.shape[1] * mosaic.LANES
    block = DISPATCH.choose(x.dtype, target.chip, width=width).rows
    blocks = tiles_of(num_rows, block)
    token = mosaic.pad_to(token, blocks * block)
    return pl.pallas_call(
        functools.partial(_kernel, width=width),
        out_shape=struct((num_rows, width), x.dtype, x, token, num_routed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks,),
            in_specs=[
                *mosaic.index_blocks(block, blocks),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((block, width), lambda i, _: (i, 0)),
            scratch_shapes=[pltpu.VMEM((2, block, *lanes.shape[1:]), x.dtype), pltpu.SemaphoreType.DMA((2,))],
        ),
        compiler_params=mosaic.compiler_params(target.chip, "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * num_rows * width * x.dtype.itemsize + 4 * num_rows
        ),
        interpret=mosaic.interpret_of(target),
        name="dispatch_tpu",
    )(num_routed.reshape(1), token, token, lanes)
