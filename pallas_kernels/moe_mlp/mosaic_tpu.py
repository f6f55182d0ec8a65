"""The fused kernels of the routed MLP on TPU.

`up`: gather, gate and up product, SwiGLU. For each tile of rows the tokens are copied from HBM into VMEM, one copy a
row, while the tile before is multiplied; the (N, D) rows never exist in HBM. Gate and up columns of the fused weights
are two blocks of one array.

`hidden_gradient`: the down product's transpose and the gradient of SwiGLU. The (N, F) gradient of the activation never
exists in HBM, and the gradient of the hidden layer takes the place of the hidden layer.

N rows, D width, F hidden width, E groups, V visits, M rows of a tile, BF hidden columns of a step.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic
from pallas_kernels.dispatch.mosaic_tpu import gather_tokens
from pallas_kernels.execution import Target
from pallas_kernels.grouped_matmul.mosaic_tpu import product, row_tile
from pallas_kernels.moe_mlp import elementwise
from pallas_kernels.tiles import Misfit, Tiling
from pallas_kernels.varying import struct
from pallas_kernels.visits import tiles_of, visits_of


class Tile(NamedTuple):
    """Rows of a tile, and hidden columns of a step."""

    rows: int
    columns: int


def _up_bytes(tile: Tile, width: int, hidden: int, save_hidden: int, itemsize: int) -> int:
    rows, columns = tile
    split = 6 if itemsize == 4 else 0  # float32 operands are multiplied as three bfloat16 parts
    resident = (3 * width + (6 if save_hidden else 2) * hidden) * rows * itemsize
    return resident + 4 * width * columns * itemsize + 16 * rows * columns + split * width * (rows + columns)


def _hidden_gradient_bytes(tile: Tile, width: int, hidden: int, itemsize: int) -> int:
    rows, columns = tile
    split = 6 if itemsize == 4 else 0
    resident = (2 * width + 10 * hidden) * rows * itemsize
    return resident + 2 * width * columns * itemsize + 32 * rows * columns + split * width * (rows + columns)


def _first_that_fits(
    rows_per_group: int, hidden: int, budget: int, bytes_of: Callable[[Tile], int]
) -> Tile | None:
    whole = Tile(row_tile(rows_per_group, weights_stay=True), hidden)
    if hidden <= 1024 and hidden % mosaic.LANES == 0 and bytes_of(whole) <= budget:
        return whole
    rows = row_tile(rows_per_group, weights_stay=False)
    while rows >= mosaic.LANES:
        for columns in (1024, 512, 256, 128):
            if hidden % columns == 0 and bytes_of(Tile(rows, columns)) <= budget:
                return Tile(rows, columns)
        rows //= 2
    return None


def up_tile(
    rows_per_group: int, width: int, hidden: int, save_hidden: int, itemsize: int, chip: str | None
) -> Tile | None:
    """All columns up to 1024, or the most of 1024, ..., 128 that divides F and leaves room in VMEM, of fewer rows if
    need be.

    None where F is no multiple of 128 or no such tile fits: then it runs as gather, product and activation.
    """
    def bytes_of(tile: Tile) -> int:
        return _up_bytes(tile, width, hidden, save_hidden, itemsize)

    return _first_that_fits(rows_per_group, hidden, mosaic.vmem_budget(chip), bytes_of)


def hidden_gradient_tile(rows_per_group: int, width: int, hidden: int, itemsize: int, chip: str | None) -> Tile | None:
    """As `up_tile`; without a tile it runs as product and elementwise part."""

    def bytes_of(tile: Tile) -> int:
        return _hidden_gradient_bytes(tile, width, hidden, itemsize)

    return _first_that_fits(rows_per_group, hidden, mosaic.vmem_budget(chip), bytes_of)


def _cut(tile: Tile, hidden: int) -> Tile:
    tile = Tile(tile.rows, min(tile.columns, hidden))
    mosaic.require_multiple("rows", tile.rows, mosaic.LANES)
    mosaic.require_multiple("columns", tile.columns, mosaic.LANES)
    if hidden % tile.columns:
        raise Misfit(f"columns={tile.columns} do not divide F={hidden}.")
    return tile


def _fitted_up(
    tile: Tile, rows_per_group: int, width: int, hidden: int, save_hidden: int, itemsize: int, chip: str | None
) -> Tile:
    del rows_per_group
    tile = _cut(tile, hidden)
    mosaic.require_room(_up_bytes(tile, width, hidden, save_hidden, itemsize), chip)
    return tile


def _fitted_hidden_gradient(
    tile: Tile, rows_per_group: int, width: int, hidden: int, itemsize: int, chip: str | None
) -> Tile:
    del rows_per_group
    tile = _cut(tile, hidden)
    mosaic.require_room(_hidden_gradient_bytes(tile, width, hidden, itemsize), chip)
    return tile


UP = Tiling("moe_up", Tile, up_tile, _fitted_up)
HIDDEN_GRADIENT = Tiling("hidden_gradient", Tile, hidden_gradient_tile, _fitted_hidden_gradient)


def _up_kernel(group, tile, offsets, index, next_index, x, w_gate, w_up, *refs, width, groups, save_hidden):
    activation, *hidden = refs[: 2 if save_hidden else 1]
    buffer, semaphore, rows = refs[-3:]
    visit, step = pl.program_id(0), pl.program_id(1)
    last_visit = pl.num_programs(0) - 1
    this_group, this_tile = group[visit], tile[visit]
    new_tile = ((visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != this_tile)) & (step == 0)
    next_tile = tile[jnp.minimum(visit + 1, last_visit)]
    fetcher = mosaic.RowFetcher(x, buffer, semaphore)
    slot = jax.lax.rem(this_tile, 2)

    @pl.when((visit == 0) & (step == 0))
    def _():
        fetcher.start(index, slot)

    @pl.when(new_tile)
    def _():
        fetcher.wait(slot)
        rows[...] = mosaic.from_lanes(buffer[slot], width)
        activation[...] = jnp.zeros_like(activation)
        if save_hidden:
            hidden[0][...] = jnp.zeros_like(hidden[0])

    @pl.when((step == 0) & (next_tile != this_tile))
    def _():
        fetcher.start(next_index, 1 - slot)

    @pl.when(this_group < groups)
    def _():
        columns = w_gate.shape[1]
        shape = (rows.shape[0], columns)
        row = this_tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        mine = (row >= offsets[this_group]) & (row < offsets[this_group + 1])

        def times(weights):
            return jax.lax.dot_general(
                rows[...],
                weights[...],
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
                precision=mosaic.precision_of(rows.dtype),
            )

        def store(ref, first, value):
            part = pl.ds(pl.multiple_of(first, mosaic.LANES), columns)
            ref[:, part] = jnp.where(mine, value, ref[:, part].astype(jnp.float32)).astype(ref.dtype)

        # As the unfused form does, the nonlinearity sees the products in the dtype of x.
        gated, up = (times(weights).astype(rows.dtype).astype(jnp.float32) for weights in (w_gate, w_up))
        store(activation, step * columns, gated * jax.nn.sigmoid(gated) * up)
        if save_hidden:
            store(hidden[0], step * columns, gated)
            store(hidden[0], hidden[0].shape[1] // 2 + step * columns, up)


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

    Where F is no multiple of 128, or a tile does not fit VMEM, it runs as gather, product and activation.

    Args:
      x: (T, D), or (T, L, 128) as `mosaic.as_lanes` lays it out.
      token: (N,) int32 in [0, T), the token of each row.
      w_gate_up: (E, D, 2F).
      group_sizes: (E,) int32.
      target: of backend `tpu`.
      save_hidden: return the products too.

    Returns:
      (N, F) activation and, if asked for, the (N, 2F) products before it; rows past the groups are zero.
    """
    num_rows = token.shape[0]
    groups, width, fused = w_gate_up.shape
    hidden_width, itemsize = fused // 2, x.dtype.itemsize
    tile = UP.choose(
        x.dtype,
        target.chip,
        rows_per_group=num_rows // groups,
        width=width,
        hidden=hidden_width,
        save_hidden=int(save_hidden),
    )
    if tile is None:
        rows = gather_tokens(x, token, jnp.sum(group_sizes, dtype=jnp.int32), target)
        hidden = product(rows, w_gate_up, group_sizes, False, target)
        gated, above = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
        return (jax.nn.silu(gated) * above).astype(x.dtype), hidden if save_hidden else None

    size, columns = tile
    visits = visits_of(group_sizes, num_rows, size, of_groups=False)
    steps, most_visits = hidden_width // columns, visits.group.shape[0]
    tiles = tiles_of(num_rows, size)
    token = mosaic.pad_to(token, tiles * size)
    lanes = mosaic.as_lanes(x)

    def half(first):
        return pl.BlockSpec(
            (None, width, columns), lambda v, f, group, *_: (jnp.minimum(group[v], groups - 1), 0, first + f)
        )

    def whole(out_width):
        return pl.BlockSpec((size, out_width), lambda v, f, group, tile, *_: (tile[v], 0))

    out_widths = [hidden_width, fused] if save_hidden else [hidden_width]
    outs = pl.pallas_call(
        functools.partial(_up_kernel, width=width, groups=groups, save_hidden=save_hidden),
        out_shape=[struct((num_rows, each), x.dtype, x, token, w_gate_up, group_sizes) for each in out_widths],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(visits.count, steps),
            in_specs=[
                mosaic.index_block(size, lambda v, f, group, tile, *_: (tile[v],)),
                mosaic.index_block(size, lambda v, f, group, tile, *_: (tile[jnp.minimum(v + 1, most_visits - 1)],)),
                pl.BlockSpec(memory_space=pl.ANY),
                half(0),
                half(steps),
            ],
            out_specs=[whole(out_width) for out_width in out_widths],
            scratch_shapes=[
                pltpu.VMEM((2, size, *lanes.shape[1:]), x.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((size, width), x.dtype),
            ],
        ),
        compiler_params=mosaic.compiler_params(target.chip, "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * most_visits * size * width * fused,
            transcendentals=num_rows * hidden_width,
            bytes_accessed=itemsize
            * (num_rows * (width + sum(out_widths)) + (w_gate_up.size if steps == 1 else most_visits * width * fused)),
        ),
        interpret=mosaic.interpret_of(target),
        name="moe_up_tpu",
    )(*visits.prefetched, token, token, lanes, w_gate_up, w_gate_up)
    return outs[0], outs[1] if save_hidden else None


def _hidden_gradient_kernel(
    group, tile, offsets, y_rows, row_gate, hidden, w_down, gradient, weighted, gate_gradient, *, groups
):
    visit, step = pl.program_id(0), pl.program_id(1)
    this_group, this_tile = group[visit], tile[visit]
    new_tile = ((visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != this_tile)) & (step == 0)

    @pl.when(new_tile)
    def _():
        for ref in (gradient, weighted, gate_gradient):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(this_group < groups)
    def _():
        size, columns = hidden.shape[0], w_down.shape[0]
        gate_first, up_first = (
            pl.multiple_of(first + step * columns, mosaic.LANES) for first in (0, hidden.shape[1] // 2)
        )
        row = this_tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, columns), 0)
        mine = (row >= offsets[this_group]) & (row < offsets[this_group + 1])
        from_output = jax.lax.dot_general(
            y_rows[...],
            w_down[...],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=mosaic.precision_of(y_rows.dtype),
        )
        # Per-row numbers lie along lanes in HBM, where a column of them would take 128 times the room.
        gate_column = jnp.broadcast_to(row_gate[...], (mosaic.LANES, size)).T[:, :1]
        gated_gradient, up_gradient, gated_activation, terms = elementwise.swiglu_gradient(
            hidden[:, pl.ds(gate_first, columns)].astype(jnp.float32),
            hidden[:, pl.ds(up_first, columns)].astype(jnp.float32),
            from_output,
            gate_column,
        )

        def store(ref, first, value):
            part = pl.ds(first, columns)
            ref[:, part] = jnp.where(mine, value, ref[:, part].astype(jnp.float32)).astype(ref.dtype)

        store(gradient, gate_first, gated_gradient)
        store(gradient, up_first, up_gradient)
        store(weighted, gate_first, gated_activation)
        terms = jnp.where(mine, terms, 0)
        lanes = sum(terms[:, i : i + mosaic.LANES] for i in range(0, columns, mosaic.LANES))
        gate_gradient[...] += jnp.sum(lanes.T, axis=0, keepdims=True)


def hidden_gradient(
    y_rows: jax.Array,
    hidden: jax.Array,
    row_gate: jax.Array,
    w_down: jax.Array,
    group_sizes: jax.Array,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the gradient of y is on the hidden width, before the nonlinearity.

    Where F is no multiple of 128, or a tile does not fit VMEM, it runs as product and elementwise part.

    Args:
      y_rows: (N, D), each row's output gradient.
      hidden: (N, 2F), as `up` saved it; the result takes its place if nothing else needs it.
      row_gate: (N,) float32.
      w_down: (E, F, D).
      group_sizes: (E,) int32.
      target: of backend `tpu`.

    Returns:
      (N, F) activation times gate, which the gradient of w_down needs; (N, 2F) gradient of hidden; (N,) float32
      gradient of the gates. Rows past the groups are zero.
    """
    num_rows, width = y_rows.shape
    groups, hidden_width, _ = w_down.shape
    itemsize = hidden.dtype.itemsize
    tile = HIDDEN_GRADIENT.choose(
        hidden.dtype, target.chip, rows_per_group=num_rows // groups, width=width, hidden=hidden_width
    )
    if tile is None:
        from_output = product(y_rows, w_down, group_sizes, True, target)
        return elementwise.hidden_gradient(hidden, from_output, row_gate)
    size, columns = tile
    visits = visits_of(group_sizes, num_rows, size, of_groups=False)
    steps, most_visits, tiles = hidden_width // columns, visits.group.shape[0], tiles_of(num_rows, size)

    def whole(block_width):
        return pl.BlockSpec((size, block_width), lambda v, f, group, tile, *_: (tile[v], 0))

    per_row = pl.BlockSpec((1, size), lambda v, f, group, tile, *_: (0, tile[v]))
    inputs = y_rows, hidden, row_gate, w_down, group_sizes
    gradient, weighted, gate_gradient = pl.pallas_call(
        functools.partial(_hidden_gradient_kernel, groups=groups),
        out_shape=[
            struct(hidden.shape, hidden.dtype, *inputs),
            struct((num_rows, hidden_width), hidden.dtype, *inputs),
            struct((1, tiles * size), jnp.float32, *inputs),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(visits.count, steps),
            in_specs=[
                whole(width),
                per_row,
                whole(2 * hidden_width),
                pl.BlockSpec(
                    (None, columns, width), lambda v, f, group, *_: (jnp.minimum(group[v], groups - 1), f, 0)
                ),
            ],
            out_specs=[whole(2 * hidden_width), whole(hidden_width), per_row],
        ),
        # Operand 5, after three arrays of visits, the output's gradient and the gate. Pallas' interpreters cannot alias
        # an array that they pad to whole blocks.
        input_output_aliases={} if target.interpret and num_rows % size else {5: 0},
        compiler_params=mosaic.compiler_params(target.chip, "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * most_visits * size * width * hidden_width,
            transcendentals=num_rows * hidden_width,
            bytes_accessed=itemsize
            * (
                num_rows * (width + 5 * hidden_width)
                + (w_down.size if steps == 1 else most_visits * width * hidden_width)
            )
            + 8 * num_rows,
        ),
        interpret=mosaic.interpret_of(target),
        name="hidden_gradient_tpu",
    )(*visits.prefetched, y_rows, mosaic.pad_to(row_gate, tiles * size).reshape(1, -1), hidden, w_down)
    return weighted, gradient, gate_gradient[0, :num_rows]
