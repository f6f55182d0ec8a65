"""The Grain pipeline: batches made ahead of time by a fixed number of threads, addressed by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxmoe.data.layouts import Batch

if TYPE_CHECKING:
    import grain

    from jaxmoe.data.mixture import Mixture

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4


class _BatchesByStep:
    """A Grain random-access source whose element i is the batch of step i."""

    def __init__(self, mixture: Mixture):
        self._mixture = mixture

    def __len__(self) -> int:
        return self._mixture.steps

    def __getitem__(self, step: Any) -> Batch:
        return self._mixture.batch(int(step))

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
