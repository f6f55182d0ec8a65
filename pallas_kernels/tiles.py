"""Tile sizes of the Pallas kernels: from a table of what was measured on a chip, else by a kernel's own rule.

A table is a JSON file of entries, each for one operation, chip, dtype and *shape class*. The class of a shape is each
of its sizes (rows per group, widths; every `Tiling` names its own) rounded up to a power of two. Three places are
looked at, and the first with an entry counts:

1. the file that the environment variable `PALLAS_KERNELS_TILES` names; else, if it is there,
   `$XDG_CACHE_HOME/pallas_kernels/tiles.json` (`~/.cache` by default), where `python -m pallas_kernels.tune` writes;
2. `tiles.json` beside this module;
3. the rule, which has a tile for every shape.

An entry's tile that is larger than the array is cut to it. If it still does not suit the shape or the chip's memory,
the entry is passed over with a line in the log, and the next place decides. A process reads each file once.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

ENVIRONMENT_VARIABLE = "PALLAS_KERNELS_TILES"
PACKAGED = pathlib.Path(__file__).with_name("tiles.json")

_logger = logging.getLogger(__name__)


class Misfit(ValueError):
    """A tile that a kernel cannot run with; the message says why."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the tile of one operation is chosen.

    Attributes:
      operation: its name in the tables.
      tile: a NamedTuple of integers.
      rule: from `itemsize`, `chip` and the sizes, as keywords, to a tile; None where the operation has to run without
        this kernel.
      fitted: from a tile, `itemsize`, `chip` and the sizes to the tile cut to the arrays; raises `Misfit`.
    """

    operation: str
    tile: type
    rule: Callable[..., Any]
    fitted: Callable[..., Any]

    def choose(self, dtype, chip: str | None, **sizes: int):
        """The tile for these sizes; None where the rule has none."""
        itemsize = jnp.dtype(dtype).itemsize
        tried = _tried.get().get(self.operation)
        if tried is not None:
            return self.fitted(self.tile(**tried), itemsize=itemsize, chip=chip, **sizes)
        for path in _tables():
            entry = _entries(path).get(_key(self.operation, chip, dtype, sizes))
            if entry is None:
                continue
            try:
                return self.fitted(self.tile(**entry), itemsize=itemsize, chip=chip, **sizes)
            except (Misfit, TypeError) as error:
                _log_once(f"{path}: the tile {dict(entry)} of {self.operation} on {chip} is passed over: {error}")
        return self.rule(itemsize=itemsize, chip=chip, **sizes)

    def candidates(self, dtype, chip: str | None, **sizes: int) -> list[dict[str, int]]:
        """Tiles worth measuring: the rule's, and those with one or two of its numbers halved or doubled that fit."""
        itemsize = jnp.dtype(dtype).itemsize
        first = self.rule(itemsize=itemsize, chip=chip, **sizes)
        if first is None:
            return []
        found = [first]
        for factors in itertools.product((1, 0.5, 2), repeat=len(first)):
            if len(first) - factors.count(1) > 2:
                continue
            scaled = self.tile(*(int(number * factor) or 1 for number, factor in zip(first, factors, strict=True)))
            with contextlib.suppress(Misfit):
                scaled = self.fitted(scaled, itemsize=itemsize, chip=chip, **sizes)
                if scaled not in found:
                    found.append(scaled)
        return [tile._asdict() for tile in found]


def shape_class(sizes: Mapping[str, int]) -> dict[str, int]:
    """Each size rounded up to a power of two."""
    return {name: 1 << (size - 1).bit_length() if size > 0 else 0 for name, size in sorted(sizes.items())}


def user_table() -> pathlib.Path | None:
    """Where `tune` writes and the lookup begins; None where there is no home to hold it and none is named."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return pathlib.Path(named)
    folder = cache_directory()
    return None if folder is None else folder / "tiles.json"


def cache_directory() -> pathlib.Path | None:
    """The user's folder for what this package measures and builds; None where there is no home to hold it."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = pathlib.Path.home() / ".cache"
        except RuntimeError:  # a user without an entry in the system's list, as in some containers
            return None
    return pathlib.Path(cache) / "pallas_kernels"


def write(path: pathlib.Path, entries: list[dict[str, Any]]) -> None:
    """Adds entries to a table, in place of those with the same key; the file is whole at any time.

    Args:
      path: made with its folder if it is not there.
      entries: each with `operation`, `chip`, `dtype`, `sizes`, `tile`, and what else is worth knowing.
    """
    kept = {_key_of(entry): entry for entry in _read(path)} if path.exists() else {}
    kept.update({_key_of(entry): entry for entry in entries})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    lines = ",\n".join(f"  {json.dumps(entry)}" for _, entry in sorted(kept.items(), key=lambda pair: str(pair[0])))
    temporary.write_text(f'{{"entries": [\n{lines}\n]}}\n')
    temporary.replace(path)
    _entries.cache_clear()


@contextlib.contextmanager
def trying(operation: str, tile: Mapping[str, int]) -> Iterator[None]:
    """What is traced inside takes this tile for the operation, or raises `Misfit`: for measuring."""
    token = _tried.set({**_tried.get(), operation: tile})
    try:
        yield
    finally:
        _tried.reset(token)


_tried: contextvars.ContextVar[Mapping[str, Mapping[str, int]]] = contextvars.ContextVar(
    "tried_tiles", default=types.MappingProxyType({})
)


def _tables() -> list[pathlib.Path]:
    user = user_table()
    if os.environ.get(ENVIRONMENT_VARIABLE) and not user.exists():
        raise ValueError(f"{ENVIRONMENT_VARIABLE} names {user}, which is not there.")
    return [user, PACKAGED] if user is not None and user.exists() else [PACKAGED]


def _key(operation: str, chip: str | None, dtype, sizes: Mapping[str, int]) -> tuple:
    return operation, chip, jnp.dtype(dtype).name, *shape_class(sizes).items()


def _key_of(entry: Mapping[str, Any]) -> tuple:
    return _key(entry["operation"], entry["chip"], entry["dtype"], entry["sizes"])


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text())["entries"]
        for entry in entries:
            _key_of(entry)
            if not all(isinstance(number, int) and number > 0 for number in entry["tile"].values()):
                raise ValueError(f"tile {entry['tile']} is not made of positive integers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is no table of tiles ({type(error).__name__}: {error}); {{"entries": [{{"operation": ..., '
            f'"chip": ..., "dtype": ..., "sizes": {{...}}, "tile": {{...}}}}]}} is expected.'
        ) from error
    return entries


@functools.cache
def _entries(path: pathlib.Path) -> dict[tuple, dict[str, int]]:
    return {_key_of(entry): entry["tile"] for entry in _read(path)}


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)
