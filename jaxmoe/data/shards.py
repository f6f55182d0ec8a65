"""Shards of tokenized documents: ArrayRecord files of token ids, each with an index beside it.

`shard-00000.array_record` has one record a document: its ids, end token included, as little-endian unsigned integers.
`shard-00000.npz` has the length and a hash of the text of each, and `about`: which tokenizer, how wide an id is, what
was skipped, where in the corpus the shard ends. A shard without its index is not one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxmoe.accounting import readable_bytes
from jaxmoe.data.errors import DataError
from jaxmoe.data.layouts import Documents
from jaxmoe.storage import as_path, is_remote, write_bytes

_log = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".array_record"


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What stands beside a shard.

    Attributes:
      lengths: tokens of each document, end token included.
      hashes: uint64 hash of each document's text.
      about: JSON values; see `write_shard`.
    """

    lengths: np.ndarray
    hashes: np.ndarray
    about: Mapping[str, Any]


def id_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(
    path: epath.Path, documents: Sequence[bytes], lengths: np.ndarray, hashes: np.ndarray, about: Mapping[str, Any]
) -> None:
    """Writes a shard and then its index, so that one whose writing was cut short has none.

    Args:
      path: of the ArrayRecord file, local or gs://.
      documents: the ids of each, as bytes of `about["dtype"]`.
      lengths, hashes: as in `ShardIndex`.
      about: JSON values with `dtype` and `tokenizer` (its fingerprint) at least.
    """
    from array_record.python import array_record_module

    with contextlib.ExitStack() as stack:
        if is_remote(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxmoe-"))
            local = os.path.join(folder, path.name)
        else:
            local = os.fspath(path.parent / f".{path.name}.{os.getpid()}")
            stack.callback(lambda: os.path.exists(local) and os.unlink(local))
        writer = array_record_module.ArrayRecordWriter(local, "group_size:1")
        for document in documents:
            writer.write(document)
        writer.close()
        if is_remote(path):
            with open(local, "rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        else:
            os.replace(local, path)
    content = io.BytesIO()
    encoded = np.frombuffer(json.dumps({"format": FORMAT, **about}).encode(), np.uint8)
    np.savez(content, lengths=lengths.astype(np.uint32), hashes=hashes.astype(np.uint64), about=encoded)
    write_bytes(index_path(path), content.getvalue())


def index_path(path: epath.PathLike) -> epath.Path:
    """The index of a shard."""
    return as_path(os.fspath(path).removesuffix(SUFFIX) + ".npz")


def read_index(path: epath.PathLike) -> ShardIndex:
    """The index of the shard `path`.

    Raises:
      DataError: there is none, or it cannot be read.
    """
    file = index_path(path)
    if not file.exists():
        raise DataError(
            f"{path}: no index {file.name} beside it; a shard of a `tokens` source is written by `python -m "
            "experiments.data tokenize` (ArrayRecord files of text are read by a `text` source)."
        )
    try:
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            about = json.loads(arrays["about"].tobytes())
            index = ShardIndex(arrays["lengths"].astype(np.int64), arrays["hashes"], about)
        if about["format"] > FORMAT or len(index.lengths) != len(index.hashes):
            raise ValueError(f"format {about['format']}")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file}: cannot be read ({error}); tokenize the corpus again.") from error
    return index


class ShardedTokens:
    """The ids of all documents of some shards as one flat, read-only array that is indexed by positions.

    What is not asked for is not read, so that memory does not grow with the corpus.

    Args:
      paths: of the shards, on a disk.
      lengths: of the documents of each.
      dtypes: of the ids of each.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[np.ndarray], dtypes: Sequence[np.dtype]):
        self._paths, self._dtypes = list(paths), list(dtypes)
        self._first = np.cumsum([0, *map(len, lengths)])  # number of each shard's first document
        self.starts = np.concatenate([[0], np.cumsum(np.concatenate([*lengths, np.zeros(0, np.int64)]))])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """(positions,) int32; neighbouring positions of one document are read together."""
        ids = np.empty(len(positions), np.int32)
        if not len(positions):
            return ids
        document = np.searchsorted(self.starts, positions, side="right") - 1
        runs = np.flatnonzero(np.diff(document, prepend=-1))
        content = self._read(np.unique(document))
        for begin, end in zip(runs, [*runs[1:], len(positions)]):
            number = int(document[begin])
            ids[begin:end] = content[number][positions[begin:end] - self.starts[number]]
        return ids

    def _read(self, documents: np.ndarray) -> dict[int, np.ndarray]:
        """The ids of documents, by number."""
        content: dict[int, np.ndarray] = {}
        shards = np.searchsorted(self._first, documents, side="right") - 1
        for shard in np.unique(shards):
            wanted = documents[shards == shard]
            reader = self._reader(int(shard))
            with self._lock:
                records = reader.read([int(number - self._first[shard]) for number in wanted])
            for number, record in zip(wanted, records, strict=True):
                found = np.frombuffer(record, self._dtypes[shard])
                if len(found) != self.starts[number + 1] - self.starts[number]:
                    raise DataError(f"{self._paths[shard]}: record {number - self._first[shard]} is damaged.")
                content[int(number)] = found
        return content

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = _open(self._paths[shard])
            return self._readers[shard]


@dataclasses.dataclass(frozen=True)
class ShardedCorpus:
    """Documents of shards, with a hash of each, and what was skipped when they were made, by reason."""

    documents: Documents
    hashes: np.ndarray
    skipped: Mapping[str, int]


def open_corpus(paths: Sequence[str], tokenizer_fingerprint: str, cache_dir: str | os.PathLike | None) -> ShardedCorpus:
    """The documents of shards, in order.

    Args:
      paths: of the shards; those on gs:// are copied to `cache_dir` when they are not there yet.
      tokenizer_fingerprint: of the run's tokenizer.
      cache_dir: a folder on a disk, needed for gs:// alone; None, or a remote one: the system's temporary folder.

    Raises:
      DataError: no index, another tokenizer, a damaged file.
    """
    indices = [read_index(path) for path in paths]
    skipped: dict[str, int] = {}
    for path, index in zip(paths, indices, strict=True):
        if index.about["tokenizer"] != tokenizer_fingerprint:
            raise DataError(
                f"{path}: was tokenized with another tokenizer ({index.about['tokenizer'][:18]}...) than "
                f"data.tokenizer ({tokenizer_fingerprint[:18]}...); give that one, or tokenize the corpus again."
            )
        for reason, count in index.about.get("skipped", {}).items():
            skipped[reason] = skipped.get(reason, 0) + count
    local = [_local(path, cache_dir) for path in paths]
    for path, file, index in zip(paths, local, indices, strict=True):
        count = _open(file).num_records()
        if count != len(index.lengths):
            raise DataError(f"{path}: has {count} records, and its index says {len(index.lengths)}; tokenize it again.")
    lengths = [index.lengths for index in indices]
    tokens = ShardedTokens(local, lengths, [np.dtype(index.about["dtype"]) for index in indices])
    documents = Documents(tokens, tokens.starts[:-1], np.diff(tokens.starts))
    return ShardedCorpus(documents, np.concatenate([index.hashes for index in indices]), skipped)


def _open(path: str) -> Any:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
    except Exception as error:  # the binding's errors have no common class
        raise DataError(f"{path}: not an ArrayRecord file, or a damaged one ({error}).") from error
    if not reader.ok():
        raise DataError(f"{path}: not an ArrayRecord file, or a damaged one.")
    return reader


def _local(path: str, cache_dir: str | os.PathLike | None) -> str:
    """`path`, or a copy of it on a disk, since ArrayRecord reads no other."""
    if not is_remote(path):
        return os.path.expanduser(path)
    on_disk = cache_dir is not None and not is_remote(cache_dir)
    folder = os.path.join(os.path.expanduser(cache_dir) if on_disk else tempfile.gettempdir(), "shards")
    os.makedirs(folder, exist_ok=True)
    length = int(as_path(path).stat().length)
    name = hashlib.sha256(path.encode()).hexdigest()[:16]
    target = os.path.join(folder, f"{name}-{length}{SUFFIX}")
    if not os.path.exists(target):
        _log.info("copying %s (%s) to %s, since ArrayRecord reads from a disk", path, readable_bytes(length), folder)
        draft = f"{target}.{os.getpid()}"
        try:
            with as_path(path).open("rb") as source, open(draft, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            os.replace(draft, target)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be copied to {folder} ({error.strerror or error}); set data.cache_dir to a folder "
                "with room, or mount the bucket and name the files by their path there."
            ) from error
        finally:
            if os.path.exists(draft):
                os.unlink(draft)
    return target
