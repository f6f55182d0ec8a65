"""Reading arrays onto another mesh than they were written from, without reading much of them twice.

Storage is read by whole chunks. A mesh that cuts an array across its chunks would have every device read chunks of
which it needs a part, in the end the whole array on each host. Such an array is read along its chunks instead, every
device a part of its own, and the devices exchange what the mesh wants.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

_ACCEPTED = 2.0
_SMALL = 2**18  # elements


def read_sharding(shape: tuple[int, ...], chunk: tuple[int, ...], wanted: Sharding) -> Sharding:
    """How to read an array that is to be placed as `wanted`: so, or along its chunks if that reads far less.

    Args:
      shape: of the array.
      chunk: shape of the chunks in which it lies in storage.
      wanted: placement in the end.
    """
    if not isinstance(wanted, NamedSharding) or math.prod(shape) < _SMALL:
        return wanted
    as_wanted = elements_read(shape, chunk, wanted)
    if as_wanted <= _ACCEPTED * _elements_needed(shape, wanted):
        return wanted
    best = min(_along_chunks(shape, wanted.mesh), key=lambda other: elements_read(shape, chunk, other), default=wanted)
    return best if elements_read(shape, chunk, best) < as_wanted else wanted


def elements_read(shape: tuple[int, ...], chunk: tuple[int, ...], sharding: Sharding) -> int:
    """Elements of all the chunks that are read, a chunk counted for each distinct shard that it is in."""
    return sum(
        math.prod(
            min(-(-stop // step) * step, size) - start // step * step
            for (start, stop), step, size in zip(part, chunk, shape, strict=True)
        )
        for part in _parts(shape, sharding)
    )


def resharded(array: jax.Array, sharding: Sharding) -> jax.Array:
    """`array` placed otherwise on the same devices; in several processes, all of them call this."""
    return array if array.sharding == sharding else _identity(sharding)(array)


@functools.lru_cache(maxsize=256)
def _identity(sharding: Sharding):
    return jax.jit(lambda array: array, out_shardings=sharding)


def _elements_needed(shape: tuple[int, ...], sharding: Sharding) -> int:
    return sum(math.prod(stop - start for start, stop in part) for part in _parts(shape, sharding))


def _parts(shape: tuple[int, ...], sharding: Sharding) -> set[tuple[tuple[int, int], ...]]:
    """The distinct shards on all devices, so that every process decides alike, as (start, stop) along every axis."""
    indices = sharding.devices_indices_map(shape).values()
    return {
        tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True)) for index in indices
    }


def _along_chunks(shape: tuple[int, ...], mesh: Mesh) -> Iterator[NamedSharding]:
    """Placements on a mesh's devices that cut one or two axes evenly."""
    devices = mesh.devices.reshape(-1)
    for first in (n for n in range(devices.size, 1, -1) if devices.size % n == 0):
        grid = Mesh(np.reshape(devices, (first, -1)), ("first", "second"))
        for names in itertools.permutations(["first", "second", *[None] * (len(shape) - 1)], len(shape)):
            spec = PartitionSpec(*names)
            if "first" in names and all(
                name is None or size % grid.shape[name] == 0 for name, size in zip(names, shape, strict=True)
            ):
                yield NamedSharding(grid, spec)
