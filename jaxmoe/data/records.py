"""Records of data files, one after the other, each with the place it stands at."""

from __future__ import annotations

import collections
import contextlib
import gzip
import importlib
import io
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Literal

from jaxmoe.data.errors import DataError
from jaxmoe.data.files import require_file
from jaxmoe.storage import as_path, is_remote

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".array_record")
QUESTION_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")

_BROKEN = object()
_log = logging.getLogger(__name__)


class RecordErrors:
    """What to do about records that cannot be used.

    Attributes:
      on_error: `raise` makes the first one a DataError; `skip` counts them.
      skipped: how many, by reason.
    """

    def __init__(self, source: str, on_error: Literal["raise", "skip"]):
        self.source, self.on_error = source, on_error
        self.skipped: collections.Counter[str] = collections.Counter()
        self._first = ""

    @property
    def total(self) -> int:
        """Records skipped for any reason."""
        return sum(self.skipped.values())

    def report(self, location: str, reason: str, detail: str = "") -> None:
        """Raises DataError, or counts the record at `location` as skipped for `reason`."""
        message = f"{location}: {reason}{detail}."
        if self.on_error == "raise":
            raise DataError(f"{message} (on_error='skip' leaves such records out and counts them.)")
        self._first = self._first or message
        self.skipped[reason] += 1

    def summarize(self, kept: int) -> None:
        """Logs what was skipped, if anything was."""
        if self.skipped:
            _log.warning(
                "source %r: skipped %d of %d records (%s); the first: %s",
                self.source, self.total, self.total + kept, in_words(self.skipped), self._first,
            )


def in_words(skipped: Mapping[str, int]) -> str:
    """How many records were skipped for which reason."""
    return ", ".join(f"{count} {reason}" for reason, count in collections.Counter(skipped).most_common())


def read_records(path: str, errors: RecordErrors) -> Iterator[tuple[str, Any]]:
    """The records of one file.

    `.txt` is one record, the whole text. `.jsonl`, `.jsonl.gz` and `.jsonl.zst` have one JSON value a line (blank
    lines are none), `.json` is a list of values, a row of `.parquet` is an object. A record of `.array_record` is JSON
    if it is a JSON object, else text.

    Args:
      path: local or gs://; its suffix decides the format.
      errors: told of each record that cannot be read.

    Yields:
      (location, value); location is `file`, `file:line`, `file: item 3` or `file: record 3`.

    Raises:
      DataError: no such file, an empty one, one without records, one that cannot be read at all.
    """
    file = as_path(path)
    require_file(file)
    size = file.stat().length
    if size == 0:
        raise DataError(f"{path}: the file is empty.")
    readers = {
        ".txt": _text, ".jsonl": _lines, ".jsonl.gz": _lines, ".jsonl.zst": _lines, ".json": _items,
        ".parquet": _rows, ".array_record": _array_records,
    }  # fmt: skip
    reader = next(reader for suffix, reader in readers.items() if path.endswith(suffix))
    records, broken = 0, errors.total
    try:
        for location, value in reader(path, errors):
            records += 1
            yield location, value
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if records == 0 and errors.total == broken:
        raise DataError(f"{path}: the file has no records.")


def string_field(location: str, value: Any, key: str, errors: RecordErrors) -> str | None:
    """`value[key]`, which must be a string; None where it is not and `errors` lets it be skipped."""
    if not isinstance(value, dict):
        errors.report(location, "not a JSON object", f" but a {type(value).__name__}")
    elif key not in value:
        errors.report(location, f"no key {key!r}", f"; it has {', '.join(map(repr, value)) or 'none'}")
    elif not isinstance(value[key], str):
        errors.report(location, f"{key!r} is not a string", f" but a {type(value[key]).__name__}")
    elif not _encodable(value[key]):
        errors.report(location, f"{key!r} has half of a surrogate pair", ", which no UTF-8 text can")
    else:
        return value[key]
    return None


def _text(path: str, errors: RecordErrors) -> Iterator[tuple[str, str]]:
    text = _decoded(path, as_path(path).read_bytes(), errors)
    if text is not None:
        yield path, text.removeprefix("\ufeff")


def _lines(path: str, errors: RecordErrors) -> Iterator[tuple[str, Any]]:
    with as_path(path).open("rb") as raw, _decompressed(path, raw) as lines:
        number, broken = 0, (EOFError, zlib.error, gzip.BadGzipFile, *_zstandard_errors(path))
        try:
            for number, line in enumerate(lines, start=1):
                location = f"{path}:{number}"
                line = line.strip() if number > 1 else line.removeprefix(b"\xef\xbb\xbf").strip()
                text = _decoded(location, line, errors) if line else None
                value = _BROKEN if text is None else _parsed(location, text, errors)
                if value is not _BROKEN:
                    yield location, value
        except broken as error:
            errors.report(f"{path}:{number + 1}", "broken compressed data", f" ({error}); the rest of the file is lost")


def _decompressed(path: str, raw: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(raw)
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstandardFrames(raw, _needed("zstandard", path).ZstdDecompressor()), 1 << 20)
    return raw


class _ZstandardFrames(io.RawIOBase):
    """What the frames of a file hold, one after the other; EOFError where the file ends within one.

    The package's own reader takes a file that was cut off for one that ends there.
    """

    def __init__(self, raw: BinaryIO, decompressor: Any):
        self._raw, self._decompressor, self._frame = raw, decompressor, None
        self._compressed = self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            compressed = self._compressed or self._raw.read(1 << 12)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready, self._compressed = memoryview(self._frame.decompress(compressed)), memoryview(b"")
            if self._frame.eof:
                self._compressed, self._frame = memoryview(self._frame.unused_data), None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _zstandard_errors(path: str) -> tuple[type[Exception], ...]:
    return (_needed("zstandard", path).ZstdError,) if path.endswith(".zst") else ()


def _needed(package: str, path: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"{path}: needs `pip install 'jaxmoe[data]'` ({error}).") from error


def _rows(path: str, errors: RecordErrors) -> Iterator[tuple[str, Any]]:
    parquet, arrow = _needed("pyarrow.parquet", path), _needed("pyarrow", path)
    with as_path(path).open("rb") as file:
        try:
            number = 0
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as parquet ({error}).") from error


def _items(path: str, errors: RecordErrors) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(as_path(path).read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}).") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: holds a {type(values).__name__}; a JSON list of objects is needed.")
    for number, value in enumerate(values):
        yield f"{path}: item {number}", value


def _array_records(path: str, errors: RecordErrors) -> Iterator[tuple[str, Any]]:
    from array_record.python import array_record_module

    with contextlib.ExitStack() as stack:
        local = path
        if is_remote(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxmoe-"))
            local = os.path.join(folder, os.path.basename(path))
            with as_path(path).open("rb") as remote, open(local, "wb") as copy:
                shutil.copyfileobj(remote, copy, 1 << 20)
        reader = array_record_module.ArrayRecordReader(local, "readahead_buffer_size:0,max_parallelism:0")
        if not reader.ok():
            raise DataError(f"{path}: not an ArrayRecord file, or a damaged one.")
        stack.callback(reader.close)
        total, block = reader.num_records(), 256
        for first in range(0, total, block):
            for number, content in enumerate(reader.read(first, min(first + block, total)), start=first):
                location = f"{path}: record {number}"
                text = _decoded(location, content, errors)
                if text is None:
                    continue
                try:
                    value = json.loads(text) if text.lstrip().startswith("{") else text
                except (ValueError, RecursionError):
                    value = text
                yield location, value


def _decoded(location: str, content: bytes, errors: RecordErrors) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        errors.report(location, "not UTF-8", f" (byte 0x{content[error.start]:02x} at {error.start})")
        return None


def _parsed(location: str, text: str, errors: RecordErrors) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        errors.report(location, "not JSON", f" ({error.msg} at column {error.colno})")
    except RecursionError:
        errors.report(location, "not JSON", " (nested too deeply)")
    return _BROKEN


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
