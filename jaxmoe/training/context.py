"""What an evaluator gets to see of a run.

E experts, L MoE layers.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float

from jaxmoe.config import RunConfig, TrainConfig
from jaxmoe.data import Mixture, Tokenizer
from jaxmoe.training.metrics import plain_number
from jaxmoe.training.state import RecentSums, TrainState

_LONGEST_WINDOW = 100


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

    def model(self) -> nnx.Module:
        """The `Decoder` as it stands now."""
        return nnx.merge(self.graphdef, self.params, self.others)


def evaluation_context(
    run: RunConfig, directory: epath.PathLike, graphdef: nnx.GraphDef, state: TrainState, mixture: Mixture
) -> EvaluationContext:
    """The context of a state, in the loop or read from a checkpoint.

    Args:
      run, directory, mixture: of the run.
      graphdef, state: of `jaxmoe.training.init_state`; its `recent` sums are those of the last steps if the step is
        one at which the run is evaluated.
    """
    step, recent = jax.device_get((state.step, state.recent))
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
