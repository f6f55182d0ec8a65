"""Copies of a state in the memory of the hosts, from which a checkpoint is written while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from jaxmoe.training.allocator import open_room


class HostCopies:
    """Copies of one state after another, on one CPU device each written over the one before.

    An accelerator's runtime manages such memory itself. On CPU it is the C library's, and in `reuse_freed_memory`
    copies that are freed and made anew cost twice their size: the second ones spread over the heap, and into the hole
    that the temporary buffers of a step leave between steps, so that the next step takes as much again for its own.
    """

    def __init__(self):
        self._kept: dict[str, jax.Array] = {}
        self._copy_over: Callable[..., dict[str, jax.Array]] | None = None

    def of(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Copies of `arrays`, each shard on the host of its device; the arrays may be donated right after.

        The runtime keeps what a later, donating step would overwrite until it is read. Those returned before cannot be
        used any more; if anything still reads them, their memory is left alone and other memory taken.

        Args:
          arrays: of a state, with the same names, shapes and placement every time.
        """
        if self._copy_over is not None:
            self._kept = self._copy_over(dict(arrays), self._kept)
            return dict(self._kept)
        copies = {
            name: jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))
            for name, array in arrays.items()
        }
        devices = {device for array in arrays.values() for device in array.sharding.device_set}
        if len(devices) == 1 and next(iter(devices)).platform == "cpu":
            places = {name: copy.sharding for name, copy in copies.items()}
            self._kept = dict(copies)
            self._copy_over = jax.jit(
                lambda arrays, kept: arrays, donate_argnames="kept", keep_unused=True, out_shardings=places
            )
        open_room()  # which the copies were not to take
        return copies
