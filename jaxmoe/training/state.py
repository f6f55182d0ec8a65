"""What training carries from step to step.

L MoE layers, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmoe.config import ModelConfig, RunConfig, TrainConfig
from jaxmoe.models import Decoder
from jaxmoe.sharding import Partitioning, use_partitioning
from jaxmoe.training.optimizer import make_optimizer
from jaxmoe.training.spikes import SpikeHistory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecentSums:
    """Sums over the steps since the loop last set them to zero: what an evaluation reports of training.

    Attributes:
      source_nll: weighted negative log-likelihood, nats, of each source.
      source_weight: loss weight of each source.
      expert_count: assignments of each expert; None in a model without routed layers.
      dropped: assignments that a capacity limit dropped.
    """

    source_nll: Float[Array, " sources"]
    source_weight: Float[Array, " sources"]
    expert_count: Float[Array, "L E"] | None
    dropped: Float[Array, ""]

    @classmethod
    def zeros(cls, model: ModelConfig, num_sources: int) -> RecentSums:
        """The sums over no step."""
        layers = model.num_moe_layers
        return cls(
            source_nll=jnp.zeros(num_sources),
            source_weight=jnp.zeros(num_sources),
            expert_count=jnp.zeros((layers, model.moe.num_experts)) if layers else None,
            dropped=jnp.zeros(()),
        )

    def cleared(self) -> RecentSums:
        """Zeros in the same places."""
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, x.sharding, lambda _: np.zeros(x.shape, x.dtype)), self
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes; a checkpoint is this and where the data stands.

    Attributes:
      step: steps done, skipped ones included.
      params: trained variables (`nnx.Param`).
      others: every other variable of the model.
      opt_state: of `make_optimizer`.
      key: base key of the run; whatever is random in a step folds the step into it.
      skipped: steps so far that changed nothing, because their loss or gradient was not finite or, with
        `spike_action` `skip`, their loss a spike.
      skipped_in_a_row: how many of them just now, one after the other.
      recent: sums for the next evaluation.
      spikes: what the next loss is compared with; None in a run that does not look for spikes.
    """

    step: Int[Array, ""]
    params: nnx.State
    others: nnx.State
    opt_state: Any
    key: Key[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    recent: RecentSums
    spikes: SpikeHistory | None = None

    def after_step(self, accepted: Bool[Array, ""], **changes: Any) -> TrainState:
        """The state after one more step, which counts as skipped if it was not accepted; `changes` are made anyway."""
        skipped = 1 - accepted.astype(jnp.int32)
        return dataclasses.replace(
            self,
            step=self.step + 1,
            skipped=self.skipped + skipped,
            skipped_in_a_row=(self.skipped_in_a_row + 1) * skipped,
            **changes,
        )


def keep_unless(accepted: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The arrays of `new` if a step is accepted, else those of `old`."""
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, old)


@functools.lru_cache(maxsize=16)
def model_graph(config: ModelConfig) -> nnx.GraphDef:
    """The static part of a `Decoder`; merge it with `params` and `others`. Nothing is allocated."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param, ...)[0]


def initial_state(model: ModelConfig, train: TrainConfig, num_sources: int, key: Key[Array, ""]) -> TrainState:
    """`init_state` as a function that can be traced."""
    init_key, run_key = jax.random.split(key)
    _, params, others = nnx.split(Decoder(model, rngs=nnx.Rngs(init_key)), nnx.Param, ...)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        others=others,
        opt_state=make_optimizer(train).init(params),
        key=run_key,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        recent=RecentSums.zeros(model, num_sources),
        spikes=SpikeHistory.empty(train),
    )


def state_shardings(state: TrainState, partitioning: Partitioning) -> TrainState:
    """Where every array of a state goes: parameters by their axes, moments as their parameters, the rest everywhere.

    Args:
      state: of arrays, or of their shapes and dtypes.
      partitioning: the mesh.

    Returns:
      The same structure, of `NamedSharding`s.
    """

    def placed(leaf: Any) -> Any:
        axes = leaf.get_metadata().get("logical_axes", ()) if isinstance(leaf, nnx.Variable) else ()
        return jax.tree.map(lambda array: partitioning.sharding(axes, array.shape), leaf)

    return jax.tree.map(placed, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def abstract_state(run: RunConfig, partitioning: Partitioning | None = None) -> tuple[nnx.GraphDef, TrainState]:
    """`init_state` without the arrays: shapes, types and where each is to go. Nothing is allocated."""
    state = _abstract_state(run.model, relevant_to_step(run.train), len(run.data.sources), partitioning)
    return model_graph(run.model), state


def abstract_shardings(
    model: ModelConfig, train: TrainConfig, num_sources: int, partitioning: Partitioning
) -> TrainState:
    """`state_shardings` of a run's state."""
    return jax.tree.map(lambda leaf: leaf.sharding, _abstract_state(model, train, num_sources, partitioning))


@functools.lru_cache(maxsize=16)
def _abstract_state(
    model: ModelConfig, train: TrainConfig, num_sources: int, partitioning: Partitioning | None
) -> TrainState:
    shapes = jax.eval_shape(functools.partial(initial_state, model, train, num_sources), jax.random.key(0))
    if partitioning is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        shardings = state_shardings(shapes, partitioning)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )


@functools.lru_cache(maxsize=16)
def _initializer(
    model: ModelConfig, train: TrainConfig, num_sources: int, partitioning: Partitioning | None
) -> Callable[[Key[Array, ""]], TrainState]:
    """The compiled initialization, shared by runs that differ only in their seed."""
    # It runs once: on CPU, where LLVM's optimization of the random numbers takes seconds, leave it out.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def initialize(key: Key[Array, ""]) -> TrainState:
        with use_partitioning(partitioning):
            return initial_state(model, train, num_sources, key)

    shardings = None if partitioning is None else abstract_shardings(model, train, num_sources, partitioning)
    return jax.jit(initialize, compiler_options=options, out_shardings=shardings)


def init_state(run: RunConfig, partitioning: Partitioning | None = None) -> tuple[nnx.GraphDef, TrainState]:
    """The state before the first step, drawn from `run.seed`; the same numbers on every mesh.

    Args:
      run: the configuration.
      partitioning: over which the state is made, so that no host and no device ever holds more than its part; None
        for one device.

    Returns:
      The model's static part, and the state.
    """
    initialize = _initializer(run.model, relevant_to_step(run.train), len(run.data.sources), partitioning)
    state = initialize(jax.random.key(run.seed))
    if partitioning is None:
        # Committed to their device, as restored arrays are, so that a step is not compiled again for those.
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    return model_graph(run.model), state


def relevant_to_step(config: TrainConfig) -> TrainConfig:
    """`config` with everything at its default that the computation of a step does not depend on."""
    if config.spike_action == "off":
        config = dataclasses.replace(config, spike_window=100, spike_factor=10.0)
    elif config.spike_action == "stop":
        config = dataclasses.replace(config, spike_action="skip")  # whether the run goes on is the loop's affair
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: fields[name] for name in TrainConfig.BOOKKEEPING})
