"""What the TPU kernels share: compiler parameters, and rows fetched one by one from HBM.

Mosaic copies single rows only of arrays whose last two axes are whole tiles, so a (T, D) array is seen as
(T, D/128, 128) (`as_lanes`); a row is then L = D/128 sublanes of 128 lanes.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.execution import Target
from pallas_kernels.tiles import Misfit

LANES = 128

VMEM_LIMIT = 64 * 2**20
"""Bytes of VMEM that a kernel may use: all of v5p's and tpu7x's, half of v5e's and v6e's; the default is 16 MiB."""

VMEM_BUDGET = 40 * 2**20
"""Bytes that tiles are chosen to fill, the rest being the compiler's."""

_SMALL_VMEM = {"v4": (16 * 2**20, 12 * 2**20)}
"""Limit and budget of chips that have less: all of a v4 core's (`TpuInfo` of Pallas; the compiler says so too)."""

CORES = {"v4": 2, "v5p": 2}
"""Cores that share a kernel's `parallel` axes, where there is more than one to a device."""


def vmem_limit(chip: str | None) -> int:
    """Bytes of VMEM that a kernel may use on a chip."""
    return _SMALL_VMEM.get(chip, (VMEM_LIMIT, VMEM_BUDGET))[0]


def vmem_budget(chip: str | None) -> int:
    """Bytes that tiles are chosen to fill on a chip."""
    return _SMALL_VMEM.get(chip, (VMEM_LIMIT, VMEM_BUDGET))[1]


def require_room(needed: int, chip: str | None) -> None:
    """Raises `Misfit` if a tile needs more bytes of VMEM than a kernel may use on a chip."""
    limit = vmem_limit(chip)
    if needed > limit:
        raise Misfit(f"it takes about {needed / 2**20:.0f} MiB of VMEM; at most {limit / 2**20:.0f} are used.")


def require_room_for_rows(rows: int, width: int, itemsize: int, needed: int, chip: str | None) -> None:
    """Raises `Misfit`, in a user's terms, if the fewest rows that a kernel takes need more than there is."""
    try:
        require_room(needed, chip)
    except Misfit as error:
        raise Misfit(
            f"{rows} rows of {width} numbers of {itemsize} bytes are more than a core of {chip} holds: {error} Choose "
            "bfloat16, or backend='ragged_dot'."
        ) from error


def require_multiple(name: str, number: int, of: int) -> None:
    """Raises `Misfit` if a number of a tile is no multiple of what the layout needs."""
    if number % of:
        raise Misfit(f"{name}={number} is no multiple of {of}.")


def compiler_params(chip: str | None, *semantics: str) -> pltpu.CompilerParams:
    """The VMEM of a chip, and the semantics of the grid's axes: `parallel` or `arbitrary`."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_limit(chip))


def interpret_of(target: Target) -> bool | pltpu.InterpretParams:
    """The `interpret` argument of `pallas_call`."""
    return pltpu.InterpretParams(detect_races=True) if target.detect_races else target.interpret


def precision_of(dtype) -> jax.lax.Precision | None:
    """float32 products stay float32; the MXU's default would round their inputs to bfloat16."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def as_lanes(array: jax.Array) -> jax.Array:
    """(T, D) as (T, ceil(D/128), 128), zeros where D ends; what is laid out so already comes back as it is."""
    if array.ndim == 3:
        return array
    rows, width = array.shape
    padded = -(-width // LANES) * LANES
    if padded != width:
        array = jnp.pad(array, ((0, 0), (0, padded - width)))
    return array.reshape(rows, padded // LANES, LANES)


def from_lanes(rows: jax.Array, width: int) -> jax.Array:
    """(M, L, 128) in registers as (M, D)."""
    return rows.reshape(rows.shape[0], -1)[:, :width]


class RowFetcher:
    """Copies rows of an HBM array, named by indices in scalar memory, into a buffer of VMEM.

    All copies of a fetch are in flight together and signal one semaphore.
    """

    def __init__(self, source, buffer, semaphore):
        self._source, self._buffer, self._semaphore = source, buffer, semaphore

    def start(self, index, slot) -> None:
        """Begins to copy row index[i] to buffer[slot, i] for every i."""

        def copy(i, _):
            pltpu.make_async_copy(
                self._source.at[index[i]], self._buffer.at[slot, i], self._semaphore.at[slot]
            ).start()

        jax.lax.fori_loop(0, self._buffer.shape[1], copy, None)

    def wait(self, slot) -> None:
        """Returns when all rows of the slot have come."""

        def done(i, _):
            pltpu.make_async_copy(
                self._source.at[0], self._buffer.at[slot, i], self._semaphore.at[slot]
            ).wait()

        jax.lax.fori_loop(0, self._buffer.shape[1], done, None)

    def blocks_in_turn(self, index, next_index) -> jax.Array:
        """The slot with this block's rows, while those of the next are on their way; along the first axis of a grid.

        Args:
          index, next_index: the rows of this block and of the next, as `index_blocks` streams them.
        """
        block = pl.program_id(0)
        slot = jax.lax.rem(block, 2)

        @pl.when(block == 0)
        def _():
            self.start(index, slot)

        @pl.when(block + 1 < pl.num_programs(0))
        def _():
            self.start(next_index, 1 - slot)

        self.wait(slot)
        return slot


def pad_to(array: jax.Array, length: int) -> jax.Array:
    """A 1-D array with zeros up to a length."""
    return jnp.pad(array, (0, length - array.shape[0]))


def index_block(block: int, index_map) -> pl.BlockSpec:
    """Indices streamed through scalar memory, which is too small to hold all of them."""
    return pl.BlockSpec((block,), index_map, memory_space=pltpu.SMEM)


def index_blocks(block: int, blocks: int) -> list[pl.BlockSpec]:
    """Of the same indices twice: this block's, and the next one's where there is one; one scalar is prefetched."""
    return [
        index_block(block, lambda i, _: (i,)),
        index_block(block, lambda i, _: (jnp.minimum(i + 1, blocks - 1),)),
    ]
