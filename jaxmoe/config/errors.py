"""The error of a configuration that cannot be run, and the checks that raise it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, its value and what is accepted."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(owner: object, *names: str) -> None:
    """Raises ConfigError for the first of the attributes that is not > 0."""
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{name}={value}; it must be positive.")


def require_non_negative(owner: object, *names: str) -> None:
    """Raises ConfigError for the first of the attributes that is < 0."""
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, f"{name}={value}; it must not be negative.")


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known name, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
