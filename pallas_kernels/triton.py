"""What the GPU kernels share: blocks read and written through masks, compiler parameters, the precision of products.

Pallas on Triton runs one program per point of a one-dimensional grid (the other two axes of a GPU's grid end at
65,535). Every block's sides are powers of two; what lies outside the array, or belongs to somebody else, is masked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles import Misfit

SMALLEST_SIDE = 16
"""The shortest side of a block that tensor cores multiply."""


class Axis(NamedTuple):
    """Indices along one axis of an array, and which of them count.

    Attributes:
      index: (B,) int32.
      valid: (B,) bool, or None where all do.
    """

    index: jax.Array
    valid: jax.Array | None


def span(start: jax.Array | int, size: int, stop: jax.Array | int | None = None) -> Axis:
    """`size` consecutive indices from `start`; those before `stop` count."""
    index = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
    return Axis(index, None if stop is None else index < stop)


def tile_of(number: jax.Array, size: int, width: int) -> Axis:
    """The number-th tile of an axis of this width; no mask where tiles fill it."""
    return span(number * size, size, width if width % size else None)


def _mask(rows: Axis, columns: Axis) -> jax.Array | None:
    shape = rows.index.shape[0], columns.index.shape[0]
    parts = []
    if rows.valid is not None:
        parts.append(jax.lax.broadcast_in_dim(rows.valid, shape, (0,)))
    if columns.valid is not None:
        parts.append(jax.lax.broadcast_in_dim(columns.valid, shape, (1,)))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] & parts[1]


def _at(ref, rows: Axis, columns: Axis, leading: tuple):
    return ref.at[(*leading, rows.index[:, None], columns.index[None, :])]


def load(ref, rows: Axis, columns: Axis, *leading) -> jax.Array:
    """The block ref[*leading, rows, columns], zero where a row or a column does not count (it is not read)."""
    mask = _mask(rows, columns)
    return plgpu.load(_at(ref, rows, columns, leading), mask=mask, other=None if mask is None else 0)


def store(ref, rows: Axis, columns: Axis, value: jax.Array, *leading) -> None:
    """Writes a block to ref[*leading, rows, columns], in the array's dtype, where row and column count."""
    plgpu.store(_at(ref, rows, columns, leading), value.astype(ref.dtype), mask=_mask(rows, columns))


def load_vector(ref, axis: Axis, *trailing) -> jax.Array:
    """The vector ref[axis, *trailing], zero where the axis does not count."""
    return plgpu.load(ref.at[(axis.index, *trailing)], mask=axis.valid, other=None if axis.valid is None else 0)


def store_vector(ref, axis: Axis, value: jax.Array, *trailing) -> None:
    """Writes a vector to ref[axis, *trailing] where the axis counts."""
    plgpu.store(ref.at[(axis.index, *trailing)], value.astype(ref.dtype), mask=axis.valid)


def looked_up(index: list, axis: Axis) -> Axis:
    """The axis through an index, index[0][axis], or as it is where there is none."""
    return axis._replace(index=load_vector(index[0], axis)) if index else axis


def dot(left: jax.Array, right: jax.Array, *, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """A product of two blocks, summed in float32.

    float32 blocks are multiplied as IEEE float32, not in TensorFloat-32 (Triton's default, 10 bits of mantissa).
    """
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def split(number: jax.Array, inner: int) -> tuple[jax.Array, jax.Array]:
    """A program's number as (outer, inner) coordinates, the inner one running fastest."""
    size = jnp.int32(inner)
    return jax.lax.div(number, size), jax.lax.rem(number, size)


def steps_if(condition: jax.Array, steps: int) -> jax.Array:
    """The steps of a loop that runs only where the condition holds: () int32, as Triton's loop bounds must be."""
    return jax.lax.select(condition, jnp.int32(steps), jnp.int32(0))


def side(width: int, limit: int) -> int:
    """A block's side for an axis: the power of two at or above its width, between `SMALLEST_SIDE` and the limit."""
    return min(max(1 << (width - 1).bit_length(), SMALLEST_SIDE), limit)


SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a program of an H100 may use; other GPUs have less, and their compiler says so."""


def fitted(tile, **widths: int):
    """A tile with its sides cut to these widths, by the names of its fields.

    Raises:
      Misfit: a number that is no power of two (`stages` may be any), a side that tensor cores do not multiply, or more
        than 16 warps.
    """
    for name, number in tile._asdict().items():
        if number < 1 or (name != "stages" and number & (number - 1)):
            raise Misfit(f"{name}={number} is no power of two.")
    for name in widths:
        if getattr(tile, name) < SMALLEST_SIDE:
            raise Misfit(f"{name}={getattr(tile, name)}; at least {SMALLEST_SIDE} are multiplied.")
    if not 1 <= tile.warps <= 16:
        raise Misfit(f"warps={tile.warps}; 1 to 16 make a program.")
    return tile._replace(**{name: side(width, getattr(tile, name)) for name, width in widths.items()})


def require_room(needed: int) -> None:
    """Raises `Misfit` if the loads that are in flight need more than the shared memory."""
    if needed > SHARED_MEMORY:
        raise Misfit(f"it takes about {needed // 1024} KiB of shared memory; at most {SHARED_MEMORY // 1024} are used.")


def compiler_params(warps: int, stages: int) -> plgpu.CompilerParams:
    """Warps per program, and how many steps of a loop have their loads in flight."""
    return plgpu.CompilerParams(num_warps=warps, num_stages=stages)


def num_programs(*counts: int) -> tuple[int]:
    """The grid of this many programs in all."""
    total = 1
    for count in counts:
        total *= count
    return (total,)


def program() -> jax.Array:
    """This program's number."""
    return pl.program_id(0)
