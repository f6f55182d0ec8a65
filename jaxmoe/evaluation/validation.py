"""Validation loss: the training objective without auxiliary losses, on rows of one source and split.

B rows, S sequence.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxmoe.data import Source
from jaxmoe.evaluation.forward import Evaluator, batches_of
from jaxmoe.models import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationScore:
    """Losses of a set of rows; NaN where nothing has weight.

    Attributes:
      loss: nats per token weighted as in training (answers 1, prompts by `prompt_weight`).
      unweighted_loss: nats per token, prompts and answers alike.
      standard_error: of `loss`, over rows.
      rows, validation_tokens: counts; padding is no token.
      dropped_fraction: share of expert assignments dropped; 0, since evaluation has no capacity limit.
    """

    loss: float
    unweighted_loss: float
    standard_error: float
    rows: int
    validation_tokens: int
    dropped_fraction: float


def validation_loss(
    model: Decoder, source: Source, split: str = "test", *, rows: int = 512, batch_size: int = 128
) -> ValidationScore:
    """Loss on the first `rows` rows of a source's split: of `train`, those that training saw first.

    Args:
      model: evaluated without capacity limits, whatever its configuration says.
      source: of a mixture.
      split: one of `source.splits`.
      rows: at most this many.
      batch_size: rows at once, at most.

    Raises:
      ValueError: the source has no such rows.
    """
    evaluator = Evaluator(model)
    count = min(rows, source.row_count(split))
    if count == 0:
        raise ValueError(f"source {source.name!r} has no {split} rows.")
    length = source.rows(np.arange(1), split)["inputs"].shape[1]
    together = evaluator.rows_together(min(batch_size, 1 << (count - 1).bit_length()), length)
    weighted, weights, plain = np.zeros(count), np.zeros(count), np.zeros(count)
    tokens = 0
    for chosen, present in batches_of(count, together):
        batch = source.rows(chosen, split)
        losses, _ = evaluator(batch)
        used = chosen[:present]
        weight = batch["loss_weights"].astype(np.float64)
        weighted[used] = (losses * weight).sum(1)[:present]
        weights[used] = weight.sum(1)[:present]
        plain[used] = losses.sum(1, dtype=np.float64)[:present]
        tokens += int((batch["segment_ids"][:present] != 0).sum())
    total = weights.sum()
    loss = weighted.sum() / total if total else math.nan
    residuals = weighted - loss * weights
    spread = math.sqrt(count / (count - 1) * np.sum(residuals**2)) / total if count > 1 and total else math.nan
    return ValidationScore(
        loss=float(loss),
        unweighted_loss=float(plain.sum() / tokens) if tokens else math.nan,
        standard_error=float(spread),
        rows=count,
        validation_tokens=tokens,
        dropped_fraction=evaluator.dropped_fraction,
    )
