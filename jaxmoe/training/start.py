"""Starting a run from parameters that are there already, and reading those of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import jax
from etils import epath
from flax import nnx

from jaxmoe.config import ConfigError, MeshConfig, ModelConfig, RunConfig, config_hash, from_dict
from jaxmoe.data import Mixture
from jaxmoe.exclusive import exclusive
from jaxmoe.models import Decoder
from jaxmoe.processes import is_first, together
from jaxmoe.run_files import CHECKPOINT_DIRECTORY, CONFIG_FILE
from jaxmoe.sharding import Partitioning, make_partitioning, use_partitioning
from jaxmoe.storage import as_path, read_json
from jaxmoe.training.checkpoints import Checkpoints, Storage
from jaxmoe.training.named_arrays import named_arrays
from jaxmoe.training.optimizer import make_optimizer
from jaxmoe.training.policies import Retention
from jaxmoe.training.state import TrainState, abstract_state, initial_state, relevant_to_step
from jaxmoe.training.workdir import check_directory, claim_directory, training_hash


def state_with_parameters(
    run: RunConfig, params: nnx.State, partitioning: Partitioning | None = None
) -> TrainState:
    """The state before the first step, with `params` where they would be drawn; everything else is as if they were.

    Args:
      run: the configuration.
      params: of its model, on the devices where training has them; they are donated.
      partitioning: of the run; None for one device.
    """
    train, sources = relevant_to_step(run.train), len(run.data.sources)

    def around(params: nnx.State, key: jax.Array) -> TrainState:
        with use_partitioning(partitioning):
            drawn = initial_state(run.model, train, sources, key)
        return dataclasses.replace(drawn, params=params, opt_state=make_optimizer(train).init(params))

    placed = None
    if partitioning is not None:
        placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, partitioning)[1])
    return jax.jit(around, donate_argnums=0, out_shardings=placed)(params, jax.random.key(run.seed))


def write_start(
    run: RunConfig,
    directory: epath.PathLike,
    state: TrainState,
    *,
    started_from: str,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Makes a run directory whose training begins at `state`: config.json, and a checkpoint of step 0.

    `jaxmoe.training.train` of the same configuration in this directory goes on from there, as after any checkpoint.

    Args:
      run: the configuration.
      directory: of the run, without checkpoints.
      state: of `state_with_parameters`.
      started_from: kept in the checkpoint's description: where the parameters came from.
      cache_dir: where tokenized text is kept if the configuration does not say.

    Raises:
      ConfigError: the directory has checkpoints, or another configuration, or another process is training in it.
    """
    directory = epath.Path(directory)
    with together():
        check_directory(directory, run)
        mixture = Mixture.of_run(run, cache_dir=cache_dir)
    with contextlib.ExitStack() as stack:
        with together():
            if is_first():
                stack.enter_context(exclusive(directory))
        folder = directory / CHECKPOINT_DIRECTORY
        checkpoints = stack.enter_context(Checkpoints(folder, Retention.of(run.train), Storage.of(run.train)))
        if checkpoints.last_step is not None:
            raise ConfigError(
                f"{directory} has a checkpoint of step {checkpoints.last_step} already; take another folder to start "
                f"from {started_from}."
            )
        if is_first():
            claim_directory(directory, run)
        checkpoints.save(
            0,
            state,
            {
                "name": run.name,
                "config_hash": config_hash(run),
                "training_hash": training_hash(run),
                "started_from": started_from,
                "resumed": None,
                "loss": None,
                "evaluated": True,
                "data": {"iterator": None, "step": 0, "rows": 0, "contents": mixture.contents()},
                "sources": {},
            },
        )


def read_parameters(
    run: RunConfig, directory: epath.PathLike, mesh: MeshConfig | None = None
) -> tuple[int, nnx.Module]:
    """The model of the newest checkpoint of a run, spread over the devices there are, and its step.

    Args:
      run: the configuration.
      directory: of the run.
      mesh: the devices; None spreads the parameters over all there are.

    Raises:
      ConfigError: there is no checkpoint.
      CheckpointError: the checkpoints are of another model, or cannot be read.
    """
    directory = epath.Path(directory)
    graphdef, like = abstract_state(run, make_partitioning(mesh or MeshConfig()))
    restored = None
    if (directory / CHECKPOINT_DIRECTORY).exists():
        with Checkpoints(directory / CHECKPOINT_DIRECTORY) as checkpoints:
            restored = checkpoints.restore(dataclasses.replace(like, opt_state=None), partial=True)
    if restored is None:
        raise ConfigError(f"{directory} has no checkpoint; train the run first, or give the folder of another.")
    return restored.step, nnx.merge(graphdef, restored.state.params, restored.state.others)


def check_start(run: RunConfig) -> None:
    """Checks that `run.start_from` has parameters of the run's model; reads its configuration alone.

    Raises:
      ConfigError: no such folder, no checkpoint in it, or one of another shape; the folder is named.
    """
    directory = as_path(run.start_from)
    if not directory.is_dir():
        raise ConfigError(f"start_from={run.start_from}: no such folder; give the run directory of a trained member.")
    folder = directory / CHECKPOINT_DIRECTORY
    if not folder.is_dir() or not any(path.name.isdecimal() for path in folder.iterdir()):
        raise ConfigError(f"start_from={run.start_from} has no checkpoint; train that run first.")
    try:
        there = from_dict(ModelConfig, read_json(directory / CONFIG_FILE)["model"], "model")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"start_from={run.start_from}: its {CONFIG_FILE} cannot be read: {error}") from error
    old, new = _shapes(there), _shapes(run.model)
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"start_from={run.start_from} is of another model: {name} is {old.get(name, 'absent')} there and "
                f"{new.get(name, 'absent')} in this configuration. Give the run directory of a model of this shape."
            )


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    graph = nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
    return {name: array.shape for name, array in named_arrays(nnx.state(graph, nnx.Param)).items()}


def read_start(run: RunConfig, partitioning: Partitioning | None = None) -> tuple[int, nnx.State, nnx.State]:
    """The variables of the newest checkpoint in `run.start_from`, spread as training has them.

    Args:
      run: the configuration.
      partitioning: of the run; None for one device.

    Returns:
      The checkpoint's step, the parameters, and the model's other variables.

    Raises:
      ConfigError: there is none, or it is of another model.
      CheckpointError: it cannot be read.
    """
    check_start(run)
    like = abstract_state(run, partitioning)[1]
    like = dataclasses.replace(
        like, step=None, opt_state=None, key=None, skipped=None, skipped_in_a_row=None, recent=None, spikes=None
    )
    with Checkpoints(as_path(run.start_from) / CHECKPOINT_DIRECTORY) as checkpoints:
        restored = checkpoints.restore(like, strict=True, partial=True)
    return restored.step, restored.state.params, restored.state.others


def started_state(run: RunConfig, partitioning: Partitioning | None = None) -> tuple[int, TrainState]:
    """The step of `run.start_from`, and the state before the first step with its variables."""
    step, params, others = read_start(run, partitioning)
    return step, dataclasses.replace(state_with_parameters(run, params, partitioning), others=others)
