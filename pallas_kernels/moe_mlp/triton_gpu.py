"""The first half of the routed MLP on GPU in one kernel: gather, gate and up product, SwiGLU; and its way back.

A program reads its tile's tokens where they are, so the (N, D) rows never exist in memory; it multiplies them with a
block of gate columns and the same block of up columns, and applies SwiGLU to the two products in registers. Backward,
the product with the transposed down weights gathers too, and SwiGLU is differentiated in registers.

T tokens, N rows, D width, F hidden width, E groups, V tiles; M, BD, BF the block's rows, contracted and hidden width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.execution import Target
from pallas_kernels.group_tiles import most_tiles, tiles_of_groups
from pallas_kernels.grouped_matmul.triton_gpu import Tile, row_tile
from pallas_kernels.tiles import Tiling
from pallas_kernels.varying import struct
from pallas_kernels.visits import tiles_of


def up_tile(rows_per_group: int, width: int, hidden: int, save_hidden: int, itemsize: int, chip: str | None) -> Tile:
    """Half the columns of a plain product: each program holds two of them.

    Half of those again on Blackwell where both products are kept: its sums come from the tensor cores' own memory at
    the end, and with all the addresses that they go to they take more registers than there are (ptxas 12.9).
    """
    rows = row_tile(rows_per_group, 1)
    if itemsize == 4:
        return Tile(min(rows, 64), triton.side(width, 16), triton.side(hidden, 32), 4, 2)
    columns = triton.side(hidden, 128 if rows == 128 else 64)
    warps = 8 if rows * columns > 128 * 64 else 4
    if chip == "b200" and save_hidden and rows == 128:
        columns, warps = min(columns, 64), 8
    return Tile(rows, triton.side(width, 64), columns, warps, 3)


def _fitted_up(
    tile: Tile, rows_per_group: int, width: int, hidden: int, save_hidden: int, itemsize: int, chip: str | None
) -> Tile:
    del rows_per_group, save_hidden, chip
    tile = triton.fitted(tile, contracted=width, out=hidden)
    triton.require_room(tile.stages * tile.contracted * (tile.rows + 2 * tile.out) * itemsize)
    return tile


UP = Tiling("moe_up", Tile, up_tile, _fitted_up)


class _Block(NamedTuple):
    """What a program works on: a tile of rows of one expert, and a block of the hidden width.

    Attributes:
      rows: in the plan's order.
      tokens: of the rows.
      gate_columns: of the fused width 2F; of an array of width F too.
      up_columns: the same columns of the second half of 2F.
      column_tile: () int32, the number of the block.
      expert: () int32, in [0, E) also where not routed.
      routed: () bool, whether the rows are an expert's; those of no group are zero, and nothing is read for them.
    """

    rows: triton.Axis
    tokens: triton.Axis
    gate_columns: triton.Axis
    up_columns: triton.Axis
    column_tile: jax.Array
    expert: jax.Array
    routed: jax.Array


def _block(group, start, stop, token, tile: Tile, hidden_width: int, groups: int) -> _Block:
    number, column_tile = triton.split(triton.program(), tiles_of(hidden_width, tile.out))
    rows = triton.span(start[number], tile.rows, stop[number])
    columns = triton.tile_of(column_tile, tile.out, hidden_width)
    return _Block(
        rows=rows,
        tokens=triton.looked_up([token], rows),
        gate_columns=columns,
        up_columns=columns._replace(index=columns.index + hidden_width),
        column_tile=column_tile,
        expert=jnp.minimum(group[number], groups - 1),
        routed=group[number] < groups,
    )


def _up_kernel(group, start, stop, token, x, weights, activation, *hidden, tile, groups):
    width = x.shape[1]
    block = _block(group, start, stop, token, tile, activation.shape[1], groups)

    def step(i, totals):
        inner = triton.tile_of(i, tile.contracted, width)
        left = triton.load(x, block.tokens, inner)
        return tuple(
            total + triton.dot(left, triton.load(weights, inner, columns, block.expert))
            for total, columns in zip(totals, (block.gate_columns, block.up_columns), strict=True)
        )

    steps = triton.steps_if(block.routed, tiles_of(width, tile.contracted))
    zero = jnp.zeros((tile.rows, tile.out), jnp.float32)
    # As the unfused form does, the nonlinearity sees the products in the dtype of x.
    gated, above = (
        total.astype(x.dtype).astype(jnp.float32) for total in jax.lax.fori_loop(0, steps, step, (zero, zero))
    )
    triton.store(activation, block.rows, block.gate_columns, gated * jax.nn.sigmoid(gated) * above)
    if hidden:
        triton.store(hidden[0], block.rows, block.gate_columns, gated)
        triton.store(hidden[0], block.rows, block.up_columns, above)


def up(
    x: jax.Array,
    token: jax.Array,
    w_gate_up: jax.Array,
    group_sizes: jax.Array,
    target: Target,
    *,
    save_hidden: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """SwiGLU of each routed row: silu(x[token] W_gate) * (x[token] W_up).

    Args:
      x: (T, D).
      token: (N,) int32 in [0, T), the token of each row.
      w_gate_up: (E, D, 2F).
      group_sizes: (E,) int32.
      target: of backend `gpu`.
      save_hidden: return the products too.

    Returns:
      (N, F) activation and, if asked for, the (N, 2F) products before it; rows past the groups are zero.
    """
    num_rows, width = token.shape[0], x.shape[1]
    groups, _, fused = w_gate_up.shape
    hidden_width, itemsize = fused // 2, x.dtype.itemsize
    tile = UP.choose(
        x.dtype,
        target.chip,
        rows_per_group=num_rows // groups,
        width=width,
        hidden=hidden_width,
        save_hidden=int(save_hidden),
    )
    tiles, columns = most_tiles(num_rows, groups, tile.rows), tiles_of(hidden_width, tile.out)
    out_widths = [hidden_width, fused] if save_hidden else [hidden_width]
    outs = pl.pallas_call(
        functools.partial(_up_kernel, tile=tile, groups=groups),
        out_shape=[struct((num_rows, each), x.dtype, x, token, w_gate_up, group_sizes) for each in out_widths],
        grid=triton.num_programs(tiles, columns),
        compiler_params=triton.compiler_params(tile.warps, tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * tile.rows * width * fused,
            transcendentals=num_rows * hidden_width,
            bytes_accessed=itemsize * (num_rows * (width + sum(out_widths)) + w_gate_up.size),
        ),
        interpret=target.interpret,
        name="moe_up_gpu",
    )(*tiles_of_groups(group_sizes, num_rows, tile.rows), token, x, w_gate_up)
    return outs[0], outs[1] if save_hidden else None


def hidden_gradient_tile(num_rows: int, num_groups: int, width: int, hidden: int, itemsize: int) -> Tile:
    """32 sums a thread: SwiGLU's derivative holds several blocks of the same size in registers."""
    rows = row_tile(num_rows, num_groups)
    if itemsize == 4:
        return Tile(min(rows, 64), triton.side(width, 16), triton.side(hidden, 32), 4, 2)
    return Tile(rows, triton.side(width, 64), triton.side(hidden, 64 if rows == 128 else 128), 8 if rows > 16 else 4, 3)


def _fitted_hidden_gradient(
    tile: Tile, rows_per_group: int, width: int, hidden: int, itemsize: int, chip: str | None
) -> Tile:
    del rows_per_group, chip
    tile = triton.fitted(tile, contracted=width, out=hidden)
    triton.require_room(tile.stages * tile.contracted * (tile.rows + tile.out) * itemsize)
    return tile


HIDDEN_GRADIENT = Tiling(
    "hidden_gradient",
    Tile,
    lambda rows_per_group, width, hidden, itemsize, chip: hidden_gradient_tile(
        rows_per_group, 1, width, hidden, itemsize
    ),
    _fitted_hidden_gradient,
)


def _hidden_gradient_kernel(
    group, start, stop, token, gate, y_gradient, hidden, weights, weighted, out, gate_part, *, tile, groups
):
    width = y_gradient.shape[1]
    block = _block(group, start, stop, token, tile, weighted.shape[1], groups)
    rows = block.rows

    def step(i, total):
        inner = triton.tile_of(i, tile.contracted, width)
        left = triton.load(y_gradient, block.tokens, inner)
        right = triton.load(weights, block.gate_columns, inner, block.expert)
        return total + triton.dot(left, right, contract=(1, 1))

    steps = triton.steps_if(block.routed, tiles_of(width, tile.contracted))
    from_output = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.out), jnp.float32))
    row_gate = triton.load_vector(gate, rows._replace(valid=rows.valid & block.routed))[:, None]
    gated = triton.load(hidden, rows, block.gate_columns).astype(jnp.float32)
    above = triton.load(hidden, rows, block.up_columns).astype(jnp.float32)
    # `elementwise.swiglu_gradient`, each result where it is stored: all of them at once take more registers.
    sigmoid = jax.nn.sigmoid(gated)
    silu = gated * sigmoid
    triton.store(weighted, rows, block.gate_columns, row_gate * silu * above)
    gated_gradient = row_gate * from_output * above * (sigmoid * (1 + gated * (1 - sigmoid)))
    triton.store(out, rows, block.gate_columns, gated_gradient)
    triton.store(out, rows, block.up_columns, row_gate * from_output * silu)
    triton.store_vector(gate_part, rows, jnp.sum(silu * above * from_output, axis=1), block.column_tile)


def hidden_gradient(
    y_gradient: jax.Array,
    token: jax.Array,
    row_gate: jax.Array,
    hidden: jax.Array,
    w_down: jax.Array,
    group_sizes: jax.Array,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the gradient of y is on the hidden width, before the nonlinearity.

    Args:
      y_gradient: (T, D).
      token: (N,) int32 in [0, T), the token of each row.
      row_gate: (N,) float32, the gate of each row.
      hidden: (N, 2F), the products before the nonlinearity; zero past the groups.
      w_down: (E, F, D).
      group_sizes: (E,) int32.
      target: of backend `gpu`.

    Returns:
      (N, F) activation times gate, which the gradient of w_down needs; (N, 2F) gradient of hidden; (N,) float32
      gradient of the gates. Rows past the groups are zero.
    """
    num_rows, width = token.shape[0], y_gradient.shape[1]
    groups, hidden_width, _ = w_down.shape
    itemsize = y_gradient.dtype.itemsize
    tile = HIDDEN_GRADIENT.choose(
        hidden.dtype, target.chip, rows_per_group=num_rows // groups, width=width, hidden=hidden_width
    )
    tiles, columns = most_tiles(num_rows, groups, tile.rows), tiles_of(hidden_width, tile.out)
    inputs = y_gradient, token, row_gate, hidden, w_down, group_sizes
    weighted, gradient, gate_parts = pl.pallas_call(
        functools.partial(_hidden_gradient_kernel, tile=tile, groups=groups),
        out_shape=[
            struct((num_rows, hidden_width), y_gradient.dtype, *inputs),
            struct((num_rows, 2 * hidden_width), y_gradient.dtype, *inputs),
            struct((num_rows, columns), jnp.float32, *inputs),
        ],
        grid=triton.num_programs(tiles, columns),
        compiler_params=triton.compiler_params(tile.warps, tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * tile.rows * width * hidden_width,
            transcendentals=num_rows * hidden_width,
            bytes_accessed=itemsize * (num_rows * (width + 5 * hidden_width) + w_down.size),
        ),
        interpret=target.interpret,
        name="hidden_gradient_gpu",
    )(*tiles_of_groups(group_sizes, num_rows, tile.rows), token, row_gate, y_gradient, hidden, w_down)
    return weighted, gradient, jnp.sum(gate_parts, axis=1)
