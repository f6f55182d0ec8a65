"""Records: every number of a study, one flat JSON object per evaluation.

A record says what was measured (evaluation, source, split, step), on what (the member, its size and settings) and
how (configuration hash, versions, device, share of dropped assignments). Writing one again replaces it, so an
evaluation that a kill interrupted can simply be done again.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import typing
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from jaxmoe.config import nearest
from jaxmoe.run_files import RECORDS_DIRECTORY
from jaxmoe.storage import read_json, write_json
from jaxmoe.version import __version__

EARLIER_RECORDS_DIRECTORY = "earlier_records"

Record = dict[str, Any]
"""One flat JSON object of strings, numbers and nulls; `expert_load`, a list for each layer, is the one exception."""

Evaluation = Literal["training", "validation", "task", "generation", "test_time", "reward"]
EVALUATIONS: tuple[str, ...] = typing.get_args(Evaluation)

IDENTITY_FIELDS: dict[str, type | tuple[type, ...]] = {
    "study": str,
    "member": str,
    "arm": str,
    "slices": str,
    "seed": int,
    "evaluation": str,
    "source": str,
    "split": str,
    "step": int,
    "tokens": int,
    "total_parameters": int,
    "active_parameters": int,
    "flops_per_token": int,
    "tokens_per_parameter": float,
    "sparsity": float,
    "num_experts": int,
    "experts_per_token": int,
    "learning_rate": float,
    "init_std": float,
    "config_hash": str,
    "device": str,
    "dropped_fraction": (float, type(None)),
}
"""Fields that every record has, with their types; `version_*` and the measured numbers come on top."""


def make_record(identity: Mapping[str, Any], numbers: Mapping[str, Any]) -> Record:
    """One record: NumPy and JAX scalars become Python ones, numbers that are not finite become None.

    Args:
      identity: the fields of `IDENTITY_FIELDS` and the versions.
      numbers: what was measured.

    Raises:
      ValueError: a field is missing, has another type, is given twice, or a value is not a scalar.
    """
    twice = sorted(set(identity) & set(numbers))
    if twice:
        raise ValueError(f"record fields {', '.join(twice)} are given both as identity and as a measured number.")
    record = {name: _plain(name, value) for name, value in {**identity, **numbers}.items()}
    validate_record(record)
    return record


def validate_record(record: Mapping[str, Any]) -> None:
    """Checks a record against the schema.

    Raises:
      ValueError: the message names the field, its value and what is accepted.
    """
    for name, kind in IDENTITY_FIELDS.items():
        if name not in record:
            raise ValueError(f"record without field {name!r}; it has {', '.join(sorted(record))}.")
        value = record[name]
        accepted = (int, float) if kind is float else kind
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise ValueError(f"record field {name}={value!r} is a {type(value).__name__}; a {kind} is needed.")
    if record["evaluation"] not in EVALUATIONS:
        raise ValueError(f"evaluation={record['evaluation']!r}.{nearest(str(record['evaluation']), EVALUATIONS)}")
    for name, value in record.items():
        if name == "expert_load":
            continue
        if value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(f"record field {name}={value!r} is a {type(value).__name__}; a record is flat.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"record field {name}={value!r}; a number that is not finite is written as null.")


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if name == "expert_load":
        return [[round(float(share), 7) for share in layer] for layer in np.asarray(value)]
    array = np.asarray(value)
    if array.ndim != 0 or array.dtype.kind not in "biuf":
        raise ValueError(f"record field {name}={value!r} is a {type(value).__name__}; a record holds scalars only.")
    plain = array.item()
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def record_file(record: Mapping[str, Any]) -> str:
    """The name of a record's file: `task-reasoning-test-00000600.json`."""
    source = urllib.parse.quote(str(record["source"]), safe="")
    return f"{record['evaluation']}-{source}-{record['split']}-{record['step']:08d}.json"


def write_record(directory: epath.PathLike, record: Mapping[str, Any]) -> epath.Path:
    """Writes a record, atomically, to `directory`/records/; an older one of the same name is replaced.

    Args:
      directory: the member's run directory.
      record: as `make_record` returns it.

    Raises:
      ValueError: the record breaks the schema; nothing is written.
    """
    validate_record(record)
    path = epath.Path(directory) / RECORDS_DIRECTORY / record_file(record)
    write_json(path, record)
    return path


def write_records(directory: epath.PathLike, records: Iterable[Mapping[str, Any]]) -> list[epath.Path]:
    """`write_record` of each."""
    return [write_record(directory, record) for record in records]


def named_numbers(records: Iterable[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """What records measured, by `EVALUATION/SOURCE/SPLIT/FIELD`, such as `task/reasoning/test/accuracy`."""
    return {
        "/".join([record["evaluation"], record["source"], record["split"], field]): value
        for record in records
        for field, value in record.items()
        if field not in IDENTITY_FIELDS and isinstance(value, float | int | None)
    }


def set_aside(directory: epath.PathLike, config_hash: str) -> int:
    """Moves records of other configurations to `earlier_records/HASH/`, so that `records/` holds those of one.

    Args:
      directory: the member's run directory.
      config_hash: of the configuration whose records stay.

    Returns:
      How many were moved.
    """
    directory = epath.Path(directory)
    folder = directory / RECORDS_DIRECTORY
    moved = 0
    for path in sorted(folder.glob("*.json")) if folder.exists() else ():
        found = read_json(path).get("config_hash", "unknown") if not path.name.startswith(".") else config_hash
        if found != config_hash:
            aside = directory / EARLIER_RECORDS_DIRECTORY / str(found)
            aside.mkdir(parents=True, exist_ok=True)
            path.replace(aside / path.name)
            moved += 1
    return moved


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes the numbers, as `version_*` fields."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    found = {f"version_{package}": importlib.metadata.version(package) for package in packages}
    return {"version_jaxmoe": __version__, "version_python": platform.python_version(), **found}


@functools.cache
def device_description() -> str:
    """The devices of this process group, such as `cpu x1` or `tpu v5p x8`."""
    import jax

    devices = jax.devices()
    kind = devices[0].device_kind
    platform_name = devices[0].platform
    name = kind if platform_name in kind.lower() else f"{platform_name} {kind}"
    return f"{name} x{len(devices)}"
