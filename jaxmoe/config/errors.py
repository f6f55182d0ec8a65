"""The error of a configuration that cannot be run, and the checks that raise it."""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Iterable
from typing import Any, Literal


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


def require_positive_or_none(owner: object, *names: str) -> None:
    """Raises ConfigError for the first of the attributes that is neither > 0 nor None."""
    for name in names:
        value = getattr(owner, name)
        require(value is None or value > 0, f"{name}={value}; it must be positive, or None.")


def require_non_negative(owner: object, *names: str) -> None:
    """Raises ConfigError for the first of the attributes that is < 0."""
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, f"{name}={value}; it must not be negative.")


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ConfigError unless the value of `name` is one of the choices."""
    require(value in choices, f"{name}={value!r}; choose one of {', '.join(map(repr, choices))}.")


def require_declared(owner: object) -> None:
    """Raises ConfigError for the first field whose value is none of its `Literal`'s, or one string for several.

    So that a configuration that is built in Python is checked as one that `from_dict` builds.
    """
    for name, hint in _hints(type(owner)).items():
        if typing.get_origin(hint) is Literal:
            require_choice(name, getattr(owner, name), typing.get_args(hint))
        elif typing.get_origin(hint) is tuple:
            value = getattr(owner, name)
            require(not isinstance(value, str), f"{name}={value!r}; a list of strings is needed.")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def nearest(name: str, known: Iterable[str], *, count: int = 1) -> str:
    """` Did you mean 'x'?` for the closest known names, at most `count`; else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else f" Known: {', '.join(known)}."
