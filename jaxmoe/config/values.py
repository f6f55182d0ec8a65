"""Configurations from and to plain values: strict, with the dotted path of a mistake in its message."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from jaxmoe.config.data import SOURCE_KINDS, SourceConfig
from jaxmoe.config.errors import ConfigError, nearest, require_choice

T = TypeVar("T")


NOT_IDENTITY = types.MappingProxyType({"identity": False})
"""Metadata of a field that `config_hash` leaves out: no number of a training or its evaluation depends on it."""

IF_GIVEN = types.MappingProxyType({"identity": "if given"})
"""Metadata of an optional field that `to_dict` leaves out where it is None: runs without it keep their hash."""


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, without fields of `IF_GIVEN` that are None.

    `from_dict` of it gives an equal configuration.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            values = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
            return {
                field.name: plain(item)
                for field, item in values.items()
                if item is not None or field.metadata != IF_GIVEN
            }
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return value

    return plain(config)


def config_hash(config: Any) -> str:
    """First 16 hex digits of the SHA-256 of the configuration's canonical JSON, without fields of `NOT_IDENTITY`."""
    canonical = json.dumps(_identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _identity(value: Any) -> Any:
    """`to_dict` without the fields of `NOT_IDENTITY`."""
    if not dataclasses.is_dataclass(value):
        return to_dict(value)
    fields = [field.name for field in dataclasses.fields(value) if field.metadata != NOT_IDENTITY]
    return {name: _identity(getattr(value, name)) for name in fields}


def from_dict(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds a configuration dataclass from nested plain values, strictly.

    Args:
      kind: the dataclass, `RunConfig` or one of its sections.
      values: by field name; nested sections are mappings.
      path: where `values` stands, for messages.

    Raises:
      ConfigError: an unknown key (with the nearest known one), a missing key, a value of another type, or a
        value the dataclass refuses; the message starts with the dotted path.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {prefix}{key!s}.{nearest(str(key), fields)}")
    built = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in built:
            raise ConfigError(f"{prefix}{name} is missing.")
    try:
        return kind(**built)
    except ConfigError as error:
        if path and not getattr(error, "located", False):
            error = ConfigError(f"{path}: {error}")
        error.located = True
        raise error from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `hint`, or a ConfigError that names `path`."""
    origin = typing.get_origin(hint)
    if hint == SourceConfig:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if kind not in SOURCE_KINDS:
            raise ConfigError(f"{path}.kind={kind!r}.{nearest(str(kind), SOURCE_KINDS)}")
        return from_dict(SOURCE_KINDS[kind], value, path)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [option for option in typing.get_args(hint) if option is not type(None)]
        return _convert(inner, value, path)
    if origin is Literal:
        require_choice(path, value, typing.get_args(hint))
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            keys = ", ".join(field.name for field in dataclasses.fields(hint))
            raise ConfigError(f"{path}={value!r}; a section with {keys} is needed.")
        return from_dict(hint, value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r}; a list of strings is needed.")
        return tuple(_convert(typing.get_args(hint)[0], item, path) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r}; a section of named entries is needed.")
        item = typing.get_args(hint)[1]
        return {str(key): _convert(item, entry, f"{path}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{path}={value!r} is not finite.")
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ConfigError(f"{path}={value!r} is a {type(value).__name__}; {getattr(hint, '__name__', hint)} is needed.")
