"""Teacher-forced evaluation of rows: the loss and the greedy prediction at every position, without dropping.

B rows, S sequence, D width, V vocabulary, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import ModelConfig
from jaxmoe.layers import RouterStatistics
from jaxmoe.layers.self_attention import row_multiple
from jaxmoe.liveness import beat
from jaxmoe.models import Decoder, dropless
from jaxmoe.sharding import RULES, Partitioning, constrain, partitioning_in_use, placed, use_partitioning

SHORTEST_ROW = 16

ELEMENTS = 1 << 25
"""Rows are taken together only as far as attention scores and logits stay under this many numbers (128 MiB)."""


class Evaluator:
    """A model as it is evaluated: no capacity limit and no bounded buffer in any MoE layer, compiled once a shape.

    Made where a partitioning is in use, it takes the model's parameters spread so, and spreads batches.

    Members that differ in nothing but the seed share what is compiled.

    Attributes:
      config: of the model.
      statistics: the routers' statistics summed over the rows evaluated so far; None before, and for dense models.
    """

    def __init__(self, model: Decoder):
        self.config: ModelConfig = model.config
        self.graphdef, self.state = nnx.split(dropless(model))
        self.statistics: RouterStatistics | None = None
        self._partitioning = partitioning_in_use()

    @property
    def shortest_row(self) -> int:
        """The length that shorter rows are padded to: `SHORTEST_ROW`, or what the model's attention can do."""
        context = 1 if self._partitioning is None else self._partitioning.size("context")
        return max(SHORTEST_ROW, row_multiple(self.config.attention, context))

    def rows_together(self, rows: int, sequence_length: int) -> int:
        """How many rows of that length to evaluate at once: `rows`, or the power of two that memory allows."""
        per_row = sequence_length * max(self.config.num_heads * sequence_length, self.config.vocab_size)
        devices = 1 if self._partitioning is None else self._partitioning.size(*RULES["batch"])
        allowed = max(1, devices * ELEMENTS // per_row)
        return rows if rows <= allowed else 1 << (allowed.bit_length() - 1)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> tuple[Float[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
        """Loss and correctness of every predicted position.

        Args:
          batch: `inputs`, `targets`, `segment_ids` (B, S) int32; segment 0 is padding.

        Returns:
          nats per position, and whether the likeliest token is the target; 0 and False on padding.

        Raises:
          RuntimeError: an assignment was left out, which without capacity limit and bounded buffers none can be.
        """
        arrays = {
            name: placed(batch[name], self._partitioning, "batch", "sequence")
            for name in ("inputs", "targets", "segment_ids")
        }
        loss, correct, statistics = _compiled(self._partitioning)(self.graphdef, self.state, arrays)
        if statistics is not None:
            statistics = jax.device_get(statistics)
            left_out = float(np.sum(statistics.dropped) + np.sum(statistics.overflowed))
            if left_out:
                raise RuntimeError(
                    f"an evaluation left out {left_out:.0f} expert assignments, though `dropless` has room for all."
                )
            self.statistics = statistics if self.statistics is None else self.statistics + statistics
        return np.asarray(loss), np.asarray(correct)

    @property
    def dropped_fraction(self) -> float:
        """Share of the expert assignments that were dropped: 0, since `__call__` refuses anything else."""
        if self.statistics is None:
            return 0.0
        return float(np.sum(self.statistics.dropped) / max(np.sum(self.statistics.expert_count), 1.0))


@functools.cache
def _compiled(partitioning: Partitioning | None) -> Callable[..., Any]:
    """`_evaluate` for a partitioning, with results that every process has."""
    if partitioning is None:
        return jax.jit(_evaluate, static_argnums=0)

    def evaluate(graphdef, state, batch):
        with use_partitioning(partitioning):
            return _evaluate(graphdef, state, batch)

    return jax.jit(evaluate, static_argnums=0, out_shardings=partitioning.sharding((), ()))


def _evaluate(
    graphdef: Any, state: Any, batch: Mapping[str, Int[Array, "B S"]]
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"], RouterStatistics | None]:
    model: Decoder = nnx.merge(graphdef, state)
    hidden, statistics = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"])
    rows, length, width = hidden.shape
    partitioning = partitioning_in_use()
    # On a mesh, chunks are of the sequence, so that every device has its rows of each.
    divisible = rows * length if partitioning is None else length
    devices = 1 if partitioning is None else partitioning.size(*partitioning.mesh_axes("batch", rows))
    chunks = _divisor_at_least(divisible, -(-rows * length * model.config.vocab_size // (devices * ELEMENTS)))

    def predict(chunk):
        hidden, targets = chunk
        logits = model.head(hidden)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - target_logits, jnp.argmax(logits, axis=-1) == targets

    if partitioning is None:
        divided = hidden.reshape(chunks, -1, width), batch["targets"].reshape(chunks, -1)
        loss, correct = (x.reshape(rows, length) for x in jax.lax.map(predict, divided))
    else:
        whole = constrain(hidden, "batch", None, None), constrain(batch["targets"], "batch", None)
        divided = [x.reshape(rows, chunks, -1, *x.shape[2:]).swapaxes(0, 1) for x in whole]
        loss, correct = (x.swapaxes(0, 1).reshape(rows, length) for x in jax.lax.map(predict, divided))
    real = batch["segment_ids"] != 0
    return jnp.where(real, loss, 0.0), correct & real, statistics


def _divisor_at_least(number: int, least: int) -> int:
    """The smallest divisor of `number` that is >= least."""
    return next(divisor for divisor in range(min(least, number), number + 1) if number % divisor == 0)


def batches_of(count: int, rows: int) -> Iterator[tuple[np.ndarray, int]]:
    """0..count-1 in groups of exactly `rows`: indices, and how many of them count. The last group repeats item 0."""
    for start in range(0, count, rows):
        beat()
        present = min(rows, count - start)
        yield np.concatenate([np.arange(start, start + present), np.zeros(rows - present, np.int64)]), present
