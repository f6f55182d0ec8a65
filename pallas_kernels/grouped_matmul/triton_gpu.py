"""`grouped_matmul` on GPU: a program multiplies one tile of a group's rows with a block of its expert's columns.

Tiles are those of `pallas_kernels.group_tiles`, so each is one group's. Programs that run together share an expert:
the columns of a tile come first, then the next tile, so an expert's weights are read once from memory and then from
the L2 cache. The weight gradient is one program per block of an expert's matrix, which walks its group's rows.

N rows, D contracted width, F output width, E groups, V tiles; M, BD, BF the block's rows, contracted and output width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.execution import Target
from pallas_kernels.group_tiles import most_tiles, tiles_of_groups
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.tiles import Misfit, Tiling
from pallas_kernels.varying import struct
from pallas_kernels.visits import tiles_of


class Tile(NamedTuple):
    """Rows, contracted width and output width of a block; the program's warps, and the loop's stages."""

    rows: int
    contracted: int
    out: int
    warps: int
    stages: int


def row_tile(num_rows: int, num_groups: int) -> int:
    """M: 128 or 64 rows where the mean group is twice as long, so that few rows are padding, else 16.

    64 is what one warpgroup's tensor-core instruction multiplies; 16 is the shortest that tensor cores take, for
    groups so small that reading the weights is what costs.
    """
    mean = num_rows // num_groups
    return 128 if mean >= 256 else 64 if mean >= 32 else 16


def product_tile(num_rows: int, num_groups: int, contracted: int, out: int, itemsize: int) -> Tile:
    """bfloat16: as much output as registers hold, 128 sums a thread at most; float32 has no tensor cores: 32 sums."""
    rows = row_tile(num_rows, num_groups)
    if itemsize == 4:
        return Tile(min(rows, 64), triton.side(contracted, 16), triton.side(out, 64), 4, 2)
    columns = triton.side(out, 256 if rows == 128 else 128)
    return Tile(rows, triton.side(contracted, 64), columns, 8 if rows * columns > 128 * 128 else 4, 3)


def weight_gradient_tile(num_rows: int, num_groups: int, width: int, out: int, itemsize: int) -> Tile:
    """128 x 128 of a gradient in bfloat16, 64 x 64 in float32; steps of 64 rows, fewer where groups are short."""
    mean = max(num_rows // num_groups, 1)
    if itemsize == 4:
        return Tile(16, triton.side(width, 64), triton.side(out, 64), 4, 2)
    return Tile(triton.side(mean, 64), triton.side(width, 128), triton.side(out, 128), 8, 3)


def _cut(tile: Tile, contracted: int, out: int) -> Tile:
    if tile.rows < triton.SMALLEST_SIDE:
        raise Misfit(f"rows={tile.rows}; at least {triton.SMALLEST_SIDE} are multiplied.")
    return triton.fitted(tile, contracted=contracted, out=out)


def _fitted_product(
    tile: Tile, rows_per_group: int, contracted: int, out: int, itemsize: int, chip: str | None
) -> Tile:
    del rows_per_group, chip
    tile = _cut(tile, contracted, out)
    triton.require_room(tile.stages * tile.contracted * (tile.rows + tile.out) * itemsize)
    return tile


def _fitted_weight_gradient(
    tile: Tile, rows_per_group: int, contracted: int, out: int, itemsize: int, chip: str | None
) -> Tile:
    del rows_per_group, chip
    tile = _cut(tile, contracted, out)
    triton.require_room(tile.stages * tile.rows * (tile.contracted + tile.out) * itemsize)
    return tile


PRODUCT = Tiling(
    "grouped_matmul",
    Tile,
    lambda rows_per_group, contracted, out, itemsize, chip: product_tile(rows_per_group, 1, contracted, out, itemsize),
    _fitted_product,
)
WEIGHT_GRADIENT = Tiling(
    "weight_gradient",
    Tile,
    lambda rows_per_group, contracted, out, itemsize, chip: weight_gradient_tile(
        rows_per_group, 1, contracted, out, itemsize
    ),
    _fitted_weight_gradient,
)


def _product_kernel(group, start, stop, rows, weights, out, *, tile, transpose, groups):
    width, out_width = rows.shape[1], out.shape[1]
    number, column_tile = triton.split(triton.program(), tiles_of(out_width, tile.out))
    this_group = group[number]
    own = triton.span(start[number], tile.rows, stop[number])
    columns = triton.tile_of(column_tile, tile.out, out_width)
    expert = jnp.minimum(this_group, groups - 1)

    def step(i, total):
        inner = triton.tile_of(i, tile.contracted, width)
        left = triton.load(rows, own, inner)
        if transpose:
            return total + triton.dot(left, triton.load(weights, columns, inner, expert), contract=(1, 1))
        return total + triton.dot(left, triton.load(weights, inner, columns, expert))

    # Rows of no group are zero, and not read.
    steps = triton.steps_if(this_group < groups, tiles_of(width, tile.contracted))
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.out), jnp.float32))
    triton.store(out, own, columns, total)


def product(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transpose_weights: bool, target: Target
) -> jax.Array:
    """(N, D) x (E, D, F) to (N, F); with `transpose_weights` the weights are (E, F, D), transposed block by block.

    Where `mosaic_gpu.serves`, its kernel runs instead.
    """
    if mosaic_gpu.serves(rows, weights, transpose_weights, target):
        return mosaic_gpu.product(rows, weights, group_sizes)
    num_rows, width = rows.shape
    groups, out_width = weights.shape[0], weights.shape[1 if transpose_weights else 2]
    itemsize = rows.dtype.itemsize
    tile = PRODUCT.choose(
        rows.dtype, target.chip, rows_per_group=num_rows // groups, contracted=width, out=out_width
    )
    tiles, columns = most_tiles(num_rows, groups, tile.rows), tiles_of(out_width, tile.out)
    return pl.pallas_call(
        functools.partial(_product_kernel, tile=tile, transpose=transpose_weights, groups=groups),
        out_shape=struct((num_rows, out_width), rows.dtype, rows, weights, group_sizes),
        grid=triton.num_programs(tiles, columns),
        compiler_params=triton.compiler_params(tile.warps, tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * tile.rows * width * out_width,
            transcendentals=0,
            bytes_accessed=itemsize * (num_rows * width + weights.size + num_rows * out_width),
        ),
        interpret=target.interpret,
        name="grouped_matmul_gpu",
    )(*tiles_of_groups(group_sizes, num_rows, tile.rows), rows, weights)


def _weight_gradient_kernel(start, stop, *arguments, tile, rows_by_token, gradient_by_token):
    *token, rows, gradient, out = arguments
    width, out_width = rows.shape[1], gradient.shape[1]
    rest, column_tile = triton.split(triton.program(), tiles_of(out_width, tile.out))
    group, width_tile = triton.split(rest, tiles_of(width, tile.contracted))
    first, end = start[group], stop[group]
    inner = triton.tile_of(width_tile, tile.contracted, width)
    columns = triton.tile_of(column_tile, tile.out, out_width)

    def step(i, total):
        own = triton.span(first + i * tile.rows, tile.rows, end)
        source = triton.looked_up(token, own)
        left = triton.load(rows, source if rows_by_token else own, inner)
        right = triton.load(gradient, source if gradient_by_token else own, columns)
        return total + triton.dot(left, right, contract=(0, 0))

    steps = jax.lax.div(end - first + (tile.rows - 1), jnp.int32(tile.rows))
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.contracted, tile.out), jnp.float32))
    triton.store(out, inner, columns, total, group)


def weight_gradient(
    rows: jax.Array,
    out_gradient: jax.Array,
    group_sizes: jax.Array,
    target: Target,
    *,
    token: jax.Array | None = None,
    rows_by_token: bool = False,
    gradient_by_token: bool = False,
) -> jax.Array:
    """(N, D), (N, F) to (E, D, F) in the dtype of rows: each group's outer products, summed in float32.

    Args:
      token: (N,) int32, where an operand has a row per token, (T, D) or (T, F), and row n is that of token[n].
      rows_by_token: whether `rows` is such an operand.
      gradient_by_token: whether `out_gradient` is.
    """
    num_rows = rows.shape[0] if token is None else token.shape[0]
    width = rows.shape[1]
    groups, out_width = group_sizes.shape[0], out_gradient.shape[1]
    itemsize = rows.dtype.itemsize
    tile = WEIGHT_GRADIENT.choose(
        rows.dtype, target.chip, rows_per_group=num_rows // groups, contracted=width, out=out_width
    )
    widths, columns = tiles_of(width, tile.contracted), tiles_of(out_width, tile.out)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return pl.pallas_call(
        functools.partial(
            _weight_gradient_kernel, tile=tile, rows_by_token=rows_by_token, gradient_by_token=gradient_by_token
        ),
        out_shape=struct((groups, width, out_width), rows.dtype, rows, out_gradient, group_sizes, token),
        grid=triton.num_programs(groups, widths, columns),
        compiler_params=triton.compiler_params(tile.warps, tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * (num_rows + groups * (tile.rows - 1)) * width * out_width,
            transcendentals=0,
            bytes_accessed=itemsize
            * (columns * num_rows * width + widths * num_rows * out_width + groups * width * out_width),
        ),
        interpret=target.interpret,
        name="weight_gradient_gpu",
    )(ends - group_sizes, ends, *([] if token is None else [token]), rows, out_gradient)
