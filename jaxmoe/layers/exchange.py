"""The ragged exchange: every device of a group sends each of the others a slice of its rows, of any length.

XLA:TPU makes every row of it a multiple of 512 bytes. So that narrow rows need not travel as wide ones, slices begin at
multiples of BLOCK rows, and as many rows as fill such a multiple travel together.

P devices of a group, N rows to send, M rows to receive, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import execution, varying

Axes = tuple[str, ...]
"""Names of the mesh axes that make up a group, first the one that varies slowest."""

BLOCK = 32
"""Rows of whose multiples each slice begins at one, here and over there. A power of two."""

_TPU_ROW = 512
"""Bytes of whose multiples XLA:TPU makes each row of a ragged exchange one (libtpu 0.0.42)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slices:
    """What one device sends to each device of its group, and receives from each: int32, one entry a device.

    Attributes:
      send_offset: first row of the slice, here, as all first rows a multiple of BLOCK.
      send_size: its rows.
      send_to: where it begins over there.
      receive_offset: first row of what comes from there, here.
      receive_size: its rows.
      receive_from: where it begins over there.
    """

    send_offset: Int[Array, " P"]
    send_size: Int[Array, " P"]
    send_to: Int[Array, " P"]
    receive_offset: Int[Array, " P"]
    receive_size: Int[Array, " P"]
    receive_from: Int[Array, " P"]

    @property
    def reversed(self) -> Slices:
        """The way back: what was received is sent to where it came from."""
        return Slices(
            self.receive_offset, self.receive_size, self.receive_from, self.send_offset, self.send_size, self.send_to
        )

    def together(self, rows: int) -> Slices:
        """The same where so many rows are one, a divisor of BLOCK; the last one of a slice may be in part another's."""
        return jax.tree.map(lambda first_or_size: (first_or_size + rows - 1) // rows, self)


def blocks(rows: Any) -> Any:
    """Numbers of rows, each up to the next multiple of BLOCK."""
    return (rows + BLOCK - 1) & -BLOCK


def buffer_rows(rows: int, devices: int) -> int:
    """Of a buffer for P slices of so many rows together, each from a multiple of BLOCK on."""
    return blocks(rows + devices * (BLOCK - 1))


def rows_together(row_bytes: int) -> int:
    """Rows that travel as one: the fewest that fill a multiple of 512 bytes, or BLOCK."""
    return min(BLOCK, _TPU_ROW // math.gcd(row_bytes, _TPU_ROW))


def exchange(rows: Float[Array, "N ..."], slices: Slices, num_rows: int, axes: Axes) -> Float[Array, "M ..."]:
    """Rows from every device of the group. Inside `shard_map`; no row may be sent twice.

    One `jax.lax.ragged_all_to_all`, which moves the slices and nothing else. XLA:CPU has none: there each slice is
    padded to the longest that there could be and moved by `jax.lax.all_to_all`, P·min(N, M) rows in and out.

    Args:
      rows: to send, N a multiple of BLOCK.
      slices: of this device; those of all devices must agree.
      num_rows: M, a multiple of BLOCK; what is received must lie within.
      axes: of the mesh, whose devices are the group.

    Returns:
      What was received. Behind a slice, up to the next multiple of BLOCK, are zeros or rows that lay behind it where it
      was sent; all else is zero. Its gradient is the exchange the other way.
    """
    return _exchange(num_rows, axes, rows, slices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(num_rows: int, axes: Axes, rows: jax.Array, slices: Slices) -> jax.Array:
    return _moved(rows, slices, num_rows, axes)


def _forward(num_rows, axes, rows, slices):
    return _moved(rows, slices, num_rows, axes), (slices, rows.shape[0])


def _backward(num_rows, axes, residuals, gradient):
    del num_rows
    slices, rows = residuals
    return _moved(gradient, slices.reversed, rows, axes), None


_exchange.defvjp(_forward, _backward)


def _moved(rows: jax.Array, slices: Slices, num_rows: int, axes: Axes) -> jax.Array:
    count = rows_together(math.prod(rows.shape[1:]) * rows.dtype.itemsize)
    wide, slices = rows.reshape(rows.shape[0] // count, -1), slices.together(count)
    if execution.platform() == "cpu":
        received = _padded_all_to_all(wide, slices, num_rows // count, axes)
    else:
        received = jax.lax.ragged_all_to_all(
            wide,
            varying.zeros((num_rows // count, wide.shape[1]), rows.dtype, rows, slices),
            slices.send_offset,
            slices.send_size,
            slices.send_to,
            slices.receive_size,
            axis_name=axes,
        )
    return received.reshape(num_rows, *rows.shape[1:])


def _padded_all_to_all(rows: jax.Array, slices: Slices, num_rows: int, axes: Axes) -> jax.Array:
    longest = min(rows.shape[0], num_rows)
    place = jnp.arange(longest, dtype=jnp.int32)
    sent = jnp.minimum(slices.send_offset[:, None] + place, rows.shape[0] - 1)
    padded = jax.lax.all_to_all(rows[sent], axes, 0, 0, tiled=True)
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    own = (row >= slices.receive_offset) & (row < slices.receive_offset + slices.receive_size)
    source = jnp.argmax(own, axis=1)
    received = padded[source, jnp.clip(row[:, 0] - slices.receive_offset[source], 0, longest - 1)]
    return jnp.where(own.any(axis=1, keepdims=True), received, 0)
