"""When a checkpoint is written, and which of them stay."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxmoe.config import ConfigError, TrainConfig, nearest
from jaxmoe.processes import alone, of_first

if TYPE_CHECKING:
    from orbax.checkpoint.checkpoint_managers import PreservationPolicy

TRAINING_LOSS = "training_loss"


class SaveSchedule:
    """Says after which steps a run is saved: those of an interval, some minutes after the last, and the last step.

    Saving changes no number, so that those of a clock do not either.

    Args:
      train: of the run.
      evaluations: steps after which it is evaluated; each is saved if the best checkpoints are to stay.
      clock: seconds.
    """

    def __init__(self, train: TrainConfig, evaluations: Collection[int], clock: Callable[[], float] = time.monotonic):
        self._train, self._evaluations, self._clock = train, evaluations, clock
        self._saved_at = clock()

    def due(self, step: int) -> bool:
        """Whether to save after this step; if so, the minutes count from now on."""
        train = self._train
        minutes = train.checkpoint_every_minutes
        due = (
            step % train.checkpoint_interval == 0
            or step == train.steps
            or (train.keep_best > 0 and step in self._evaluations)
            or (minutes is not None and self._is_late(step, 60 * minutes))
        )
        if due:
            self._saved_at = self._clock()
        return due

    def _is_late(self, step: int, seconds: float) -> bool:
        """By the clock of the first process, which several ask after every tenth step only, since they wait for it."""
        if not alone() and step % 10:
            return False
        return of_first(self._clock() - self._saved_at >= seconds)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete: those that any of the rules keeps.

    Attributes:
      newest: so many of the last.
      every_steps: those of a multiple of this many steps; None: none for that.
      best: so many of the best, by the `quality` that they were saved with.
    """

    newest: int
    every_steps: int | None = None
    best: int = 0

    @classmethod
    def of(cls, train: TrainConfig) -> Retention:
        """As a run's configuration says."""
        return cls(newest=train.keep_checkpoints, every_steps=train.keep_every, best=train.keep_best)

    def policy(self) -> PreservationPolicy:
        """The same in Orbax's terms."""
        from orbax.checkpoint import checkpoint_managers

        policies = [checkpoint_managers.LatestN(self.newest)]
        if self.every_steps is not None:
            policies.append(checkpoint_managers.EveryNSteps(self.every_steps))
        if self.best:
            policies.append(_BestMeasured(self.best))
        return checkpoint_managers.AnyPreservationPolicy(policies)


class _BestMeasured:
    """Orbax's `BestN`, among those that have a quality."""

    def __init__(self, count: int):
        from orbax.checkpoint import checkpoint_managers

        # Its last in descending order are the smallest.
        self._best = checkpoint_managers.BestN(get_metric_fn=quality_of, reverse=True, n=count)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        measured = [info for info in checkpoints if quality_of(info.metrics) < math.inf]
        kept = self._best.should_preserve(measured, context=context)
        steps = {info.step for info, keep in zip(measured, kept, strict=True) if keep}
        return [info.step in steps for info in checkpoints]


def quality_of(metrics: Mapping[str, float | None] | None) -> float:
    """By which checkpoints are compared, smaller is better; infinity where it was not measured."""
    value = None if metrics is None else metrics.get("quality")
    return math.inf if value is None else value


def quality(train: TrainConfig, training_loss: float | None, measured: Mapping[str, Any] | None) -> float | None:
    """The quality of a model at an evaluation: `train.best_metric`, or its negative if more of it is better.

    Args:
      train: of the run.
      training_loss: of the evaluation.
      measured: what the evaluator has measured, by name.

    Raises:
      ConfigError: there is nothing of that name.
    """
    if not train.keep_best:
        return None
    values = {**(measured or {}), TRAINING_LOSS: training_loss}
    if train.best_metric not in values:
        raise ConfigError(f"train.best_metric={train.best_metric!r}.{nearest(train.best_metric, values)}")
    value = values[train.best_metric]
    if value is None or not math.isfinite(value):
        return None
    return value if train.best_mode == "min" else -value
