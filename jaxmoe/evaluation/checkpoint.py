"""Evaluating a run from its newest checkpoint, apart from training."""

from __future__ import annotations

import dataclasses
import os

from etils import epath

from jaxmoe.config import RunConfig
from jaxmoe.data import Mixture
from jaxmoe.run_files import CHECKPOINT_DIRECTORY
from jaxmoe.sharding import partitioning_of_run
from jaxmoe.training import Checkpoints, EvaluationContext, Resumed, abstract_state, evaluation_context


def checkpoint_context(
    run: RunConfig, directory: epath.PathLike, *, cache_dir: str | os.PathLike | None = None
) -> EvaluationContext | None:
    """What an evaluator needs, at the step of the newest checkpoint; None if there is no checkpoint.

    Args:
      run: the configuration.
      directory: of the run.
      cache_dir: where tokenized text is kept if the configuration does not say.

    Raises:
      CheckpointError: the checkpoints are of another model, or cannot be read.
    """
    directory = epath.Path(directory)
    if not (directory / CHECKPOINT_DIRECTORY).exists():
        return None
    partitioning = partitioning_of_run(run)
    graphdef, like = abstract_state(run, partitioning)
    with Checkpoints(directory / CHECKPOINT_DIRECTORY) as checkpoints:
        restored = checkpoints.restore(dataclasses.replace(like, opt_state=None), partial=True)
    if restored is None:
        return None
    mixture = Mixture.of_run(run, cache_dir=cache_dir)
    resumed = Resumed.of_checkpoint(run, restored.step, restored.metadata, mixture)
    return evaluation_context(
        run, directory, graphdef, restored.state, mixture, resumed, partitioning=partitioning
    )
