"""Fingerprints of arrays: one number for each, by which a checkpoint that is not what was written is noticed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

_PLACES = 2**15
"""Elements that are multiplied at a time on the host: what is held for them stays in the processor's cache."""


def fingerprints_of_save(
    arrays: Mapping[str, jax.Array], copies: Mapping[str, jax.Array]
) -> Callable[[], UInt32[np.ndarray, " arrays"]]:
    """Has `fingerprints` of what is saved computed where that holds up the training least.

    An accelerator computes them at the speed of its memory, beginning now. Where the device is a CPU, the step that
    starts a save would wait longer for them than for the copies: there what is returned computes them, of the copies.

    Args:
      arrays: on the devices.
      copies: of them, in the memory of the hosts.

    Returns:
      What waits for them, to be called by the thread that writes.
    """
    devices = {device for array in arrays.values() for device in array.sharding.device_set}
    if len(devices) == 1 and next(iter(devices)).platform == "cpu":
        return lambda: np.array([fingerprint_on_host(np.asarray(copy)) for copy in copies.values()], np.uint32)
    marks = fingerprints(arrays)
    return lambda: np.asarray(marks)


def fingerprints(arrays: Mapping[str, jax.Array]) -> UInt32[Array, " arrays"]:
    """One number for each array, still being computed, wherever the arrays are.

    The sum of an array's elements' bits, each times an odd number made of its place, modulo 2^32: one changed element
    shows, and so do two exchanged ones. Integers add in any order, so that the sum does not depend on the mesh.
    """
    meshes = [array.sharding.mesh for array in arrays.values() if isinstance(array.sharding, jax.NamedSharding)]
    one, together = _fingerprints_to(jax.NamedSharding(meshes[0], jax.P()) if meshes else None)
    marks: list[jax.Array] = []
    for array in arrays.values():
        marks.append(one(array, *marks[-1:]))
        if jax.default_backend() == "cpu":  # where collectives that are under way together may starve one another
            jax.block_until_ready(marks[-1])
    return together(marks)


def fingerprint_on_host(array: Shaped[np.ndarray, "*shape"]) -> int:
    """The same number of an array in the memory of this host, without any device."""
    bits = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}")
    odd = 2 * np.arange(min(_PLACES, bits.size), dtype=np.uint32) + 1
    weighted = np.empty_like(odd)
    total = 0
    for start in range(0, bits.size, _PLACES):
        part = bits[start : start + _PLACES]
        np.multiply(part, odd[: part.size], out=weighted[: part.size], casting="unsafe")
        total += int(weighted[: part.size].sum(dtype=np.uint32)) + 2 * start * int(part.sum(dtype=np.uint32))
    return total % 2**32


@functools.lru_cache(maxsize=8)
def _fingerprints_to(sharding: jax.NamedSharding | None):
    """Of one array after another, since XLA:CPU has a temporary copy of each; and the stack of them."""

    def one(array: jax.Array, *before: jax.Array) -> jax.Array:
        return _fingerprint(jax.lax.optimization_barrier((array, *before))[0])

    return jax.jit(one, out_shardings=sharding), jax.jit(jnp.stack, out_shardings=sharding)


def _fingerprint(array: jax.Array) -> jax.Array:
    width = array.dtype.itemsize * 8
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
