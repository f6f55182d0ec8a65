"""How a run ended, bit for bit: its last checkpoint as plain arrays, where its data stand, and its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxmoe.run_files import RECORDS_DIRECTORY
from jaxmoe.storage import as_path, read_json
from jaxmoe.training import CHECKPOINT_DIRECTORY, METRICS_FILE

_PARTS = {"params": "parameters", "others": "parameters", "opt_state": "optimizer state"}
_COUNTERS = "counters and random key"


def newest_checkpoint(directory: epath.PathLike) -> int | None:
    """Step of the newest complete checkpoint of a run directory; None if there is none."""
    import orbax.checkpoint as ocp

    folder = as_path(directory) / CHECKPOINT_DIRECTORY
    return max(ocp.path.step.checkpoint_steps(folder) if folder.exists() else (), default=None)


def unfinished_checkpoint(directory: epath.PathLike) -> str | None:
    """Name of a checkpoint in a run directory that is being written, or whose writing was cut off; None if there is
    none.
    """
    import orbax.checkpoint as ocp

    folder = as_path(directory) / CHECKPOINT_DIRECTORY
    if not folder.exists():
        return None
    complete = {str(step) for step in ocp.path.step.checkpoint_steps(folder)}
    names = [path.name for path in folder.iterdir()]
    return next((name for name in sorted(names) if name[0].isdigit() and name not in complete), None)


def differences(first: epath.PathLike, second: epath.PathLike) -> dict[str, list[str]]:
    """Compares the ends of two runs.

    Args:
      first, second: run directories with a checkpoint each.

    Returns:
      By part (parameters, optimizer state, counters and random key, data position, metrics.jsonl, records), what
      differs: names of arrays or files; empty where every bit is the same.
    """
    first, second = as_path(first), as_path(second)
    found: dict[str, list[str]] = {name: [] for name in (*dict.fromkeys(_PARTS.values()), _COUNTERS)}
    arrays, others = _arrays(first), _arrays(second)
    for name in sorted(arrays.keys() | others.keys()):
        if not _same(arrays.get(name), others.get(name)):
            found[_PARTS.get(name.split("/")[0], _COUNTERS)].append(name)
    found["data position"] = _differing(_data_position(first), _data_position(second))
    logs = [_content(directory / METRICS_FILE) for directory in (first, second)]
    found[METRICS_FILE] = [] if logs[0] == logs[1] else [_first_difference(*logs)]
    found["records"] = _differing(_records(first), _records(second))
    return found


def _arrays(directory: epath.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, on the host, whatever devices it was on."""
    import jax
    import orbax.checkpoint as ocp

    path = directory / CHECKPOINT_DIRECTORY / str(newest_checkpoint(directory)) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        structure = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf) for place, leaf in leaves}


def _same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    """Whether two arrays are the same bits; NaN is itself."""
    if first is None or second is None:
        return False
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def _data_position(directory: epath.Path) -> dict[str, Any]:
    step = newest_checkpoint(directory)
    return read_json(directory / CHECKPOINT_DIRECTORY / str(step) / "metadata" / "metadata")["data"]


def _records(directory: epath.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / RECORDS_DIRECTORY).glob("*.json")}


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]


def _content(path: epath.Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _first_difference(first: bytes, second: bytes) -> str:
    """Where two logs part: `line 12`."""
    lines, others = first.splitlines(), second.splitlines()
    same = next((n for n, (a, b) in enumerate(zip(lines, others)) if a != b), min(len(lines), len(others)))
    return f"line {same + 1} ({len(lines)} and {len(others)} lines)"
