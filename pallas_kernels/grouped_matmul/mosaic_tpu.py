"""`grouped_matmul` on TPU: a tile of rows meets the matrix of each group that has rows in it.

The grid walks the visits of `pallas_kernels.visits`; consecutive visits of one tile share its output block, which stays
in VMEM until the last of them, and consecutive visits of one group share its weights.

N rows, D contracted width, F output width, E groups, V visits; M, BD, BF the tile's rows, contracted and output width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic
from pallas_kernels.execution import Target
from pallas_kernels.visits import tiles_of, visits_of


class Tile(NamedTuple):
    """Rows, contracted width and output width of one product in VMEM."""

    rows: int
    contracted: int
    out: int


def row_tile(num_rows: int, num_groups: int) -> int:
    """M: 128 rows, 256 or 512 where the mean group has as many, so that weights are read less often."""
    mean = num_rows // num_groups
    return next((size for size in (512, 256) if mean >= size), 128)


def _halved(width: int, limit: int) -> int:
    """All of a width, or the largest power of two up to the limit."""
    return width if width <= limit else 1 << (limit.bit_length() - 1)


def _next_smaller(width: int) -> int:
    return 1 << ((width - 1).bit_length() - 1)


def product_tile(num_rows: int, num_groups: int, contracted: int, out: int, itemsize: int) -> Tile:
    """The whole contracted width where it fits, and as much of the output as VMEM has room for."""
    tile = Tile(row_tile(num_rows, num_groups), _halved(contracted, 4096), _halved(out, 2048))
    while _product_bytes(tile, itemsize) > mosaic.VMEM_BUDGET:
        rows, inner, outer = tile
        if outer > 512 or (outer >= inner and outer > 128):
            tile = Tile(rows, inner, _next_smaller(outer))
        elif inner > 128:
            tile = Tile(rows, _next_smaller(inner), outer)
        else:
            break
    return tile


def _product_bytes(tile: Tile, itemsize: int) -> int:
    rows, inner, outer = tile
    split = 6 if itemsize == 4 else 0  # float32 operands are multiplied as three bfloat16 parts
    return (2 * itemsize + split) * (rows * inner + inner * outer) + (2 * itemsize + 8) * rows * outer


def weight_gradient_tile(num_rows: int, num_groups: int, width: int, out: int, itemsize: int) -> Tile:
    """Up to 1024 x 1024 of a gradient at a time: it is summed in float32 in VMEM."""
    del itemsize
    return Tile(row_tile(num_rows, num_groups), _halved(width, 1024), _halved(out, 1024))


def _inside(tile, rows, start, stop, shape):
    row = tile * rows + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= start) & (row < stop)


def _product_kernel(group, tile, offsets, count, rows, weights, out, *scratch, transpose, width, contracted, groups):
    visit, step = pl.program_id(1), pl.program_id(2)
    last_step = pl.num_programs(2) - 1
    active = visit < count[0]
    this_group, this_tile = group[visit], tile[visit]
    routed = active & (this_group < groups)
    new_tile = (visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != this_tile)

    @pl.when(active & new_tile & (step == 0))
    def _():
        out[...] = jnp.zeros_like(out)

    def multiplied():
        left, right = rows[...], weights[...]
        if width % contracted:
            valid = width - step * contracted
            left = _keep(left, valid, axis=1)
            right = _keep(right, valid, axis=1 if transpose else 0)
        return jax.lax.dot_general(
            left,
            right,
            (((1,), (1 if transpose else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=mosaic.precision_of(left.dtype),
        )

    def store(product):
        shape = (rows.shape[0], product.shape[1])
        mine = _inside(this_tile, rows.shape[0], offsets[this_group], offsets[this_group + 1], shape)
        kept = out[...].reshape(shape).astype(jnp.float32)
        out[...] = jnp.where(mine, product, kept).astype(out.dtype).reshape(out.shape)

    if not scratch:

        @pl.when(routed)
        def _():
            store(multiplied())

        return
    (total,) = scratch

    @pl.when(routed & (step == 0))
    def _():
        total[...] = multiplied()

    @pl.when(routed & (step > 0))
    def _():
        total[...] += multiplied()

    @pl.when(routed & (step == last_step))
    def _():
        store(total[...])


def _keep(block, valid, axis):
    """Zero from index `valid` on: what lies past an array's end is undefined."""
    index = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(index < valid, block.astype(jnp.float32), 0).astype(block.dtype)


def product(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    transpose_weights: bool,
    target: Target,
    *,
    in_lanes: bool = False,
) -> jax.Array:
    """(N, D) x (E, D, F) to (N, F); with `transpose_weights` the weights are (E, F, D), transposed tile by tile.

    Args:
      in_lanes: return (N, F/128, 128), which `combine` fetches rows of without a copy; F must be a multiple of 128.
    """
    num_rows, width = rows.shape
    groups, out_width = weights.shape[0], weights.shape[1 if transpose_weights else 2]
    itemsize = rows.dtype.itemsize
    tile = product_tile(num_rows, groups, width, out_width, itemsize)
    if in_lanes and tile.out != out_width and tile.out % 1024:
        tile = tile._replace(out=1024, contracted=_halved(width, 2048))
    steps = tiles_of(width, tile.contracted)
    visits = visits_of(group_sizes, num_rows, tile.rows, of_groups=False)

    def of_group(index):
        return jnp.minimum(index, groups - 1)  # rows of no group multiply nothing

    if transpose_weights:
        weights_spec = pl.BlockSpec(
            (None, tile.out, tile.contracted), lambda f, v, d, group, *_: (of_group(group[v]), f, d)
        )
    else:
        weights_spec = pl.BlockSpec(
            (None, tile.contracted, tile.out), lambda f, v, d, group, *_: (of_group(group[v]), d, f)
        )
    if in_lanes:
        out_shape = (num_rows, out_width // mosaic.LANES, mosaic.LANES)
        out_spec = pl.BlockSpec(
            (tile.rows, tile.out // mosaic.LANES, mosaic.LANES), lambda f, v, d, group, tile, *_: (tile[v], f, 0)
        )
    else:
        out_shape = (num_rows, out_width)
        out_spec = pl.BlockSpec((tile.rows, tile.out), lambda f, v, d, group, tile, *_: (tile[v], f))
    outs = tiles_of(out_width, tile.out)
    return pl.pallas_call(
        functools.partial(
            _product_kernel, transpose=transpose_weights, width=width, contracted=tile.contracted, groups=groups
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(outs, visits.group.shape[0], steps),
            in_specs=[
                pl.BlockSpec((tile.rows, tile.contracted), lambda f, v, d, group, tile, *_: (tile[v], d)),
                weights_spec,
            ],
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM((tile.rows, tile.out), jnp.float32)] if steps > 1 else [],
        ),
        compiler_params=mosaic.compiler_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * visits.group.shape[0] * tile.rows * width * out_width,
            transcendentals=0,
            bytes_accessed=itemsize * (outs * num_rows * width + weights.size + num_rows * out_width),
        ),
        interpret=mosaic.interpret_of(target),
        name="grouped_matmul_tpu",
    )(*visits, rows, weights)


def _weight_gradient_kernel(group, tile, offsets, count, rows, gradient, out, total):
    visit = pl.program_id(2)
    last_visit = pl.num_programs(2) - 1
    active = visit < count[0]
    this_group, this_tile = group[visit], tile[visit]
    start, stop = offsets[this_group], offsets[this_group + 1]
    first = (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != this_group)
    last = (visit == count[0] - 1) | (group[jnp.minimum(visit + 1, last_visit)] != this_group)
    begin = this_tile * rows.shape[0]
    whole = (start <= begin) & (stop >= begin + rows.shape[0])

    @pl.when(active & first)
    def _():
        total[...] = jnp.zeros_like(total)

    def outer(left, right):
        total[...] += jax.lax.dot_general(
            left,
            right,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=mosaic.precision_of(left.dtype),
        )

    def own(block):
        mine = _inside(this_tile, rows.shape[0], start, stop, block.shape)
        return jnp.where(mine, block[...].astype(jnp.float32), 0).astype(block.dtype)

    @pl.when(active & whole)
    def _():
        outer(rows[...], gradient[...])

    @pl.when(active & ~whole & (stop > start))
    def _():
        outer(own(rows), own(gradient))

    @pl.when(active & last)
    def _():
        out[...] = total[...].astype(out.dtype)


def weight_gradient(
    rows: jax.Array, out_gradient: jax.Array, group_sizes: jax.Array, target: Target
) -> jax.Array:
    """(N, D), (N, F) to (E, D, F) in the dtype of rows: each group's outer products, summed in float32."""
    num_rows, width = rows.shape
    groups, out_width = group_sizes.shape[0], out_gradient.shape[1]
    itemsize = rows.dtype.itemsize
    tile = weight_gradient_tile(num_rows, groups, width, out_width, itemsize)
    visits = visits_of(group_sizes, num_rows, tile.rows, of_groups=True)
    widths, outs = tiles_of(width, tile.contracted), tiles_of(out_width, tile.out)
    return pl.pallas_call(
        _weight_gradient_kernel,
        out_shape=jax.ShapeDtypeStruct((groups, width, out_width), rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(widths, outs, visits.group.shape[0]),
            in_specs=[
                pl.BlockSpec((tile.rows, tile.contracted), lambda d, f, v, group, tile, *_: (tile[v], d)),
                pl.BlockSpec((tile.rows, tile.out), lambda d, f, v, group, tile, *_: (tile[v], f)),
            ],
            out_specs=pl.BlockSpec((None, tile.contracted, tile.out), lambda d, f, v, group, *_: (group[v], d, f)),
            scratch_shapes=[pltpu.VMEM((tile.contracted, tile.out), jnp.float32)],
        ),
        compiler_params=mosaic.compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * visits.group.shape[0] * tile.rows * width * out_width,
            transcendentals=0,
            bytes_accessed=itemsize
            * (outs * num_rows * width + widths * num_rows * out_width + groups * width * out_width),
        ),
        interpret=mosaic.interpret_of(target),
        name="weight_gradient_tpu",
    )(*visits, rows, out_gradient)
