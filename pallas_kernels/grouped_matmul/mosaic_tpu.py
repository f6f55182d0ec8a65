"""`grouped_matmul` on TPU: a tile of rows meets the matrix of each group that has rows in it.

The grid walks the visits of `pallas_kernels.visits`, as many as the sizes of the groups make; consecutive visits of one
tile share its output block, which stays in VMEM until the last of them, and consecutive visits of one group share its
weights.

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
from pallas_kernels.tiles import Tiling
from pallas_kernels.varying import struct
from pallas_kernels.visits import tiles_of, visits_of


class Tile(NamedTuple):
    """Rows, contracted width and output width of one product in VMEM."""

    rows: int
    contracted: int
    out: int


def row_tile(rows_per_group: int, *, weights_stay: bool) -> int:
    """M: 512, 256 or 128 rows, the most of which the mean group has four times as many, so that its first and last tile
    waste little; or only twice, where a visit reads its weights (or its sums) again and longer tiles save that.
    """
    tiles_per_group = 4 if weights_stay else 2
    return next((size for size in (512, 256) if rows_per_group >= tiles_per_group * size), 128)


def _halved(width: int, limit: int) -> int:
    """All of a width, or the largest power of two up to the limit."""
    return width if width <= limit else 1 << (limit.bit_length() - 1)


def _next_smaller(width: int) -> int:
    return 1 << ((width - 1).bit_length() - 1)


def _half_for_each_core(width: int, chip: str | None, least: int) -> int:
    """The width of one core's share where cores divide the outputs, a multiple of `least`; else all of it."""
    share = -(-width // (mosaic.CORES.get(chip, 1) * least)) * least
    return share if share < width else width


def product_tile(
    rows_per_group: int, contracted: int, out: int, in_lanes: int, itemsize: int, chip: str | None
) -> Tile:
    """The whole contracted width where it fits, and as much of the output as VMEM has room for.

    Part of a width is a multiple of 128; of an output laid out for fetching rows (`in_lanes`), of 1024.
    """
    least = 1024 if in_lanes else mosaic.LANES
    outer = _halved(_half_for_each_core(out, chip, least), 2048)
    inner = _halved(contracted, 4096)
    tile = Tile(row_tile(rows_per_group, weights_stay=inner == contracted), inner, outer)
    while _product_bytes(tile, itemsize) > mosaic.vmem_budget(chip):
        rows, inner, outer = tile
        if outer > least and (outer > 512 or outer >= inner):
            tile = Tile(rows, inner, max(least, _next_smaller(outer)))
        elif inner > mosaic.LANES:
            tile = Tile(rows, _next_smaller(inner), outer)
        elif outer > least:
            tile = Tile(rows, inner, max(least, _next_smaller(outer)))
        elif rows > 8:
            tile = Tile(rows // 2, inner, outer)
        else:
            break
    return tile


def _product_bytes(tile: Tile, itemsize: int) -> int:
    rows, inner, outer = tile
    split = 6 if itemsize == 4 else 0  # float32 operands are multiplied as three bfloat16 parts
    return (2 * itemsize + split) * (rows * inner + inner * outer) + (2 * itemsize + 8) * rows * outer


def _cut(tile: Tile, contracted: int, out: int, least_out: int) -> Tile:
    tile = Tile(tile.rows, min(tile.contracted, contracted), min(tile.out, out))
    mosaic.require_multiple("rows", tile.rows, 16)
    if tile.contracted < contracted:
        mosaic.require_multiple("contracted", tile.contracted, mosaic.LANES)
    if tile.out < out:
        mosaic.require_multiple("out", tile.out, least_out)
    return tile


def _fitted_product(
    tile: Tile, rows_per_group: int, contracted: int, out: int, in_lanes: int, itemsize: int, chip: str | None
) -> Tile:
    del rows_per_group
    tile = _cut(tile, contracted, out, 1024 if in_lanes else mosaic.LANES)
    mosaic.require_room(_product_bytes(tile, itemsize), chip)
    return tile


def weight_gradient_tile(rows_per_group: int, contracted: int, out: int, itemsize: int, chip: str | None) -> Tile:
    """Up to 1024 x 1024 of a gradient at a time: it is summed in float32 in VMEM. Less where VMEM is small."""
    outer = _halved(out, 1024)
    if contracted <= 1024 and outer == out:
        outer = _half_for_each_core(out, chip, mosaic.LANES)
    tile = Tile(row_tile(rows_per_group, weights_stay=False), _halved(contracted, 1024), outer)
    while _weight_gradient_bytes(tile, itemsize) > mosaic.vmem_budget(chip) and max(tile[1:]) > mosaic.LANES:
        rows, inner, outer = tile
        tile = Tile(rows, inner, _next_smaller(outer)) if outer >= inner else Tile(rows, _next_smaller(inner), outer)
    return tile


def _weight_gradient_bytes(tile: Tile, itemsize: int) -> int:
    rows, inner, outer = tile
    split = 6 if itemsize == 4 else 0
    return (2 * itemsize + split) * rows * (inner + outer) + (2 * itemsize + 8) * inner * outer


def _fitted_weight_gradient(
    tile: Tile, rows_per_group: int, contracted: int, out: int, itemsize: int, chip: str | None
) -> Tile:
    del rows_per_group
    tile = _cut(tile, contracted, out, mosaic.LANES)
    mosaic.require_room(_weight_gradient_bytes(tile, itemsize), chip)
    return tile


PRODUCT = Tiling("grouped_matmul", Tile, product_tile, _fitted_product)
WEIGHT_GRADIENT = Tiling("weight_gradient", Tile, weight_gradient_tile, _fitted_weight_gradient)


def _inside(tile, rows, start, stop, shape):
    row = tile * rows + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= start) & (row < stop)


def _product_kernel(group, tile, offsets, rows, weights, out, *scratch, transpose, width, contracted, groups):
    visit, step = pl.program_id(1), pl.program_id(2)
    last_step = pl.num_programs(2) - 1
    this_group, this_tile = group[visit], tile[visit]
    routed = this_group < groups
    new_tile = (visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != this_tile)

    @pl.when(new_tile & (step == 0))
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
    tile = PRODUCT.choose(
        rows.dtype,
        target.chip,
        rows_per_group=num_rows // groups,
        contracted=width,
        out=out_width,
        in_lanes=int(in_lanes),
    )
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
    outs, most_visits = tiles_of(out_width, tile.out), visits.group.shape[0]
    if steps == 1:  # consecutive visits share what they have in common
        read = outs * num_rows * width + weights.size
    else:
        read = most_visits * width * (outs * tile.rows + out_width)
    return pl.pallas_call(
        functools.partial(
            _product_kernel, transpose=transpose_weights, width=width, contracted=tile.contracted, groups=groups
        ),
        out_shape=struct(out_shape, rows.dtype, rows, weights, group_sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(outs, visits.count, steps),
            in_specs=[
                pl.BlockSpec((tile.rows, tile.contracted), lambda f, v, d, group, tile, *_: (tile[v], d)),
                weights_spec,
            ],
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM((tile.rows, tile.out), jnp.float32)] if steps > 1 else [],
        ),
        compiler_params=mosaic.compiler_params(target.chip, "parallel", "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * most_visits * tile.rows * width * out_width,
            transcendentals=0,
            bytes_accessed=itemsize * (read + num_rows * out_width),
        ),
        interpret=mosaic.interpret_of(target),
        name="grouped_matmul_tpu",
    )(*visits.prefetched, rows, weights)


def _weight_gradient_kernel(group, tile, offsets, count, rows, gradient, *refs):
    *previous, out, total = refs
    visit = pl.program_id(2)
    active = visit < count[0]
    this_group, this_tile = group[visit], tile[visit]
    start, stop = offsets[this_group], offsets[this_group + 1]
    first = (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != this_group)
    last = (visit >= count[0] - 1) | (group[jnp.minimum(visit + 1, pl.num_programs(2) - 1)] != this_group)
    begin = this_tile * rows.shape[0]
    whole = (start <= begin) & (stop >= begin + rows.shape[0])

    @pl.when(first)
    def _():
        total[...] = previous[0][...].astype(jnp.float32) if previous else jnp.zeros_like(total)

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

    @pl.when(last)
    def _():
        out[...] = total[...].astype(out.dtype)


def weight_gradient(
    rows: jax.Array,
    out_gradient: jax.Array,
    group_sizes: jax.Array,
    target: Target,
    *,
    previous: jax.Array | None = None,
) -> jax.Array:
    """(N, D), (N, F) to (E, D, F) in the dtype of rows: each group's outer products, summed in float32.

    Args:
      previous: (E, D, F) of other rows, to be added to in place. Only what belongs to groups with rows is touched.
    """
    num_rows, width = rows.shape
    groups, out_width = group_sizes.shape[0], out_gradient.shape[1]
    itemsize = rows.dtype.itemsize
    tile = WEIGHT_GRADIENT.choose(
        rows.dtype, target.chip, rows_per_group=num_rows // groups, contracted=width, out=out_width
    )
    visits = visits_of(group_sizes, num_rows, tile.rows, of_groups=True, empty_groups=previous is None)
    widths, outs = tiles_of(width, tile.contracted), tiles_of(out_width, tile.out)
    most_visits = visits.group.shape[0]
    of_group = pl.BlockSpec((None, tile.contracted, tile.out), lambda d, f, v, group, *_: (group[v], d, f))
    operands = [rows, out_gradient] if previous is None else [rows, out_gradient, previous]
    return pl.pallas_call(
        _weight_gradient_kernel,
        out_shape=struct((groups, width, out_width), rows.dtype, *operands, group_sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(widths, outs, jnp.maximum(visits.count, 1)),
            in_specs=[
                pl.BlockSpec((tile.rows, tile.contracted), lambda d, f, v, group, tile, *_: (tile[v], d)),
                pl.BlockSpec((tile.rows, tile.out), lambda d, f, v, group, tile, *_: (tile[v], f)),
                *([] if previous is None else [of_group]),
            ],
            out_specs=of_group,
            scratch_shapes=[pltpu.VMEM((tile.contracted, tile.out), jnp.float32)],
        ),
        input_output_aliases={} if previous is None else {6: 0},  # after four arrays of visits and two operands
        compiler_params=mosaic.compiler_params(target.chip, "parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * most_visits * tile.rows * width * out_width,
            transcendentals=0,
            bytes_accessed=itemsize
            * (outs * num_rows * width + widths * num_rows * out_width + groups * width * out_width),
        ),
        interpret=mosaic.interpret_of(target),
        name="weight_gradient_tpu",
    )(*visits.prefetched, visits.count.reshape(1), *operands)
