"""Tensors of files into the parameters of a decoder, wherever these are, and back: block by block."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmoe.config import ConfigError
from jaxmoe.interop.huggingface.layout import Part, Path, block_rows
from jaxmoe.interop.safetensors_files import TensorFiles

logger = logging.getLogger(__name__)

BLOCK_BYTES = 16 * 2**20
"""What is read or written of a tensor at a time."""
_BLOCKS_UNDER_WAY = 2
_SHOWN_NAMES = 20

Box = tuple[tuple[int, int], ...]


@dataclasses.dataclass
class _Piece:
    """What one or more devices hold of a parameter: the same on each."""

    box: Box
    arrays: dict[jax.Device, jax.Array]


def read_parameters(
    files: TensorFiles, parts: Sequence[Part], wanted: Mapping[Path, jax.ShapeDtypeStruct]
) -> dict[Path, jax.Array]:
    """Reads every parameter from the tensors that hold it, onto the devices that hold it.

    On the host there are two or three blocks of `BLOCK_BYTES` at a time beside what is on the devices. A process reads
    what its own devices need.

    Args:
      files: the checkpoint.
      parts: of the model, for the names that the checkpoint has.
      wanted: shape, dtype and sharding of each parameter.

    Raises:
      ConfigError: a tensor that is missing, of another shape, or that belongs to no parameter; names are listed.
    """
    check_tensors(files, parts)
    of_parameter = collections.defaultdict(list)
    for part in parts:
        of_parameter[part.parameter].append(part)
    started = time.perf_counter()
    read = {path: _read_parameter(files, of_parameter[path], target) for path, target in wanted.items()}
    jax.block_until_ready(read)
    seconds = time.perf_counter() - started
    size = files.bytes_read / 1e9
    logger.info(
        "read %d tensors, %.3f GB, from %s in %.1f s: %.2f GB/s",
        len(parts), size, files.folder, seconds, size / seconds,
    )  # fmt: skip
    return read


def check_tensors(files: TensorFiles, parts: Sequence[Part]) -> None:
    """Checks that a checkpoint has exactly the tensors that a model is made of, in their shapes.

    Raises:
      ConfigError: it has not; names are listed.
    """
    expected = {part.tensor: part.shape for part in parts}
    missing = [name for name in expected if name not in files.tensors]
    unexpected = [name for name in files.tensors if name not in expected and not _is_derived(name)]
    reasons = [
        f"{len(names)} tensors {what}: {', '.join(names[:_SHOWN_NAMES])}"
        + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")
        for names, what in ((missing, "are missing"), (unexpected, "belong to no parameter"))
        if names
    ]
    if reasons:
        raise ConfigError(f"{files.folder} is not the model that its config.json says; " + "; ".join(reasons) + ".")
    for name, shape in expected.items():
        found = files.tensors[name]
        if found.shape != shape:
            raise ConfigError(f"{found.path}: {name} is {list(found.shape)}; config.json makes it {list(shape)}.")


def _is_derived(name: str) -> bool:
    """Whether a tensor follows from config.json: rotary frequencies, which transformers 4.31 and older wrote."""
    return name.endswith(".rotary_emb.inv_freq")


def _read_parameter(files: TensorFiles, parts: Sequence[Part], target: jax.ShapeDtypeStruct) -> jax.Array:
    pieces, under_way = _empty_pieces(target), 0
    for part in parts:
        for start, stop in block_rows(part, files.itemsize(part.tensor), BLOCK_BYTES):
            block = part.block(start, stop)
            concerned = [(piece, common) for piece in pieces if (common := _overlap(block, piece.box)) is not None]
            if not concerned:
                continue
            numbers = files.read(part.tensor, part.view[0], start, stop).reshape(stop - start, *part.view[1:])
            for piece, common in concerned:
                _put(piece, numbers, part, block, common)
            under_way += 1
            if under_way > _BLOCKS_UNDER_WAY:  # so that no more of them wait on the host
                under_way = 0
                jax.block_until_ready([array for piece in pieces for array in piece.arrays.values()])
    arrays = {device: array for piece in pieces for device, array in piece.arrays.items()}
    ordered = [arrays[device] for device in target.sharding.addressable_devices_indices_map(target.shape)]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, ordered)


def _empty_pieces(target: jax.ShapeDtypeStruct) -> list[_Piece]:
    """Zeros for every different part of a parameter that devices of this process hold."""
    pieces: dict[Box, _Piece] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        bounds = (part.indices(size) for part, size in zip(index, target.shape, strict=True))
        box = tuple((start, stop - start) for start, stop, _ in bounds)
        zeros = jnp.zeros([size for _, size in box], target.dtype, device=device)
        pieces.setdefault(box, _Piece(box, {})).arrays[device] = zeros
    return list(pieces.values())


def _put(piece: _Piece, numbers: np.ndarray, part: Part, block: Box, common: Box) -> None:
    """Writes to a piece what it has in common with a block of a tensor."""
    # Of the block in the file's order of axes: what lies in `common`.
    relative = [(first - origin, size) for (first, size), (origin, _) in zip(common, block, strict=True)]
    slices = tuple(slice(first, first + size) for first, size in (relative[axis] for axis in part.axes))
    chosen = np.ascontiguousarray(numbers[slices])
    shape = tuple(size for _, size in common)
    start = np.asarray([first - origin for (first, _), (origin, _) in zip(common, piece.box, strict=True)], np.int32)
    for device, array in piece.arrays.items():
        moved = jax.device_put(chosen, device)
        piece.arrays[device] = _write(array, moved, jax.device_put(start, device), part.order, shape)


@functools.partial(jax.jit, static_argnames=("order", "shape"), donate_argnums=0)
def _write(whole: Array, numbers: Array, start: Array, order: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """`whole` with numbers, their axes reordered, at `start`; in place."""
    box = numbers.transpose(order).reshape(shape).astype(whole.dtype)
    return jax.lax.dynamic_update_slice(whole, box, list(start))


def _overlap(one: Box, other: Box) -> Box | None:
    common = []
    for (first, size), (start, length) in zip(one, other, strict=True):
        begin, end = max(first, start), min(first + size, start + length)
        if begin >= end:
            return None
        common.append((begin, end - begin))
    return tuple(common)


# --------------------------------------------------------------------------- and back


def tensor_blocks(part: Part, parameter: jax.Array, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The blocks of a tensor, first to last, from the parameter that holds it.

    Args:
      part: which part of the parameter the tensor is.
      parameter: on devices of this process.
      dtype: of the blocks.
    """
    for start, stop in block_rows(part, dtype.itemsize, BLOCK_BYTES):
        block = part.block(start, stop)
        numbers = np.empty((stop - start, *part.view[1:]), dtype)
        for shard in _distinct_shards(parameter):
            bounds = (index.indices(size) for index, size in zip(shard.index, parameter.shape, strict=True))
            box = tuple((first, last - first) for first, last, _ in bounds)
            common = _overlap(block, box)
            if common is None:
                continue
            begin = np.asarray([first - origin for (first, _), (origin, _) in zip(common, box, strict=True)], np.int32)
            sizes = tuple(size for _, size in common)
            found = _cut(shard.data, jax.device_put(begin, shard.device), sizes, part.axes, dtype)
            relative = [(first - origin, size) for (first, size), (origin, _) in zip(common, block, strict=True)]
            slices = tuple(slice(first, first + size) for first, size in (relative[axis] for axis in part.axes))
            numbers[slices] = np.asarray(found)
        yield numbers


def _distinct_shards(parameter: jax.Array) -> list[Any]:
    """One shard for each different part of a parameter."""
    return [shard for shard in parameter.addressable_shards if shard.replica_id == 0]


@functools.partial(jax.jit, static_argnames=("sizes", "axes", "dtype"))
def _cut(shard: Array, begin: Array, sizes: tuple[int, ...], axes: tuple[int, ...], dtype: Any) -> Array:
    """A box of a shard, with its axes in the file's order: those of the parameter that `axes` names."""
    box = jax.lax.dynamic_slice(shard, list(begin), sizes)
    left = [axis for axis in range(box.ndim) if axis not in axes]  # of size one
    return box.transpose(*left, *axes).reshape([sizes[axis] for axis in axes]).astype(dtype)
