"""The Grain pipeline: batches made ahead of time by a fixed number of threads, addressed by step."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from jaxmoe.data.layouts import Batch

if TYPE_CHECKING:
    import grain

    from jaxmoe.data.mixture import Mixture

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4

_POSITIONS_TOGETHER = 1 << 16
"""Batches are made together only as far as they have this many positions: a megabyte."""
_STEPS_TOGETHER = 16
_BLOCKS_KEPT = 2


class _BatchesByStep:
    """A Grain random-access source whose element i is the batch of step i.

    Small batches of many sources are made several steps at once: each source has its part of a few rows to do for
    every call, and would spend its time on calling.
    """

    def __init__(self, mixture: Mixture):
        self._mixture = mixture
        positions = mixture.batch_size * mixture.sequence_length
        self._together = max(1, min(_STEPS_TOGETHER, _POSITIONS_TOGETHER // positions))
        self._lock = threading.Lock()
        self._blocks: dict[int, Future[list[Batch]]] = {}

    def __len__(self) -> int:
        return self._mixture.steps

    def __getitem__(self, step: Any) -> Batch:
        if self._together == 1:
            return self._mixture.batch(int(step))
        number, place = divmod(int(step), self._together)
        return self._block(number)[place]

    def _block(self, number: int) -> list[Batch]:
        """The batches of steps `number * together` on, made by the thread that asks first."""
        with self._lock:
            block = self._blocks.get(number)
            first = block is None
            if first:
                block = self._blocks[number] = Future()
                while len(self._blocks) > _BLOCKS_KEPT:
                    del self._blocks[next(iter(self._blocks))]
        if first:
            start = number * self._together
            try:
                block.set_result(self._mixture.batches(start, min(self._together, self._mixture.steps - start)))
            except Exception as error:
                block.set_exception(error)
        return block.result()

    def __repr__(self) -> str:
        return f"batches of {', '.join(self._mixture.source_names)}"


def batch_iterator(mixture: Mixture, start_step: int = 0) -> grain.DatasetIterator[Batch]:
    """Batches of steps start_step, start_step + 1, ..., mixture.steps - 1.

    `PREFETCH_THREADS` threads keep `PREFETCH_BATCHES` batches ready, whatever the number of sources. The iterator's
    state is `{"next_index": step}`, the global step of the next batch, and can be set to any step; `close()` ends
    its threads.

    Raises:
      ValueError: start_step outside 0..mixture.steps.
    """
    import grain

    if not 0 <= start_step <= mixture.steps:
        raise ValueError(f"start_step={start_step}; the run has steps 0..{mixture.steps - 1}.")
    options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    iterator = iter(grain.MapDataset.source(_BatchesByStep(mixture)).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator
