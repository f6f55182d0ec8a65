"""The updates of a rollout step, compiled as one function, and the log-probabilities that they compare with.

U updates, M micro-batches, B responses, S sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxmoe.config import GRPOConfig, ModelConfig, TrainConfig
from jaxmoe.layers import RouterStatistics, load_metrics
from jaxmoe.models import Decoder, dropless
from jaxmoe.post_training.loss import Rows, log_probabilities, response_loss
from jaxmoe.sharding import Partitioning, use_partitioning
from jaxmoe.training import TrainState, learning_rate_schedule, make_optimizer
from jaxmoe.training.state import abstract_shardings, keep_unless, model_graph, relevant_to_step
from jaxmoe.training.step import step_options

Metrics = dict[str, Array]


@functools.lru_cache(maxsize=16)
def _scorer(
    model: ModelConfig, grpo: GRPOConfig, partitioning: Partitioning | None
) -> Callable[..., tuple[Float[Array, "B S"], Float[Array, ""]]]:
    graph = model_graph(model)

    def score(params: Any, others: Any, inputs: Array, targets: Array, segment_ids: Array):
        with use_partitioning(partitioning):
            decoder: Decoder = dropless(nnx.merge(graph, params, others))
            hidden, router = decoder.hidden(inputs, segment_ids=segment_ids)
            overflowed = jnp.zeros(()) if router is None else router.overflowed.sum()
            return log_probabilities(hidden, decoder.head_weight, targets, grpo), overflowed

    return jax.jit(score, out_shardings=None if partitioning is None else partitioning.sharding((), ()))


def make_scorer(
    model: ModelConfig, grpo: GRPOConfig, partitioning: Partitioning | None = None
) -> Callable[..., tuple[Float[Array, "B S"], Float[Array, ""]]]:
    """The log-probability of every target of some rows, and expert assignments that found no room in a buffer.

    Returns:
      A function of a model's parameters, its other variables, and (B, S) `inputs`, `targets` and `segment_ids`.
    """
    return _scorer(model, _relevant(grpo), partitioning)


def make_updates(
    model: ModelConfig,
    train: TrainConfig,
    grpo: GRPOConfig,
    num_sources: int,
    partitioning: Partitioning | None = None,
) -> Callable[[TrainState, Rows], tuple[TrainState, Metrics]]:
    """The compiled updates of a rollout step, one for all runs that differ only in seed, data or bookkeeping.

    The function takes a state, which it donates, and rows of (U, M, B, S), and returns the next state and metrics:

    * `loss`, the token mean of each update, and `grad_norm` before clipping, both averaged over the updates;
    * `kl` and `clip_fraction`, means over the response tokens of all updates;
    * `learning_rate`, `skipped`, `skipped_in_a_row`, and those of `jaxmoe.layers.load_metrics` if a layer routes.

    An update whose loss or gradient norm is not finite, or with `strict_buffer` one in which a row found no room, is
    not made, and its step counts as skipped. No auxiliary loss of the router is trained on.

    Args:
      model: of the run.
      train: of the run.
      grpo: of the run.
      num_sources: of the mixture, weight 0 included.
      partitioning: of state and rows; None for one device.
    """
    return _updates(model, relevant_to_step(train), _relevant(grpo), num_sources, partitioning)


@functools.lru_cache(maxsize=16)
def _updates(
    model: ModelConfig, train: TrainConfig, grpo: GRPOConfig, num_sources: int, partitioning: Partitioning | None
) -> Callable[[TrainState, Rows], tuple[TrainState, Metrics]]:
    optimizer, schedule, graph = make_optimizer(train), learning_rate_schedule(train), model_graph(model)

    def loss_of(params: nnx.State, others: nnx.State, rows: Rows, tokens: Array) -> tuple[Array, tuple]:
        decoder: Decoder = dropless(nnx.merge(graph, params, others))
        hidden, router = decoder.hidden(rows.inputs, segment_ids=rows.segment_ids)
        loss, sums = response_loss(hidden, decoder.head_weight, rows, tokens, grpo)
        return loss, (loss, sums, jax.lax.stop_gradient(router))

    def update(carry: tuple[nnx.State, Any], rows: Rows, others: nnx.State, number: Array) -> tuple[tuple, tuple]:
        params, opt_state = carry
        tokens = jnp.maximum(rows.weights.sum(), 1.0)

        def add(gradient, part):
            own, told = jax.grad(loss_of, has_aux=True)(params, others, part, tokens)
            return jax.tree.map(jnp.add, gradient, own), told

        gradient, told = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)
        loss, sums, router = jax.tree.map(lambda x: x.sum(axis=0), told)
        grad_norm = optax.tree.norm(gradient)
        accept = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if router is not None and model.moe.strict_buffer:
            accept &= router.overflowed.sum() == 0
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, opt_state, params, step=number, accept=accept)
            params = keep_unless(accept, optax.apply_updates(params, updates), params)
        return (params, opt_state), (loss, grad_norm, sums, router, accept)

    def updates(state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
        number = state.step + 1
        (params, opt_state), (losses, norms, sums, router, accepted) = jax.lax.scan(
            lambda carry, own: update(carry, own, state.others, number), (state.params, state.opt_state), rows
        )
        following = state.after_step(accepted.all(), params=params, opt_state=opt_state)
        tokens = jnp.maximum(rows.weights.sum(), 1.0)
        metrics = {
            "loss": losses.mean(),
            "kl": sums.kl.sum() / tokens,
            "clip_fraction": sums.clipped.sum() / tokens,
            "grad_norm": norms.mean(),
            "learning_rate": schedule(number),
            **({} if router is None else load_metrics(_total(router))),
            "skipped": following.skipped,
            "skipped_in_a_row": following.skipped_in_a_row,
        }
        return following, metrics

    options = step_options(model, partitioning)
    if partitioning is None:
        return jax.jit(updates, donate_argnums=0, compiler_options=options)

    def on_mesh(state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
        with use_partitioning(partitioning):
            return updates(state, rows)

    shardings = abstract_shardings(model, train, num_sources, partitioning)
    everywhere = partitioning.sharding((), ())
    return jax.jit(on_mesh, donate_argnums=0, out_shardings=(shardings, everywhere), compiler_options=options)


def _total(router: RouterStatistics) -> RouterStatistics:
    return jax.tree.map(lambda x: x.sum(axis=0), router)


def _relevant(grpo: GRPOConfig) -> GRPOConfig:
    """What the updates depend on, besides shapes."""
    return GRPOConfig(
        temperature=grpo.temperature, clip_ratio=grpo.clip_ratio, kl_coefficient=grpo.kl_coefficient
    )
