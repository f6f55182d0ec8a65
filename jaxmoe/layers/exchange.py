"""The ragged exchange: every device of a group sends each of the others a slice of its rows, of any length.

P devices of a group, N rows to send, M rows to receive, D width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import execution, varying

Axes = tuple[str, ...]
"""Names of the mesh axes that make up a group, first the one that varies slowest."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slices:
    """What one device sends to each device of its group, and receives from each: int32, one entry a device.

    Attributes:
      send_offset: first row of the slice, here.
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


def exchange(rows: Float[Array, "N ..."], slices: Slices, num_rows: int, axes: Axes) -> Float[Array, "M ..."]:
    """Rows from every device of the group, zero where none arrives. Inside `shard_map`; no row may be sent twice.

    One `jax.lax.ragged_all_to_all`, which moves the slices and nothing else. XLA:CPU has none: there each slice is
    padded to the longest that there could be and moved by `jax.lax.all_to_all`, P·min(N, M) rows in and out.

    Args:
      rows: to send.
      slices: of this device; those of all devices must agree.
      num_rows: M; what is received must lie within.
      axes: of the mesh, whose devices are the group.

    Returns:
      What was received. Its gradient is the exchange the other way.
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
    if execution.platform() == "cpu":
        return _padded_all_to_all(rows, slices, num_rows, axes)
    return jax.lax.ragged_all_to_all(
        rows,
        varying.zeros((num_rows, *rows.shape[1:]), rows.dtype, rows, slices),
        slices.send_offset,
        slices.send_size,
        slices.send_to,
        slices.receive_size,
        axis_name=axes,
    )


def _padded_all_to_all(rows: jax.Array, slices: Slices, num_rows: int, axes: Axes) -> jax.Array:
    longest = min(rows.shape[0], num_rows)
    place = jnp.arange(longest, dtype=jnp.int32)
    sent = jnp.minimum(slices.send_offset[:, None] + place, rows.shape[0] - 1)
    padded = jax.lax.all_to_all(rows[sent], axes, 0, 0, tiled=True)
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    own = (row >= slices.receive_offset) & (row < slices.receive_offset + slices.receive_size)
    source = jnp.argmax(own, axis=1)
    received = padded[source, jnp.clip(row[:, 0] - slices.receive_offset[source], 0, longest - 1)]
    return jnp.where(own.any(axis=1).reshape(-1, *(1,) * (rows.ndim - 1)), received, 0)
