"""The description that every checkpoint has: its format, its step, and every array's type, shape and fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt32

from jaxmoe.storage import read_json
from jaxmoe.training.damage import DamageError
from jaxmoe.training.errors import CheckpointError
from jaxmoe.version import __version__

FORMAT_VERSION = 2


def description(step: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A description, with a checksum of itself.

    Args:
      step: of the state.
      metadata: JSON values; `arrays` as `described` says.
    """
    about = {"format_version": FORMAT_VERSION, "jaxmoe": __version__, "step": step, **metadata}
    return {**about, "checksum": _checksum(about)}


def described(arrays: Mapping[str, jax.Array], marks: UInt32[np.ndarray, " arrays"]) -> dict[str, dict[str, Any]]:
    """What a description says of every array, `marks` being their fingerprints."""
    return {
        name: {"dtype": str(array.dtype), "shape": list(array.shape), "fingerprint": int(mark)}
        for (name, array), mark in zip(arrays.items(), marks, strict=True)
    }


def check_format(directory: epath.PathLike) -> None:
    """Checks that the newest checkpoint in a folder can be understood, by its description alone.

    A folder without checkpoints passes, and so does a damaged description, with which `Checkpoints.restore` deals.

    Args:
      directory: of the checkpoints; it need not be there.

    Raises:
      CheckpointError: it was written by a later jaxmoe.
    """
    import orbax.checkpoint as ocp

    directory = epath.Path(directory)
    step = max(ocp.path.step.checkpoint_steps(directory) if directory.exists() else (), default=None)
    if step is None:
        return
    with contextlib.suppress(OSError, ValueError, DamageError):
        check_description(directory, step, read_json(directory / str(step) / "metadata" / "metadata"))


def check_description(directory: epath.Path, step: int, about: Any) -> None:
    """Checks that a description is whole, and of a format that is known."""
    if not isinstance(about, dict) or not isinstance(about.get("format_version"), int):
        raise DamageError("its metadata are not a description of a checkpoint")
    own = {key: value for key, value in about.items() if key != "checksum"}
    whole = about.get("checksum") == _checksum(own)
    version = about["format_version"]
    if not whole and ("checksum" in about or version >= 2):
        raise DamageError("its metadata differ from what was written")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint of step {step} in {directory} has format {version}, written by jaxmoe "
            f"{about.get('jaxmoe', 'of a later version')}; jaxmoe {__version__} reads formats up to "
            f"{FORMAT_VERSION}. Install the newer jaxmoe, or take another folder."
        )


def check_structure(
    directory: epath.Path,
    step: int,
    found: Mapping[str, Any],
    wanted: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    *,
    partial: bool,
    cast: bool,
) -> None:
    """Refuses a checkpoint of another model or optimizer.

    Args:
      directory: of the checkpoints, and the step of this one, for the message.
      found: `arrays` of its description.
      wanted: what is to be read.
      partial, cast: as `Checkpoints.restore` has them.

    Raises:
      CheckpointError: an array is missing, too many, or of another shape or type.
    """
    old = {name: (tuple(array["shape"]), array["dtype"]) for name, array in found.items()}
    new = {name: (array.shape, str(array.dtype)) for name, array in wanted.items()}
    for name in new if partial else [*old, *new]:
        was, wants = old.get(name), new.get(name)
        if was == wants or (cast and was and wants and was[0] == wants[0] and _both_float(was[1], wants[1])):
            continue
        raise CheckpointError(
            f"the checkpoint of step {step} in {directory} is of another model: {name} is "
            f"{_shape(was)} in it and {_shape(wants)} in this configuration. "
            "Take another folder for this configuration."
        )


def _checksum(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _both_float(*names: str) -> bool:
    return all(jax.numpy.issubdtype(np.dtype(name), np.floating) for name in names)


def _shape(described: tuple[tuple[int, ...], str] | None) -> str:
    if described is None:
        return "absent"
    shape, dtype = described
    return f"{dtype}[{', '.join(map(str, shape))}]"
