"""A run directory belongs to one configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from jaxmoe.config import ConfigError, RunConfig, to_dict

CONFIG_FILE = "config.json"
Resume = Literal["auto", "force"]

_SHOWN_DIFFERENCES = 20


def claim_directory(directory: epath.PathLike, run: RunConfig, resume: Resume = "auto") -> None:
    """Writes `run` to the directory's config.json, or checks that it is the one already there.

    Args:
      directory: of the run; made if it is not there.
      run: the configuration about to be trained in it.
      resume: `force` accepts another configuration than the directory's, and replaces it.

    Raises:
      ConfigError: the directory is another configuration's; every difference is listed.
    """
    path = epath.Path(directory) / CONFIG_FILE
    wanted = to_dict(run)
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); restore it, or take another folder.") from error
        if found == json.loads(json.dumps(wanted)):
            return
        if resume != "force":
            raise ConfigError(
                f"{directory} belongs to another configuration:\n{describe_differences(found, wanted)}\n"
                "Give --resume=force to go on in it with the new one, or take another folder."
            )
    _write_json(path, wanted)


def describe_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The keys in which two configurations differ, one to a line, with both values."""
    old, new = _flat(found), _flat(wanted)
    lines = [
        f"  {key}: {_shown(old, key)} in the folder, {_shown(new, key)} now"
        for key in [*old, *(key for key in new if key not in old)]
        if key not in old or key not in new or old[key] != new[key]
    ]
    left_out = len(lines) - _SHOWN_DIFFERENCES
    return "\n".join(lines[:_SHOWN_DIFFERENCES] + ([f"  and {left_out} more"] if left_out > 0 else []))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "nothing"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _write_json(path: epath.Path, value: Any) -> None:
    """Writes a whole file so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        unfinished.write_text(json.dumps(value, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
