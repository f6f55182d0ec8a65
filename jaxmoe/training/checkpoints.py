"""Orbax checkpoints of a run: written while training goes on, read back bit for bit.

A checkpoint holds the arrays of a `TrainState` and a JSON object about them: format, configuration, where the data
stands, and a fingerprint of every array, so that damage is noticed rather than trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxmoe.storage import is_remote, read_json
from jaxmoe.training.errors import CheckpointError, is_no_space, no_space_left
from jaxmoe.training.state import TrainState
from jaxmoe.version import __version__

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
UNREADABLE_DIRECTORY = "unreadable_checkpoints"


class _UnreadableError(Exception):
    """What a checkpoint holds is not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: training goes on after this step.
      state: as it was saved.
      metadata: the JSON values given to `Checkpoints.save`.
    """

    step: int
    state: TrainState
    metadata: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run; a context manager that finishes the last write when it ends.

    Args:
      directory: of the checkpoints, local or gs://.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        import orbax.checkpoint as ocp

        directory = epath.Path(directory)
        self.directory = directory if is_remote(directory) else directory.absolute()  # Orbax refuses relative ones
        self._ocp = ocp
        with self._explained():
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def last_step(self) -> int | None:
        """Step of the newest checkpoint that is completely on disk."""
        steps = self._ocp.path.step.checkpoint_steps(self.directory) if self.directory.exists() else []
        return max(steps, default=None)

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint and returns; `state` may be donated right after.

        Args:
          step: steps done.
          state: of that step.
          metadata: JSON values to keep with it.

        Raises:
          CheckpointError: this write cannot begin, or the previous one failed; NoSpaceLeftError if for want of space.
        """
        arrays = _arrays(state)
        described = {
            name: {"dtype": str(array.dtype), "shape": list(array.shape), "fingerprint": int(fingerprint)}
            for (name, array), fingerprint in zip(arrays.items(), _fingerprints(arrays), strict=True)
        }
        about = {
            "format_version": FORMAT_VERSION, "jaxmoe": __version__, "step": step, **metadata, "arrays": described
        }
        args = self._ocp.args
        with self._explained():
            self._manager.save(
                step, args=args.Composite(state=args.StandardSave(_nested(arrays)), metadata=args.JsonSave(about))
            )

    def restore(self, like: TrainState) -> Restored | None:
        """The newest intact checkpoint; None if there is none at all.

        A checkpoint that is damaged, in that files are missing, cut or not what was written, is moved to the folder
        `unreadable_checkpoints` next to this one, with a warning, and the one before it is taken.

        Args:
          like: a state with the structure, shapes and placement that the run needs.

        Raises:
          CheckpointError: a checkpoint is of a newer format or of another model, the way to it fails (then nothing is
            moved), or all of those there are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._read(step, like)
            except (CheckpointError, MemoryError):
                raise
            except Exception as wrapper:
                error = _told(wrapper)
                if not _is_damage(error):
                    raise CheckpointError(
                        f"the checkpoint of step {step} in {self.directory} could not be read: {_first_line(error)}. "
                        "It does not look damaged, and nothing was moved; run again when that is mended."
                    ) from wrapper
                aside = self._move_aside(step)
                logger.warning(
                    "checkpoint of step %d in %s cannot be read (%s); it is now %s, and the one before it is taken",
                    step, self.directory, _first_line(error), aside,
                )  # fmt: skip
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read (steps {', '.join(map(str, steps))}, now in "
                f"{self.directory.parent / UNREADABLE_DIRECTORY}); run again to train from the beginning."
            )
        return None

    def raise_if_failed(self) -> None:
        """Raises what went wrong in a write that ended since the last call; does not wait."""
        with self._explained():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when the last write is complete, or raises what went wrong in it."""
        with self._explained():
            self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self.wait()
        with contextlib.suppress(Exception):
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of a write, in words that say what is still there."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            last = self.last_step
            if is_no_space(error):
                raise no_space_left(self.directory, last) from error
            kept = "there is none yet" if last is None else f"the last good one is of step {last}"
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory}: {_first_line(_told(error))}; {kept}. "
                "Run again to go on from there."
            ) from error

    def _read(self, step: int, like: TrainState) -> Restored:
        args = self._ocp.args
        about = self._manager.restore(step, args=args.Composite(metadata=args.JsonRestore()))["metadata"]
        _check_version(self.directory, step, about)
        wanted = _arrays(like)
        self._check_structure(step, about["arrays"], wanted)
        target = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in wanted.items()
        }
        nested = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(_nested(target))))["state"]
        arrays = _flat(nested)
        arrays = {name: arrays[name] for name in wanted}
        for name, fingerprint in zip(arrays, _fingerprints(arrays), strict=True):
            if about["arrays"][name]["fingerprint"] != int(fingerprint):
                raise _UnreadableError(f"array {name} differs from what was written")
        return Restored(step=step, state=_state(arrays, like), metadata=about)

    def _check_structure(self, step: int, found: Mapping[str, Any], wanted: Mapping[str, jax.Array]) -> None:
        """Refuses a checkpoint of another model or optimizer."""
        old = {name: (tuple(array["shape"]), array["dtype"]) for name, array in found.items()}
        new = {name: (array.shape, str(array.dtype)) for name, array in wanted.items()}
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self.directory} is of another model: {name} is "
                    f"{_shape(old.get(name))} in it and {_shape(new.get(name))} in this configuration. "
                    "Take another folder for this configuration."
                )

    def _move_aside(self, step: int) -> epath.Path:
        aside = self.directory.parent / UNREADABLE_DIRECTORY
        aside.mkdir(parents=True, exist_ok=True)
        # Also because in an object store a folder is there only if something is in it.
        (aside / "README.txt").write_text("Checkpoints that could not be read. Nothing needs them any more.\n")
        name, number = str(step), 1
        while (aside / name).exists():
            number += 1
            name = f"{step}-{number}"
        (self.directory / str(step)).rename(aside / name)
        self._manager.reload()
        return aside / name


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
    try:
        about = read_json(directory / str(step) / "metadata" / "metadata")
    except (OSError, ValueError):
        return
    if isinstance(about, dict) and "format_version" in about:
        _check_version(directory, step, about)


def _check_version(directory: epath.Path, step: int, about: Mapping[str, Any]) -> None:
    version = about["format_version"]
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint of step {step} in {directory} has format {version}, written by jaxmoe "
            f"{about.get('jaxmoe', 'of a later version')}; jaxmoe {__version__} reads formats up to "
            f"{FORMAT_VERSION}. Install the newer jaxmoe, or take another folder."
        )


def _told(error: BaseException) -> BaseException:
    """What Orbax wraps in a bare `Exception` while it reads an array: the error that says what happened."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_damage(error: BaseException) -> bool:
    """Whether an error says that files are missing, cut or changed, not that this machine could not read them."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    if isinstance(error, _UnreadableError | KeyError | json.JSONDecodeError | UnicodeDecodeError):
        return True
    of_the_system = re.search(r"OS error (\d+)", str(error))  # TensorStore has errors of the system as text
    if of_the_system is not None and int(of_the_system[1]) != errno.ENOENT:
        return False
    return str(error).startswith(("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION"))


def _shape(described: tuple[tuple[int, ...], str] | None) -> str:
    if described is None:
        return "absent"
    shape, dtype = described
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


# --------------------------------------------------------------------------- a state as named arrays and back


def _name(path: tuple) -> str:
    """`params/stacks/0/blocks/0/mlp/down`: where a leaf stands in the state."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")


def _arrays(state: TrainState) -> dict[str, jax.Array]:
    """The leaves of a state by name; random keys as the numbers they are made of."""
    return {
        _name(path): jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _state(arrays: Mapping[str, jax.Array], like: TrainState) -> TrainState:
    """The inverse of `_arrays`, in the structure of `like`."""

    def leaf(path: tuple, old: jax.Array) -> jax.Array:
        new = arrays[_name(path)]
        is_key = jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if is_key else new

    return jax.tree_util.tree_map_with_path(leaf, like)


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Names with slashes as nested dictionaries."""
    root: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        place = root
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = array
    return root


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `_nested`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(_flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _fingerprints(arrays: Mapping[str, jax.Array]) -> np.ndarray:
    """(arrays,) uint32, one for each, computed where the arrays are."""
    return np.asarray(_fingerprint_all(list(arrays.values())))


@jax.jit
def _fingerprint_all(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_fingerprint(array) for array in arrays])


def _fingerprint(array: jax.Array) -> jax.Array:
    """Sum of bits times odd numbers by place, modulo 2^32: any one changed element, or two exchanged, shows."""
    width = array.dtype.itemsize * 8
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    places = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
    return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)
