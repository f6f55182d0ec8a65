"""What an evaluator gets to see of a run.

E experts, L MoE layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float

from jaxmoe.config import RunConfig, TrainConfig
from jaxmoe.data import Mixture, Tokenizer, content_changes
from jaxmoe.sharding import Partitioning
from jaxmoe.training.errors import EvaluationStopped
from jaxmoe.training.metrics import plain_number
from jaxmoe.training.signals import StopRequest
from jaxmoe.training.state import RecentSums, TrainState
from jaxmoe.training.workdir import training_hash

_LONGEST_WINDOW = 100


@dataclasses.dataclass(frozen=True)
class Resumed:
    """That a run was last forced to go on with another configuration to train by, or with other data.

    Attributes:
      at_step: steps done then.
      from_config: hash of the configuration before; None if it stayed.
      from_data: `Mixture.fingerprint` of the data before; None if they stayed.
    """

    at_step: int
    from_config: str | None = None
    from_data: str | None = None

    @classmethod
    def of_checkpoint(
        cls, run: RunConfig, step: int, metadata: Mapping[str, Any], mixture: Mixture
    ) -> Resumed | None:
        """What a checkpoint says of it, when `run` goes on from there with the batches of `mixture`."""
        before = metadata["data"].get("contents")
        other_config = metadata.get("training_hash", training_hash(run)) != training_hash(run)
        other_data = before is not None and bool(content_changes(before, mixture.contents()))
        if other_config or other_data:
            return cls(
                at_step=step,
                from_config=metadata["config_hash"] if other_config else None,
                from_data=before["fingerprint"] if other_data else None,
            )
        earlier = metadata.get("resumed")
        return None if earlier is None else cls(**earlier)

    def __str__(self) -> str:
        what = {"another configuration": self.from_config, "other data": self.from_data}
        before = " and ".join(f"{name} ({value})" for name, value in what.items() if value is not None)
        return f"until step {self.at_step} this run had {before}, and was forced to go on"

    def fields(self) -> dict[str, str | int]:
        """What records and DONE say of it: `resumed_at_step`, `resumed_from_config`, `resumed_from_data`."""
        fields = dataclasses.asdict(self)
        return {f"resumed_{name}": value for name, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class EvaluationContext:
    """A model in training and where it stands. The arrays are the loop's: use them during the call, do not keep them.

    Attributes:
      run, directory: of the run.
      step: steps done.
      graphdef, params, others: the model in parts; `model()` puts them together.
      mixture, tokenizer: of the run.
      training_loss: mean over the tokens of the last `averaging_window` steps, nats per token, no auxiliary loss;
        None if none of those steps was finite.
      source_losses: the same of each source; None where those steps had none of it.
      expert_load: share of each layer's assignments that each expert received in those steps; None without routed
        layers.
      dropped_fraction: assignments dropped in those steps / assignments made.
      skipped_steps: steps so far, from the first on, whose loss or gradient was not finite.
      resumed: that the run was forced to go on with another configuration or other data; None if it never was.
      stop: by which the run may be asked to stop; None after training.
      partitioning: of the parameters; None on one device.
    """

    run: RunConfig
    directory: epath.Path
    step: int
    graphdef: nnx.GraphDef
    params: nnx.State
    others: nnx.State
    mixture: Mixture
    tokenizer: Tokenizer
    training_loss: float | None
    source_losses: dict[str, float | None]
    expert_load: Float[np.ndarray, "L E"] | None
    dropped_fraction: float
    skipped_steps: int
    resumed: Resumed | None = None
    stop: StopRequest | None = None
    partitioning: Partitioning | None = None

    def check_stop(self) -> None:
        """Between two parts of an evaluation: ends it if the run was asked to stop.

        Raises:
          EvaluationStopped: it was; to be let through to the loop, which evaluates this step anew later.
        """
        if self.stop is None:
            return
        self.stop.agree()
        if self.stop.requested is not None:
            raise EvaluationStopped

    def model(self) -> nnx.Module:
        """The `Decoder` as it stands now."""
        return nnx.merge(self.graphdef, self.params, self.others)


def evaluation_context(
    run: RunConfig,
    directory: epath.PathLike,
    graphdef: nnx.GraphDef,
    state: TrainState,
    mixture: Mixture,
    resumed: Resumed | None = None,
    stop: StopRequest | None = None,
    partitioning: Partitioning | None = None,
) -> EvaluationContext:
    """The context of a state, in the loop or read from a checkpoint.

    Args:
      run: the configuration.
      directory: of the run.
      graphdef: of `jaxmoe.training.init_state`.
      state: its `recent` sums are those of the last steps if the step is one at which the run is evaluated.
      mixture: of the run.
      resumed: from another configuration or with other data, if it was.
      stop: by which the run may be asked to stop.
      partitioning: of the state.
    """
    step, skipped, recent = jax.device_get((state.step, state.skipped, state.recent))
    counts = recent.expert_count
    return EvaluationContext(
        run=run,
        directory=epath.Path(directory),
        step=int(step),
        graphdef=graphdef,
        params=state.params,
        others=state.others,
        mixture=mixture,
        tokenizer=mixture.tokenizer,
        training_loss=_mean(recent.source_nll.sum(), recent.source_weight.sum()),
        source_losses=_source_losses(recent, mixture),
        expert_load=None if counts is None else counts / np.maximum(counts.sum(-1, keepdims=True), 1),
        dropped_fraction=0.0 if counts is None else float(recent.dropped / max(counts.sum(), 1)),
        skipped_steps=int(skipped),
        resumed=resumed,
        stop=stop,
        partitioning=partitioning,
    )


def averaging_window(train: TrainConfig, points: int) -> int:
    """Steps before an evaluation that its training loss is the mean of: a fiftieth of the run, at most 100.

    Args:
      train: of the run.
      points: evaluations of the run; their windows do not overlap.
    """
    return max(1, min(_LONGEST_WINDOW, train.steps // max(50, points)))


def _source_losses(recent: RecentSums, mixture: Mixture) -> dict[str, float | None]:
    sums = zip(mixture.sources, recent.source_nll, recent.source_weight, strict=True)
    return {source.name: _mean(nll, weight) for source, nll, weight in sums}


def _mean(total: np.ndarray, weight: np.ndarray) -> float | None:
    return plain_number(total / weight) if weight > 0 else None
