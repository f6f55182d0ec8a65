"""safetensors files, read and written a part of a tensor at a time.

The format is eight bytes of length, a JSON header of names, dtypes, shapes and places, and the numbers. The library of
that name maps whole files into memory and takes all tensors of a file at once to write it; here nothing is held but
what is asked for, files may be in an object store, and damage is told by the tensor it hits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from jaxmoe.config import ConfigError
from jaxmoe.storage import is_remote, read_json, write_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
"""Largest file that `write_tensors` makes, unless one tensor alone is larger."""
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Floating-point dtypes by their names in a header; others (quantized weights) are not read."""
_LONGEST_HEADER = 100_000_000
_NAMED_BY_US = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class TensorFileError(ConfigError):
    """A file that is missing, damaged, or not what its index says; the message names the file and the tensor."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its numbers are.

    Attributes:
      name, shape: as the header has them.
      dtype: the header's name for it.
      path: of the file.
      offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: epath.Path
    offset: int


class TensorFiles:
    """All tensors of a folder of safetensors files: one file, or several with their index.

    Attributes:
      tensors: by name.
      bytes_read: by `read`, so far.

    Args:
      folder: with `model.safetensors`, or `model.safetensors.index.json` and the files it names.

    Raises:
      TensorFileError: there are no such files, one is damaged, or they are not what the index says.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.bytes_read = 0
        self._open: tuple[epath.Path, Any] | None = None
        weight_map = _index(self.folder)
        for file in [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values())):
            for name, tensor in read_header(self.folder / file).items():
                if name in self.tensors:
                    raise TensorFileError(f"{name} is in both {self.tensors[name].path} and {tensor.path}.")
                self.tensors[name] = tensor
        for name, file in {} if weight_map is None else weight_map.items():
            if name not in self.tensors or self.tensors[name].path.name != file:
                raise TensorFileError(f"{self.folder / INDEX_FILE} says that {file} has {name}; it has not.")

    def read(self, name: str, rows: int, start: int, stop: int) -> np.ndarray:
        """Elements of a tensor whose numbers are taken as `rows` equal rows, from row `start` to before `stop`.

        Returns:
          (stop - start, numbers of a row), in the file's dtype.

        Raises:
          TensorFileError: the tensor is of a dtype that is not read, or the file ends before it does.
        """
        tensor, dtype = self.tensors[name], self._dtype(name)
        per_row = math.prod(tensor.shape) // rows
        content = np.empty((stop - start, per_row), dtype)
        if self._open is None or self._open[0] != tensor.path:
            self.close()
            self._open = tensor.path, _opened(tensor.path)
        file = self._open[1]
        file.seek(tensor.offset + start * per_row * dtype.itemsize)
        unread = memoryview(content.reshape(-1).view(np.uint8))
        while unread:
            count = file.readinto(unread)
            if not count:
                raise TensorFileError(f"{tensor.path} ends within {name}; it is cut off, copy it again.")
            unread = unread[count:]
        self.bytes_read += content.nbytes
        return content

    def itemsize(self, name: str) -> int:
        """Bytes of one number of a tensor.

        Raises:
          TensorFileError: the tensor is of a dtype that is not read.
        """
        return self._dtype(name).itemsize

    def _dtype(self, name: str) -> np.dtype:
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise TensorFileError(
                f"{tensor.path}: {name} is {tensor.dtype}; tensors of {', '.join(DTYPES)} are read. (Quantized "
                "checkpoints have to be dequantized first.)"
            )
        return DTYPES[tensor.dtype]

    def close(self) -> None:
        """Closes the file that was last read from."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_header(path: epath.PathLike) -> dict[str, StoredTensor]:
    """What a safetensors file says it holds, checked against its size.

    Raises:
      TensorFileError: there is no such file, it has no valid header, or it is shorter or longer than that says.
    """
    path = epath.Path(path)
    if not path.exists():
        raise TensorFileError(f"{path} is missing.")
    size = path.stat().length
    with _opened(path) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise TensorFileError(f"{path} is no safetensors file, or is cut off within its header ({size} bytes).")
        content = io.BytesIO()
        while content.tell() < length:
            part = file.read(length - content.tell())
            if not part:
                raise TensorFileError(f"{path} is cut off within its header ({size} bytes).")
            content.write(part)
    try:
        header = json.loads(content.getvalue())
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        tensors = {
            name: StoredTensor(name, tuple(map(int, entry["shape"])), str(entry["dtype"]), path, 8 + length + begin)
            for (name, entry), (begin, _) in zip(entries.items(), places.values(), strict=True)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path}: its header is damaged ({type(error).__name__}: {error}).") from error
    _check_places(path, size - 8 - length, tensors, places)
    return tensors


def _check_places(
    path: epath.Path, available: int, tensors: Mapping[str, StoredTensor], places: Mapping[str, tuple[int, int]]
) -> None:
    """Each tensor has as many bytes as its shape needs, and they follow one another to the end of the file."""
    expected = 0
    for name in sorted(places, key=places.get):
        begin, end = places[name]
        dtype = DTYPES.get(tensors[name].dtype)
        needed = None if dtype is None else math.prod(tensors[name].shape) * dtype.itemsize
        if begin != expected or end < begin or needed not in (None, end - begin):
            raise TensorFileError(
                f"{path}: its header is damaged: {name} is {tensors[name].dtype}{list(tensors[name].shape)} at bytes "
                f"{begin} to {end}, and the tensor before it ends at {expected}."
            )
        if end > available:
            raise TensorFileError(
                f"{path} is cut off: {name} ends at byte {end} of the tensors' data, and the file has {available} of "
                "it. Copy it again."
            )
        expected = end
    if expected < available:
        raise TensorFileError(f"{path}: {available - expected} bytes follow the last tensor; the header has not all.")


def _index(folder: epath.Path) -> dict[str, str] | None:
    """The file of each tensor; None for a folder with a single file."""
    if (folder / INDEX_FILE).exists():
        try:
            return dict(read_json(folder / INDEX_FILE)["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise TensorFileError(f"{folder / INDEX_FILE} is not an index of safetensors files ({error}).") from error
    if (folder / SINGLE_FILE).exists():
        return None
    others = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5")]
    advice = (
        f" It has {', '.join(sorted(others)[:3])}: load that with transformers and save it again, which writes "
        "safetensors." if others else ""
    )  # fmt: skip
    raise TensorFileError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}.{advice}")


def _opened(path: epath.Path) -> Any:
    """The file for unbuffered reading: what is read goes straight to where it is wanted."""
    return path.open("rb") if is_remote(path) else open(path, "rb", buffering=0)


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor that `write_tensors` asks for when its turn has come.

    Attributes:
      name, shape: as the header will have them.
      rows: its blocks: arrays whose numbers follow one another, of the dtype given to `write_tensors`.
    """

    name: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[np.ndarray]]


def write_tensors(
    folder: epath.PathLike, tensors: Sequence[TensorToWrite], dtype: str, *, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Writes tensors to one safetensors file, or to several with an index, one block of one tensor after the other.

    Such files of an earlier checkpoint in the folder are removed, so that none is taken for part of this one.

    Args:
      folder: to write to; it is there.
      tensors: in this order.
      dtype: of all of them, a key of `DTYPES`.
      shard_bytes: of one file, at most (unless one tensor is larger).

    Returns:
      Names of the files.
    """
    folder, itemsize = epath.Path(folder), DTYPES[dtype].itemsize
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    count = len(shards)
    files = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    (folder / INDEX_FILE).unlink(missing_ok=True)
    for earlier in folder.glob("model*.safetensors"):
        if earlier.name not in files and _NAMED_BY_US.fullmatch(earlier.name):
            earlier.unlink()
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, dtype)
    if count > 1:
        total = sum(math.prod(tensor.shape) for tensor in tensors) * itemsize
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def _write_file(path: epath.Path, tensors: Sequence[TensorToWrite], dtype: str) -> None:
    itemsize, end = DTYPES[dtype].itemsize, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * itemsize
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    unfinished = path if is_remote(path) else path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with unfinished.open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            for tensor in tensors:
                for block in tensor.rows():
                    file.write(memoryview(np.ascontiguousarray(block).reshape(-1).view(np.uint8)))
        if unfinished != path:
            unfinished.replace(path)
    finally:
        if unfinished != path:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()
