"""`dispatch` on GPU: a program copies a block of columns of a few rows, each from its own token.

T tokens, D width, N rows; a block is M rows of BD columns.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.execution import Target
from pallas_kernels.tiles import Tiling
from pallas_kernels.varying import struct
from pallas_kernels.visits import tiles_of


class Tile(NamedTuple):
    """Rows and columns of a block, and the warps that copy it."""

    rows: int
    columns: int
    warps: int


def gather_tile(width: int, itemsize: int) -> Tile:
    """Long pieces of rows, and eight 16-byte reads in flight for each of 128 threads."""
    columns = triton.side(width, 1024)
    return Tile(max(1, 8 * 128 * 16 // (columns * itemsize)), columns, 4)


def _fitted(tile: Tile, width: int, itemsize: int, chip: str | None) -> Tile:
    del itemsize, chip
    return triton.fitted(tile, columns=width)


DISPATCH = Tiling("dispatch", Tile, lambda width, itemsize, chip: gather_tile(width, itemsize), _fitted)


def _kernel(num_routed, token, x, out, *, tile, width):
    block, column_tile = triton.split(triton.program(), tiles_of(width, tile.columns))
    columns = triton.tile_of(column_tile, tile.columns, width)
    rows = triton.span(block * tile.rows, tile.rows, out.shape[0])
    source = triton.Axis(triton.load_vector(token, rows), rows.valid & (rows.index < num_routed[0]))
    triton.store(out, rows, columns, triton.load(x, source, columns))


def gather_tokens(x: jax.Array, token: jax.Array, num_routed: jax.Array, target: Target) -> jax.Array:
    """Row n is x[token[n]], zero from num_routed on.

    Args:
      x: (T, D).
      token: (N,) int32 in [0, T).
      num_routed: () int32.
      target: of backend `gpu`.

    Returns:
      (N, D) in the dtype of x.
    """
    num_rows, width = token.shape[0], x.shape[1]
    tile = DISPATCH.choose(x.dtype, target.chip, width=width)
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, width=width),
        out_shape=struct((num_rows, width), x.dtype, x, token, num_routed),
        grid=triton.num_programs(tiles_of(num_rows, tile.rows), tiles_of(width, tile.columns)),
        compiler_params=triton.compiler_params(tile.warps, 1),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * num_rows * width * x.dtype.itemsize + 4 * num_rows
        ),
        interpret=target.interpret,
        name="dispatch_gpu",
    )(num_routed.reshape(1), token, x)
