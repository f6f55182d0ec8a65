"""Files by name or pattern, local or gs://, with errors that name them."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Sequence

from etils import epath

from jaxmoe.data.errors import DataError
from jaxmoe.storage import as_path, is_remote

_PATTERN_CHARACTERS = "*?["


def read_bytes(path: str) -> bytes:
    """Content of one file.

    Raises:
      DataError: no such file, with the nearest name in its folder; a folder; no permission; an empty file.
    """
    file = as_path(path)
    require_file(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not content:
        raise DataError(f"{path}: the file is empty.")
    return content


def require_file(file: epath.Path) -> None:
    """Raises DataError, with what there is instead, unless `file` is a file."""
    try:
        folder, exists = file.is_dir(), file.exists()
        instead = "" if exists else _instead(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be reached ({error.strerror or error}).") from error
    if folder:
        raise DataError(f"{file}: is a folder; name its files, for example {file}/*.jsonl.")
    if not exists:
        raise DataError(f"{file}: no such file.{instead}")


def expand(patterns: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The files that `patterns` name: patterns in the order given, the files of each sorted, each file once.

    Args:
      patterns: files, or patterns with `*`, `?`, `[...]` and `**`.
      suffixes: what a file's name may end in.

    Raises:
      DataError: a pattern that matches no file, a missing file, a name with another ending.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if any(character in pattern for character in _PATTERN_CHARACTERS) and not as_path(pattern).exists():
            matches = [match for match in _matches(pattern) if match.endswith(tuple(suffixes))]
            if not matches:
                raise DataError(f"{pattern}: matches no file that ends in {', '.join(suffixes)}.")
        else:
            require_file(as_path(pattern))
            matches = [os.fspath(as_path(pattern))]
        for match in matches:
            if not match.endswith(tuple(suffixes)):
                raise DataError(f"{match}: its name ends in none of {', '.join(suffixes)}.")
            found[match] = None
    return list(found)


def identity(path: str) -> tuple[str, int, int]:
    """(absolute path, bytes, time of change in ns): other content under the same path has another identity."""
    if is_remote(path):
        status = as_path(path).stat()
        return path, int(status.length), int(status.mtime or 0) * 10**9
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _matches(pattern: str) -> list[str]:
    if not is_remote(pattern):
        found = glob.glob(os.path.expanduser(pattern), recursive=True)
        return sorted(match for match in found if os.path.isfile(match))
    scheme, _, rest = pattern.partition("://")
    bucket, _, below = rest.partition("/")
    return sorted(os.fspath(match) for match in as_path(f"{scheme}://{bucket}").glob(below) if not match.is_dir())


def _instead(file: epath.Path) -> str:
    """A hint for a missing file: the nearest name in its folder, or which folder above it is missing."""
    folder = file.parent
    if not folder.exists():
        while folder.parent != folder and not folder.parent.exists():
            folder = folder.parent
        place = "" if os.path.isabs(folder) or is_remote(folder) else f" in {os.getcwd()}"
        return f" There is no folder {folder}{place}."
    names = [entry.name for entry in folder.iterdir()]
    close = difflib.get_close_matches(file.name, names, n=1, cutoff=0.4)
    return f" Did you mean {folder / close[0]}?" if close else ""
