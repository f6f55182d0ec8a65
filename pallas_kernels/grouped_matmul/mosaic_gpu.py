"""`grouped_matmul` on Hopper by Mosaic GPU: the product with weights as they lie, in bfloat16.

One warpgroup multiplies one tile of a group's rows with a block of its expert's columns. The copy engine (TMA) brings
blocks of both to shared memory, a few steps ahead; the tensor cores (`wgmma`) read them there. Tiles are those of
`pallas_kernels.group_tiles`; the rows that a tile really has are written in pieces of 128, 64, ..., 1 rows, because the
copy engine's pieces have static sizes.

N rows, D contracted width, F output width, E groups, V tiles; M, BD, BF the block's rows, contracted and output width.
"""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.execution import Target
from pallas_kernels.group_tiles import most_tiles, tiles_of_groups
from pallas_kernels.varying import struct
from pallas_kernels.visits import tiles_of

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # of absl-py, which jax 0.10.2 needs for it and does not bring
    plgpu = None

HOPPER = ("h100",)
"""Chips with the instructions that this kernel is made of."""

_logger = logging.getLogger(__name__)


class Tile(NamedTuple):
    """Rows, contracted width and output width of a block, and how many steps of the loop are in flight."""

    rows: int
    contracted: int
    out: int
    stages: int


def product_tile(num_rows: int, num_groups: int) -> Tile:
    """128 x 128 sums for a warpgroup, 128 a thread; 64 rows where the mean group has fewer than 256."""
    return Tile(128 if num_rows // num_groups >= 256 else 64, 64, 128, 4)


def serves(rows: jax.Array, weights: jax.Array, transpose_weights: bool, target: Target) -> bool:
    """Whether this kernel is the one for a product; Triton's takes the others.

    bfloat16 on Hopper, D a multiple of 64 and F of 128 (whole blocks), no fewer rows than a block has. Not transposed
    weights, nor the weight gradient: Mosaic GPU's interpreter runs no `wgmma` with a transposed operand (jax 0.10.2),
    so nobody could check the numbers.
    """
    (num_rows, width), (groups, _, out_width) = rows.shape, weights.shape
    tile = product_tile(num_rows, groups)
    return (
        target.chip in HOPPER
        and rows.dtype == jnp.bfloat16
        and not transpose_weights
        and width % tile.contracted == 0
        and out_width % tile.out == 0
        and num_rows >= tile.rows
        and _is_at_hand()
    )


@functools.cache
def _is_at_hand() -> bool:
    """Whether JAX's Mosaic GPU can be imported; said once where it cannot."""
    if plgpu is None:
        _logger.warning("Triton multiplies in place of Mosaic GPU, which needs `pip install absl-py`")
    return plgpu is not None


def _kernel(group, start, stop, rows, weights, out, *, tile, groups):
    steps, columns = rows.shape[1] // tile.contracted, out.shape[1] // tile.out
    program = jax.lax.axis_index("program")
    number, column_tile = jax.lax.div(program, jnp.int32(columns)), jax.lax.rem(program, jnp.int32(columns))
    this_group, first, end = group[number], start[number], stop[number]
    # Rows of 128 bytes, swizzled: what the tensor cores read without bank conflicts.
    layout = (plgpu.TilingTransform((8, tile.contracted)), plgpu.SwizzleTransform(2 * tile.contracted))
    left = plgpu.BlockSpec((tile.rows, tile.contracted), lambda k: (0, k), delay_release=1, transforms=layout)
    right = plgpu.BlockSpec(
        (tile.contracted, tile.out), lambda k: (k, column_tile), delay_release=1, transforms=layout
    )

    def multiplied(total):
        def step(_, left, right):
            plgpu.wgmma(total, left, right)
            plgpu.wgmma_wait(1)  # the product before has been read from its blocks, which the next copies overwrite

        plgpu.emit_pipeline(
            step,
            grid=(jax.lax.select(this_group < groups, jnp.int32(steps), jnp.int32(0)),),  # no group: zero, not read
            in_specs=[left, right],
            max_concurrent_steps=tile.stages,
        )(rows.at[pl.ds(first, tile.rows)], weights.at[jnp.minimum(this_group, groups - 1)])
        return total[...]

    def write(block, product):
        block[...] = product.astype(block.dtype)
        plgpu.commit_smem()
        written, piece = 0, tile.rows
        while piece:

            @pl.when((end - first) & piece != 0)
            def _(written=written, piece=piece):
                plgpu.copy_smem_to_gmem(
                    block.at[pl.ds(written, piece)],
                    out.at[pl.ds(first + written, piece), pl.ds(column_tile * tile.out, tile.out)],
                )

            written, piece = written + ((end - first) & piece), piece // 2
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(end > first)
    def _():
        product = pl.run_scoped(multiplied, plgpu.ACC((tile.rows, tile.out)))
        pl.run_scoped(functools.partial(write, product=product), plgpu.SMEM((tile.rows, tile.out), out.dtype))


def product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, interpret=False) -> jax.Array:
    """(N, D) x (E, D, F) to (N, F), bfloat16, where it `serves`.

    Args:
      interpret: what `plgpu.kernel` takes: parameters of Mosaic GPU's interpreter.
    """
    num_rows, groups, out_width = rows.shape[0], weights.shape[0], weights.shape[2]
    tile = product_tile(num_rows, groups)
    tiles = most_tiles(num_rows, groups, tile.rows)
    return plgpu.kernel(
        functools.partial(_kernel, tile=tile, groups=groups),
        out_type=struct((num_rows, out_width), rows.dtype, rows, weights, group_sizes),
        grid=(tiles * tiles_of(out_width, tile.out),),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="grouped_matmul_mosaic_gpu",
    )(*tiles_of_groups(group_sizes, num_rows, tile.rows), rows, weights)
