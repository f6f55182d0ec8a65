"""`combine` on GPU: a program sums the K rows of a few tokens, for a block of columns, in registers.

T tokens, K experts per token, D width, N rows; a block is M tokens of BD columns.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.execution import Target
from pallas_kernels.tiles import Tiling
from pallas_kernels.varying import struct
from pallas_kernels.visits import tiles_of


class Tile(NamedTuple):
    """Tokens and columns of a block, choices whose rows are read at once, and the warps that sum them."""

    tokens: int
    columns: int
    choices: int
    warps: int


def sum_tile(experts_per_token: int, width: int, itemsize: int) -> Tile:
    """16 sums for each of 128 threads, and the reads of up to 8 choices in flight."""
    columns = triton.side(width, 1024 // itemsize)
    return Tile(max(1, 2048 // columns), columns, min(experts_per_token, 8), 4)


def _fitted(tile: Tile, experts_per_token: int, width: int, itemsize: int, chip: str | None) -> Tile:
    del itemsize, chip
    choices = min(tile.choices, experts_per_token)
    return triton.fitted(tile._replace(choices=1), columns=width)._replace(choices=choices)


COMBINE = Tiling(
    "combine",
    Tile,
    lambda experts_per_token, width, itemsize, chip: sum_tile(experts_per_token, width, itemsize),
    _fitted,
)


def _kernel(num_routed, inverse, *arguments, tile, experts_per_token, width):
    *gate, rows, out = arguments
    block, column_tile = triton.split(triton.program(), tiles_of(width, tile.columns))
    columns = triton.tile_of(column_tile, tile.columns, width)
    tokens = triton.span(block * tile.tokens, tile.tokens, out.shape[0])

    def weighted(choice):
        chosen = tokens._replace(valid=tokens.valid & (choice < experts_per_token))
        row = triton.load_vector(inverse, chosen, choice)
        routed = chosen.valid & (row < num_routed[0])
        taken = triton.load(rows, triton.Axis(row, routed), columns).astype(jnp.float32)
        if not gate:
            return taken
        weight = triton.load_vector(gate[0], triton.Axis(tokens.index, routed), choice)
        return taken * weight[:, None].astype(jnp.float32)

    def several(step, total):
        return sum((weighted(step * tile.choices + j) for j in range(tile.choices)), start=total)

    steps = tiles_of(experts_per_token, tile.choices)
    total = jax.lax.fori_loop(0, steps, several, jnp.zeros((tile.tokens, tile.columns), jnp.float32))
    triton.store(out, tokens, columns, total)


def sum_rows(
    rows: jax.Array, inverse: jax.Array, num_routed: jax.Array, gate: jax.Array | None, target: Target
) -> jax.Array:
    """Each token's K rows, times its gate where there is one, summed in float32.

    Args:
      rows: (N, D).
      inverse: (T, K) int32 in [0, N); a row at or past num_routed counts nothing.
      num_routed: () int32.
      gate: (T, K) or None.
      target: of backend `gpu`.

    Returns:
      (T, D) in the dtype of rows.
    """
    tokens, k = inverse.shape
    width = rows.shape[1]
    tile = COMBINE.choose(rows.dtype, target.chip, experts_per_token=k, width=width)
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, experts_per_token=k, width=width),
        out_shape=struct((tokens, width), rows.dtype, rows, inverse, num_routed, gate),
        grid=triton.num_programs(tiles_of(tokens, tile.tokens), tiles_of(width, tile.columns)),
        compiler_params=triton.compiler_params(tile.warps, 1),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * k * width,
            transcendentals=0,
            bytes_accessed=(tokens * k + tokens) * width * rows.dtype.itemsize + 8 * tokens * k,
        ),
        interpret=target.interpret,
        name="combine_gpu",
    )(num_routed.reshape(1), inverse, *([] if gate is None else [gate]), rows)
