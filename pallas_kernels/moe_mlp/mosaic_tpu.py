"""The first half of the routed MLP on TPU in one kernel: gather, gate and up product, SwiGLU.

For each tile of rows the tokens are copied from HBM into VMEM, one copy a row, while the tile before is multiplied; the
(N, D) rows never exist in HBM. Gate and up columns of the fused weights are two blocks of one array.

N rows, D width, F hidden width, E groups, V visits, M rows of a tile, BF hidden columns of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic
from pallas_kernels.dispatch.mosaic_tpu import gather_tokens
from pallas_kernels.execution import Target
from pallas_kernels.grouped_matmul.mosaic_tpu import product, row_tile
from pallas_kernels.visits import tiles_of, visits_of


def columns_per_step(rows: int, width: int, hidden: int, itemsize: int, save_hidden: bool) -> int | None:
    """BF: the most of 1024, ..., 128 that divides F and leaves room in VMEM; None where none does."""
    resident = (3 * width + (6 if save_hidden else 2) * hidden) * rows * itemsize
    for columns in (1024, 512, 256, 128):
        streamed = 4 * width * columns * itemsize + 16 * rows * columns
        if hidden % columns == 0 and resident + streamed <= mosaic.VMEM_BUDGET:
            return columns
    return None


def _kernel(group, tile, offsets, count, index, next_index, x, w_gate, w_up, *refs, width, groups, save_hidden):
    activation, *hidden = refs[: 2 if save_hidden else 1]
    buffer, semaphore, rows = refs[-3:]
    visit, step = pl.program_id(0), pl.program_id(1)
    last_visit = pl.num_programs(0) - 1
    active = visit < count[0]
    this_group, this_tile = group[visit], tile[visit]
    new_tile = active & ((visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != this_tile)) & (step == 0)
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

    @pl.when(active & (step == 0) & (next_tile != this_tile))
    def _():
        fetcher.start(next_index, 1 - slot)

    @pl.when(active & (this_group < groups))
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
      x: (T, D).
      token: (N,) int32 in [0, T), the token of each row.
      w_gate_up: (E, D, 2F).
      group_sizes: (E,) int32.
      target: of backend `tpu`.
      save_hidden: return the products too.

    Returns:
      (N, F) activation and, if asked for, the (N, 2F) products before it; rows past the groups are zero.
    """
    num_rows, width = token.shape[0], x.shape[1]
    groups, _, fused = w_gate_up.shape
    hidden_width, itemsize = fused // 2, x.dtype.itemsize
    size = row_tile(num_rows, groups)
    columns = columns_per_step(size, width, hidden_width, itemsize, save_hidden)
    while columns is None and size > 128 and hidden_width % mosaic.LANES == 0:
        size //= 2
        columns = columns_per_step(size, width, hidden_width, itemsize, save_hidden)
    if columns is None:
        rows = gather_tokens(x, token, jnp.sum(group_sizes, dtype=jnp.int32), target)
        hidden = product(rows, w_gate_up, group_sizes, False, target)
        gated, above = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
        return (jax.nn.silu(gated) * above).astype(x.dtype), hidden if save_hidden else None

    visits = visits_of(group_sizes, num_rows, size, of_groups=False)
    steps, count = hidden_width // columns, visits.group.shape[0]
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
        functools.partial(_kernel, width=width, groups=groups, save_hidden=save_hidden),
        out_shape=[jax.ShapeDtypeStruct((num_rows, out_width), x.dtype) for out_width in out_widths],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(count, steps),
            in_specs=[
                mosaic.index_block(size, lambda v, f, group, tile, *_: (tile[v],)),
                mosaic.index_block(size, lambda v, f, group, tile, *_: (tile[jnp.minimum(v + 1, count - 1)],)),
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
        compiler_params=mosaic.compiler_params("arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * size * width * fused,
            transcendentals=num_rows * hidden_width,
            bytes_accessed=itemsize * (num_rows * (width + sum(out_widths)) + w_gate_up.size),
        ),
        interpret=mosaic.interpret_of(target),
        name="moe_up_tpu",
    )(*visits, token, token, lanes, w_gate_up, w_gate_up)
    return outs[0], outs[1] if save_hidden else None
