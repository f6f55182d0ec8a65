"""Orbax checkpoints of a run: written while training goes on, read back bit for bit.

A checkpoint holds the arrays of a `TrainState` and a JSON object about them: format, configuration, where the data
stands, and a fingerprint of every array, so that damage is noticed rather than trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxmoe.config import TrainConfig
from jaxmoe.processes import alone, is_first, of_first, together
from jaxmoe.run_files import UNREADABLE_DIRECTORY
from jaxmoe.storage import is_remote
from jaxmoe.storage_faults import first_line, is_no_space
from jaxmoe.training.allocator import give_back_freed_memory
from jaxmoe.training.damage import DamageError, agreed_steps, finding, in_agreement
from jaxmoe.training.description import check_description, check_structure, described, description
from jaxmoe.training.errors import CheckpointError, no_space_left
from jaxmoe.training.fingerprints import fingerprints, fingerprints_of_save
from jaxmoe.training.host_copies import HostCopies
from jaxmoe.training.named_arrays import flat, named_arrays, nested, rebuilt
from jaxmoe.training.policies import Retention, quality_of
from jaxmoe.training.resharding import read_sharding, resharded
from jaxmoe.training.saving import Saver
from jaxmoe.training.state import TrainState

logger = logging.getLogger(__name__)

_SMALLEST_LIMIT = 64 * 2**20
_DATA_FILE_BYTES = 64 * 2**20  # of OCDBT, which holds a data file in memory until it is complete


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """How checkpoints lie in storage, and what is put up with there; see `TrainConfig`, where the defaults are told.

    Attributes:
      ocdbt: many arrays in few files (TensorStore's OCDBT), else a folder for each array.
      zarr3: version 3 of the zarr format for the arrays, else 2.
      chunk_bytes: arrays are cut into chunks of at most this size.
      max_missed_saves, patience_seconds: see `Saver`.
    """

    ocdbt: bool = True
    zarr3: bool = True
    chunk_bytes: int = 16 * 2**20
    max_missed_saves: int = 3
    patience_seconds: float = 60.0

    @classmethod
    def of(cls, train: TrainConfig) -> Storage:
        """As a run's configuration says."""
        return cls(
            ocdbt=train.checkpoint_ocdbt,
            zarr3=train.checkpoint_zarr3,
            chunk_bytes=train.checkpoint_chunk_bytes,
            max_missed_saves=train.max_missed_saves,
            patience_seconds=train.storage_patience_seconds,
        )


class Checkpoints:
    """The checkpoints of one run; a context manager that finishes the last write when it ends.

    Args:
      directory: of the checkpoints, local or gs://.
      retention: which of them stay; None: all.
      storage: how they lie there.
    """

    def __init__(self, directory: epath.PathLike, retention: Retention | None = None, storage: Storage | None = None):
        import orbax.checkpoint as ocp

        directory = epath.Path(directory)
        self.directory = directory if is_remote(directory) else directory.absolute()  # Orbax refuses relative ones
        self._ocp, self._storage, self._retention = ocp, storage or Storage(), retention
        self._manager, self._limit, self._copies = None, 0, HostCopies()
        with self._explained("opened"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._open(_SMALLEST_LIMIT)
        self._saver = Saver(
            str(self.directory), max(self._manager.all_steps(), default=None),
            max_missed=self._storage.max_missed_saves, patience=self._storage.patience_seconds,
        )  # fmt: skip

    @property
    def last_step(self) -> int | None:
        """Step of the newest checkpoint that is completely in storage."""
        return self._saver.last_step

    def save(
        self,
        step: int,
        state: TrainState,
        metadata: Mapping[str, Any],
        *,
        quality: float | None = None,
        first: Callable[[], None] | None = None,
        required: bool = False,
    ) -> None:
        """Starts to write a checkpoint and returns; `state` may be donated right after.

        Args:
          step: steps done.
          state: of that step.
          metadata: JSON values to keep with it.
          quality: by which the best checkpoints are chosen, smaller is better; None if it was not measured.
          first: called before anything is written, and before every further attempt.
          required: that it is not missed because the one before it takes long.

        Raises:
          CheckpointError: a write failed for good, or too many were missed (see `Saver`); NoSpaceLeftError if for
            want of space.
        """

        def begin() -> Callable[[], None]:
            arrays = named_arrays(state)
            copies = self._copies.of(arrays)
            marks = fingerprints_of_save(arrays, copies)

            def write() -> None:
                if first is not None:
                    first()
                self._write(step, copies, {**metadata, "arrays": described(copies, marks())}, quality)

            return write

        self._saver.save(step, begin, required=required)

    def restore(
        self, like: Any, *, strict: bool = False, partial: bool = False, cast: bool = False
    ) -> Restored | None:
        """The newest intact checkpoint; None if there is none at all.

        A checkpoint that is damaged, in that files are missing, cut or not what was written, is moved to the folder
        `unreadable_checkpoints` next to this one, with a warning, and the one before it is taken. Of several processes
        all take the same: what one finds damaged is damaged for all.

        Args:
          like: a state with the structure, shapes and placement that the run needs, of arrays or of
            `jax.ShapeDtypeStruct`s; on whatever devices, as many as there may be.
          strict: a damaged checkpoint is an error instead, and nothing is moved.
          partial: `like` may lack parts of what was saved (None in their place), which are not read.
          cast: floating-point arrays may have another type than was saved; they are converted.

        Raises:
          CheckpointError: a checkpoint is of a newer format or of another model, the way to it fails (then nothing is
            moved), or all of those there are damaged.
        """
        steps = agreed_steps(sorted(self._manager.all_steps(), reverse=True))
        damaged: dict[int, Exception] = {}
        for step in steps:
            try:
                restored = self._read(step, like, partial, cast)
            except (CheckpointError, MemoryError):
                raise
            except Exception as wrapper:
                if finding(wrapper) == "unreadable":
                    raise self._unreadable(step, wrapper) from wrapper
                if strict:
                    raise CheckpointError(
                        f"checkpoint {self.directory / str(step)} is damaged: {first_line(wrapper)}. Nothing was moved "
                        "(--strict_restore). Without --strict_restore it is set aside, and the one before it is taken."
                    ) from wrapper
                damaged[step] = wrapper
            else:
                self._set_aside(damaged)
                return restored
        if not steps:
            return None
        for step, wrapper in damaged.items():
            if finding(wrapper) != "damaged":  # if none can be read, it may be this program that cannot
                raise self._unreadable(step, wrapper) from wrapper
        self._set_aside(damaged)
        raise CheckpointError(
            f"none of the checkpoints in {self.directory} can be read (steps {', '.join(map(str, steps))}, now in "
            f"{self.directory.parent / UNREADABLE_DIRECTORY}); run again to train from the beginning."
        )

    def raise_if_failed(self) -> None:
        """Raises what went wrong for good in a write that ended since the last call; does not wait."""
        self._saver.raise_if_failed()

    def wait(self) -> None:
        """Returns when the last write is complete, or raises what went wrong in it."""
        self._saver.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self.wait()
        self._saver.abandon()
        with contextlib.suppress(Exception):
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            if is_no_space(error):
                raise no_space_left(self.directory, None) from error
            raise CheckpointError(f"{self.directory} could not be {what}: {first_line(error)}.") from error

    def _open(self, limit: int) -> None:
        """Opens Orbax's manager for arrays of which each, and all under way at once, take at most `limit` bytes."""
        if limit <= self._limit:
            return
        if self._manager is not None:
            self._manager.close()
        # Among some of the processes, even if it is all, Orbax agrees through JAX's coordination service; else through
        # the devices, which cannot be in a thread beside the training.
        several = {} if alone() else {"active_processes": set(range(jax.process_count()))}
        self._manager = self._opened(
            limit, self._ocp.options.MultiprocessingOptions(**several), self._retention
        )
        self._limit = limit

    @contextlib.contextmanager
    def _reader(self, limit: int) -> Iterator[Any]:
        """A manager that reads by itself: where this process meets damage, Orbax would have the others wait for it."""
        if alone():
            self._open(limit)
            yield self._manager
            return
        own = jax.process_index()
        by_itself = self._ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        with self._opened(limit, by_itself, retention=None) as manager:
            yield manager

    def _opened(self, limit: int, processes: Any, retention: Retention | None) -> Any:
        """An `orbax.checkpoint.CheckpointManager`, as `_open` and `_reader` say."""
        ocp = self._ocp
        arrays = ocp.handlers.PyTreeCheckpointHandler(
            save_concurrent_gb=limit / 1e9,
            save_device_host_concurrent_gb=limit / 1e9,
            restore_concurrent_gb=limit / 1e9,
            use_ocdbt=self._storage.ocdbt,
            use_zarr3=self._storage.zarr3,
            use_compression=False,  # parameters and moments do not shrink
            enable_pinned_host_transfer=True,  # where `HostCopies` are: no second copy
            multiprocessing_options=processes,
        )
        options = ocp.CheckpointManagerOptions(
            create=False,
            multiprocessing_options=processes,
            preservation_policy=None if retention is None else retention.policy(),
            best_fn=quality_of if retention is not None and retention.best else None,  # has the metrics written
            cleanup_tmp_directories=retention is not None,
            enable_async_checkpointing=False,  # `Saver` has a thread for it
        )
        return ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "state": arrays, "metadata": ocp.handlers.JsonCheckpointHandler(multiprocessing_options=processes),
            },
        )

    def _write(
        self, step: int, arrays: Mapping[str, jax.Array], metadata: Mapping[str, Any], quality: float | None
    ) -> None:
        """One attempt, in the thread of `Saver`."""
        args = self._ocp.args
        self._open(_limit(arrays))
        if step in self._ocp.path.step.checkpoint_steps(self.directory):
            return  # an earlier attempt failed only after that
        chunked = self._ocp.SaveArgs(chunk_byte_size=self._storage.chunk_bytes)
        self._manager.save(
            step,
            args=args.Composite(
                state=args.PyTreeSave(
                    nested(arrays),
                    save_args=nested(dict.fromkeys(arrays, chunked)),
                    ocdbt_target_data_file_size=max(_DATA_FILE_BYTES, self._storage.chunk_bytes),
                ),
                metadata=args.JsonSave(description(step, metadata)),
            ),
            metrics={"quality": quality},
            force=True,
        )

    def _read(self, step: int, like: Any, partial: bool, cast: bool) -> Restored:
        args = self._ocp.args
        wanted = named_arrays(like)
        with in_agreement(), give_back_freed_memory(), self._reader(_limit(wanted)) as reader:
            about = reader.restore(step, args=args.Composite(metadata=args.JsonRestore()))["metadata"]
            check_description(self.directory, step, about)
            check_structure(self.directory, step, about["arrays"], wanted, partial=partial, cast=cast)
            stored = flat(reader.item_metadata(step)["state"].tree)
            target = {
                name: jax.ShapeDtypeStruct(
                    array.shape, np.dtype(about["arrays"][name]["dtype"]),
                    sharding=read_sharding(array.shape, stored[name].storage.chunk_shape, array.sharding),
                )
                for name, array in wanted.items()
            }  # fmt: skip
            tree = nested(target)
            restore = args.PyTreeRestore(
                tree, restore_args=self._ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=partial
            )
            arrays = flat(reader.restore(step, args=args.Composite(state=restore))["state"])
            arrays = {name: arrays[name] for name in wanted}
        for name, fingerprint in zip(arrays, np.asarray(fingerprints(arrays)), strict=True):
            if about["arrays"][name]["fingerprint"] != int(fingerprint):
                raise DamageError(f"array {name} differs from what was written")
        for name, array in wanted.items():
            found = arrays[name]
            arrays[name] = resharded(found if found.dtype == array.dtype else found.astype(array.dtype), array.sharding)
        return Restored(step=step, state=rebuilt(arrays, like), metadata=about)

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint of step {step} in {self.directory} could not be read: {first_line(error)}. "
            "It does not look damaged, and nothing was moved; run again when that is mended."
        )

    def _set_aside(self, damaged: Mapping[int, Exception]) -> None:
        for step, error in damaged.items():
            logger.warning(
                "checkpoint of step %d in %s cannot be read (%s); it is now %s, and the one before it is taken",
                step, self.directory, first_line(error), self._move_aside(step),
            )  # fmt: skip

    def _move_aside(self, step: int) -> epath.Path:
        aside = self.directory.parent / UNREADABLE_DIRECTORY
        aside.mkdir(parents=True, exist_ok=True)
        # Also because in an object store a folder is there only if something is in it.
        (aside / "README.txt").write_text("Checkpoints that could not be read. Nothing needs them any more.\n")
        name, number = str(step), 1
        while of_first((aside / name).exists()):
            number += 1
            name = f"{step}-{number}"
        with together():
            if is_first():
                (self.directory / str(step)).rename(aside / name)
        self._manager.reload()
        self._saver.last_step = max(self._manager.all_steps(), default=None)
        return aside / name


def _limit(arrays: Mapping[str, Any]) -> int:
    """Bytes that may be under way between storage and devices, or the largest shard.

    A read holds up to three buffers of that size: chunks, what they are decoded into, and a copy for the device.
    """
    sizes = [
        int(np.prod(array.sharding.shard_shape(array.shape), dtype=np.int64)) * array.dtype.itemsize
        * len(array.sharding.addressable_devices)
        for array in arrays.values()
    ]  # fmt: skip
    return max(sum(sizes) // 24, max(sizes, default=0) + 1, _SMALLEST_LIMIT)
