"""Which members of an experiment file to run: the argument after `path.py:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from jaxmoe.config import ConfigError, nearest


def select_members(
    config: ml_collections.ConfigDict, selection: str, axes: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict:
    """`config` with only the members that `selection` names; all of them if it is empty.

    Args:
      config: has `members`, each with an optional tuple `slices`.
      selection: names joined with `+`. A name is a slice, a member (its key or its `name`), or with `axes` one or
        several conditions that must all hold, such as `k=2` or `d=512,k=2`.
      axes: short name -> dotted key of a member, such as `k` for `model.moe.experts_per_token`.

    Raises:
      ConfigError: a name is none of these; the message gives the nearest.
    """
    if not selection:
        return config
    chosen: set[str] = set()
    for name in selection.split("+"):
        chosen |= _meeting(config, name, axes or {}) if "=" in name else _named(config, name)
    config.members = {key: member for key, member in config.members.items() if key in chosen}
    return config


def _named(config: ml_collections.ConfigDict, name: str) -> set[str]:
    called = {
        key: {key, member.get("name", key), *member.get("slices", ("main",))} for key, member in config.members.items()
    }
    found = {key for key, names in called.items() if name in names}
    if not found:
        known = set().union(*called.values())
        raise ConfigError(f"{name!r} is neither a slice nor a member.{nearest(name, known, count=3)}")
    return found


def _meeting(config: ml_collections.ConfigDict, conditions: str, axes: Mapping[str, str]) -> set[str]:
    found = set(config.members)
    for condition in conditions.split(","):
        axis, _, value = condition.partition("=")
        if axis not in axes:
            raise ConfigError(f"{condition!r}: nothing is called {axis!r} here.{nearest(axis, axes)}")
        values = {key: _value(config, key, axes[axis]) for key in config.members}
        if value not in map(str, values.values()):
            known = ", ".join(map(str, sorted(set(values.values()))))
            raise ConfigError(f"{condition!r}: no member has it; {axis} is one of {known}.")
        found &= {key for key, each in values.items() if str(each) == value}
    if not found:
        raise ConfigError(f"{conditions!r}: no member meets all of it.")
    return found


def _value(config: ml_collections.ConfigDict, member: str, key: str) -> Any:
    """A value of a member, or of the sections where the member does not say."""
    for section in (config.members[member], config):
        for part in key.split("."):
            section = section.get(part) if isinstance(section, ml_collections.ConfigDict) else None
        if section is not None:
            return section
    return None
