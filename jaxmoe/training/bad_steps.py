"""What is said of a step that was left out or whose loss is a spike, and when a run stops for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.config import RunConfig
from jaxmoe.training.errors import BufferOverflowError, LossSpikeError, NonFiniteLossError, TrainingError

logger = logging.getLogger(__name__)

Failure = Callable[[str], TrainingError]
"""The error to raise, given a sentence on the last checkpoint."""


def is_bad(metrics: Mapping[str, Any]) -> bool:
    """Whether a step was left out or its loss is a spike, by the metrics of the train step."""
    return int(metrics["skipped_in_a_row"]) > 0 or bool(metrics.get("spike", False))


def judge_bad_step(run: RunConfig, step: int, metrics: Mapping[str, Any]) -> Failure | None:
    """Logs what is wrong with a step that `is_bad`.

    Args:
      run: the configuration.
      step: number of the update, from 1. Its batch is that of global step `step - 1`, as `Mixture.batch` counts.
      metrics: of the train step, ready.

    Returns:
      None if the run goes on.
    """
    spike, in_a_row = bool(metrics.get("spike", False)), int(metrics["skipped_in_a_row"])
    train = run.train
    loss, batch = float(metrics["loss"]), f"the batch of global step {step - 1}"
    overflow = float(metrics.get("overflow_fraction", 0.0))
    if overflow and run.model.moe.strict_buffer:
        factor = run.model.moe.expert_buffer_factor
        return lambda checkpoint: BufferOverflowError(
            f"step {step} was not applied: {100 * overflow:.3g} % of its expert assignments found no room in buffers "
            f"of expert_buffer_factor={factor:g} times the mean, and strict_buffer=True. {checkpoint} Give "
            "model.moe.expert_buffer_factor a larger number, or None for room for all rows that could come."
        )
    if spike:
        found = (
            f"loss {loss:.6g} on {batch} is above {float(metrics['spike_limit']):.6g}, the median of the last "
            f"{train.spike_window} finite losses + {train.spike_factor:g} x their median absolute deviation"
        )
    else:
        found = f"loss {loss}, gradient norm {float(metrics['grad_norm'])} on {batch}"
    if not in_a_row:
        logger.warning("%s: step %d is a loss spike: %s", run.name, step, found)
        return None
    if spike and train.spike_action == "stop":
        return lambda checkpoint: LossSpikeError(
            f"step {step} is a loss spike and was not applied: {found}. {checkpoint} Look at that batch; to leave "
            "such steps out, run again with --config.train.spike_action=skip --resume=force."
        )
    logger.warning("%s: step %d is skipped: %s; %d in a row", run.name, step, found, in_a_row)
    if in_a_row < train.max_nonfinite_steps:
        return None
    or_spike = ", or the loss a spike," if train.spike_action == "skip" else ""
    return lambda checkpoint: NonFiniteLossError(
        f"the loss or the gradient was not finite{or_spike} in {in_a_row} steps in a row, {step - in_a_row + 1} to "
        f"{step}. The last good step is {step - in_a_row}. {checkpoint} Lower train.learning_rate or "
        "train.clip_norm, or look at the data."
    )
