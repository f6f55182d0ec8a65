"""Whole files, on a disk or in an object store: a reader, or a kill, never meets half of one."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from typing import Any

from etils import epath
from etils.epath.backend import fsspec_backend

from jaxmoe.config import ConfigError
from jaxmoe.storage_faults import first_line, is_storage_fault

logger = logging.getLogger(__name__)


def as_path(path: epath.PathLike) -> epath.Path:
    """`path` as an `epath.Path`, `~` expanded.

    What this process remembers of buckets is forgotten, so that what others have written there since is seen.

    Raises:
      ConfigError: a gs:// path without the package that reads and writes it.
    """
    text = os.path.expanduser(os.fspath(path))
    if text.startswith("gs://"):
        try:
            import gcsfs  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"{text}: gs:// needs `pip install 'jaxmoe[gcs]'` ({error}).") from error
        fsspec_backend.fs(text).invalidate_cache()
    return epath.Path(text)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names an object store, such as gs://, which has no folders, appending or memory maps."""
    return "://" in os.fspath(path)


def write_bytes(path: epath.PathLike, content: bytes, *, patience: float = 300.0) -> None:
    """Writes a whole file; an older one stays as it was until this one is complete.

    On a disk the content goes to a hidden file of the same folder, which then takes the name. In an object store
    an object appears when it is complete, so it is written under its own name; a store that does not answer is
    asked again, after longer and longer pauses.

    Args:
      path: local or gs://; folders above it are made.
      content: of the file.
      patience: seconds for which an object store is asked again, beyond what its client does by itself.

    Raises:
      OSError: it cannot be written; no rest of it stays.
    """
    path = epath.Path(path)
    if is_remote(path):
        _write_object(path, content, time.monotonic() + patience)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines may share the folder, so the process id alone is not a name of its own.
    unfinished = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_object(path: epath.Path, content: bytes, until: float) -> None:
    pause = 1.0
    while True:
        try:
            path.write_bytes(content)
            return
        except Exception as error:
            if not is_storage_fault(error) or time.monotonic() >= until:
                raise
            logger.warning("%s could not be written (%s); trying again in %.0f s", path, first_line(error), pause)
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def write_text(path: epath.PathLike, text: str, *, patience: float = 300.0) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode(), patience=patience)


def write_json(path: epath.PathLike, value: Any) -> None:
    """`write_text` of indented JSON; keys keep their order.

    Raises:
      ValueError: a number in `value` is not finite; nothing is written.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: epath.PathLike) -> Any:
    """The value in a JSON file.

    Raises:
      ValueError: it is not JSON; the path is named.
      OSError: it cannot be read.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
