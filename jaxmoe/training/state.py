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
from jaxtyping import Array, Float, Int, Key

from jaxmoe.config import ModelConfig, RunConfig, TrainConfig
from jaxmoe.models import Decoder
from jaxmoe.training.optimizer import make_optimizer


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
        return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), self)


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
      skipped: steps so far whose loss or gradient was not finite, and that changed nothing.
      skipped_in_a_row: how many of them just now, one after the other.
      recent: sums for the next evaluation.
    """

    step: Int[Array, ""]
    params: nnx.State
    others: nnx.State
    opt_state: Any
    key: Key[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    recent: RecentSums


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
    )


@functools.lru_cache(maxsize=16)
def _initializer(model: ModelConfig, train: TrainConfig, num_sources: int) -> Callable[[Key[Array, ""]], TrainState]:
    """The compiled initialization, shared by runs that differ only in their seed."""
    # It runs once: on CPU, where LLVM's optimization of the random numbers takes seconds, leave it out.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(initial_state, model, train, num_sources), compiler_options=options)


def init_state(run: RunConfig) -> tuple[nnx.GraphDef, TrainState]:
    """The state before the first step, drawn from `run.seed`.

    Returns:
      The model's static part, and the state.
    """
    initialize = _initializer(run.model, relevant_to_step(run.train), len(run.data.sources))
    state = initialize(jax.random.key(run.seed))
    # Committed to their devices, as restored arrays are, so that a step is not compiled again for those.
    return model_graph(run.model), jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))


def abstract_state(run: RunConfig) -> tuple[nnx.GraphDef, TrainState]:
    """`init_state` without the arrays: shapes, types and where each is to go. Nothing is allocated."""
    key = jax.eval_shape(lambda: jax.random.key(run.seed))
    initial = functools.partial(initial_state, run.model, relevant_to_step(run.train), len(run.data.sources))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(initial, key)
    return model_graph(run.model), jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
    )


def relevant_to_step(config: TrainConfig) -> TrainConfig:
    """`config` with everything at its default that the computation of a step does not depend on."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: fields[name] for name in TrainConfig.BOOKKEEPING})
