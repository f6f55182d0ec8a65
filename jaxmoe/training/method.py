"""What the steps of a run do: pre-training's, and the shape that other methods have to have to be run by the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from jaxmoe.accounting import flops_per_token
from jaxmoe.config import RunConfig
from jaxmoe.data import Mixture
from jaxmoe.sharding import Partitioning
from jaxmoe.training.signals import StopRequest
from jaxmoe.training.state import TrainState
from jaxmoe.training.step import Metrics, make_train_step, place_batch


class StepStoppedError(Exception):
    """A run was asked to stop within a step that takes long; the state is that before it, and the step comes again."""


class Method(Protocol):
    """The steps of a run, one after the other. All that is random in one follows from the seed and its number.

    Attributes:
      evaluates_start: whether the run is evaluated before its first step, too.
      steps_in_flight: how many steps may be begun before the numbers of the first are looked at.
      flops_per_token: of the updates of a step, for the speed that is logged.
      tokens_per_step: positions of a step, padding included.
    """

    evaluates_start: bool
    steps_in_flight: int
    flops_per_token: float
    tokens_per_step: int

    def begin(self, step: int, start_step: int | None) -> None:
        """Gets ready for the steps after `step`; `start_step` is that of the checkpoint that `start_from` gave."""

    def step(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """The next step, which donates the state. The metrics have `loss`, `tokens`, and `skipped_in_a_row`.

        Raises:
          StepStoppedError: instead of beginning, or while the state is still as it was.
        """

    def position(self) -> Any:
        """Where the data stand, as JSON values for a checkpoint."""

    def end(self) -> None:
        """Frees what `begin` made."""


MakeMethod = Callable[[RunConfig, Mixture, Partitioning | None, StopRequest], Method]


class PreTraining:
    """Steps of next-token prediction on the mixture's batches."""

    evaluates_start = False
    steps_in_flight = 2

    def __init__(self, run: RunConfig, mixture: Mixture, partitioning: Partitioning | None, stop: StopRequest):
        del stop  # a step is short
        if run.grpo is not None:
            raise ValueError(f"{run.name} has a section grpo; give train method=jaxmoe.post_training.GRPO.")
        self._run, self._mixture, self._partitioning = run, mixture, partitioning
        self.flops_per_token = flops_per_token(run.model, run.train.sequence_length).training
        self.tokens_per_step = run.tokens_per_step

    def begin(self, step: int, start_step: int | None) -> None:
        """Compiles the step, if it is not, and begins to make batches."""
        del start_step
        run = self._run
        self._train_step = make_train_step(run.model, run.train, len(self._mixture.sources), self._partitioning)
        self._batches = self._mixture.iterator(step)

    def step(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """One batch, one update."""
        return self._train_step(
            state, place_batch(next(self._batches), self._partitioning, self._run.train.batch_size)
        )

    def position(self) -> Any:
        """The state of the iterator."""
        return self._batches.get_state()

    def end(self) -> None:
        """Ends the iterator's threads."""
        self._batches.close()
