"""Processes that train one study must have been started alike: compared before anything is built or written."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jaxlib
from etils import epath

from jaxmoe.config import ConfigError, to_dict
from jaxmoe.processes import alone, is_first, told_by_all
from jaxmoe.scaling.quantities import flatten
from jaxmoe.scaling.study import Member
from jaxmoe.version import __version__

_SHOWN_DIFFERENCES = 10
_COMPARISONS = itertools.count()


def require_started_alike(workdir: epath.PathLike, members: Sequence[Member], **options: Any) -> None:
    """Checks that all processes have the same versions, folder, members and options; to be called by all.

    Args:
      workdir: of the study.
      members: those about to be trained, with their complete configurations, mesh included.
      options: of the command, as JSON values.

    Raises:
      ConfigError: in every process; for each that differs from the first, in what, with both values.
    """
    if alone():
        return
    versions = {"jaxmoe": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    configurations = {member.name: to_dict(member.config) for member in members}
    own = flatten(json.loads(json.dumps({**versions, "workdir": f"{workdir}", **options, "members": configurations})))
    key, text = f"started/{next(_COMPARISONS)}", json.dumps(own, sort_keys=True)
    if len(set(told_by_all(f"{key}/hash", hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first = json.loads(told_by_all(f"{key}/first", text if is_first() else "")[0])
    told = told_by_all(f"{key}/differences", _differences(first, own))
    listed = [f"process {process}: {differences}" for process, differences in enumerate(told) if differences]
    raise ConfigError("\n".join(["the processes of this run were not started alike:", *listed, "Start all alike."]))


def _differences(first: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """What differs, on one line; empty if nothing does."""
    differing = [key for key in {**first, **own} if first.get(key, _ABSENT) != own.get(key, _ABSENT)]
    shown = [
        f"{key} is {_shown(own, key)}, and {_shown(first, key)} in process 0" for key in differing[:_SHOWN_DIFFERENCES]
    ]
    more = len(differing) - len(shown)
    return "; ".join(shown + ([f"and {more} more"] if more else []))


_ABSENT = object()


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not there"
