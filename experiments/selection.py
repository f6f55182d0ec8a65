"""Which members of an experiment file to run: the argument after `path.py:`."""

from __future__ import annotations

import ml_collections

from jaxmoe.config import ConfigError, nearest


def select_members(config: ml_collections.ConfigDict, selection: str) -> ml_collections.ConfigDict:
    """`config` with only the members that `selection` names; all of them if it is empty.

    Args:
      config: has `members`, each with an optional tuple `slices`.
      selection: names of slices or members, joined with `+`.

    Raises:
      ConfigError: a name is neither a slice nor a member; the message gives the nearest.
    """
    if not selection:
        return config
    slices = {name for member in config.members.values() for name in member.get("slices", ("main",))}
    chosen = set()
    for name in selection.split("+"):
        if name not in slices and name not in config.members:
            raise ConfigError(f"{name!r} is neither a slice nor a member.{nearest(name, slices | set(config.members))}")
        chosen |= {
            key for key, member in config.members.items() if key == name or name in member.get("slices", ("main",))
        }
    config.members = {key: member for key, member in config.members.items() if key in chosen}
    return config
