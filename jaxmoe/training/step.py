"""One training step: loss, gradient, update, metrics, compiled as one function.

B batch, S sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxmoe.config import ModelConfig, TrainConfig
from jaxmoe.layers import RouterStatistics, auxiliary_losses, load_metrics
from jaxmoe.layers.expert_parallel import compiler_options as exchange_options
from jaxmoe.models import Decoder, language_model_loss
from jaxmoe.sharding import Partitioning, constrain, partitioning_in_use, rows_here, use_partitioning
from jaxmoe.training.optimizer import make_optimizer
from jaxmoe.training.schedule import learning_rate_schedule
from jaxmoe.training.spikes import find_spike
from jaxmoe.training.state import (
    RecentSums,
    TrainState,
    abstract_shardings,
    keep_unless,
    model_graph,
    relevant_to_step,
)
from pallas_kernels import compiler_options as kernel_options

Batch = Mapping[str, Any]
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_BATCH_KEYS = ("inputs", "targets", "loss_weights", "segment_ids", "source")
BATCH_AXES = ("batch", "sequence")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSums:
    """What a forward pass over some rows adds up to. Every entry is a plain sum, so micro-batches add.

    Attributes:
      nll: weighted negative log-likelihood, nats; what is differentiated.
      source_nll: the same of each source, without a gradient.
      source_weight: loss weight of each source.
      tokens: predicted positions, padding is none.
      router: sums of the routers; None if every layer is dense.
    """

    nll: Float[Array, ""]
    source_nll: Float[Array, " sources"]
    source_weight: Float[Array, " sources"]
    tokens: Float[Array, ""]
    router: RouterStatistics | None


def batch_sums(model: Decoder, batch: Batch, num_sources: int) -> BatchSums:
    """Runs `model` on a batch, and adds up.

    Args:
      model: to run.
      batch: as `jaxmoe.data.Mixture` makes them.
      num_sources: of the mixture.
    """
    hidden, router = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"])
    weights = batch["loss_weights"]
    total, nll = language_model_loss(hidden, model.head_weight, batch["targets"], weights)
    of_source = jax.nn.one_hot(batch["source"], num_sources, axis=0)
    return BatchSums(
        nll=total,
        source_nll=of_source @ jnp.sum(weights * nll, axis=-1),
        source_weight=of_source @ jnp.sum(weights, axis=-1),
        tokens=jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32),
        router=router,
    )


def accumulated_sums(
    forward: Callable[[nnx.State, Batch], BatchSums], params: nnx.State, batch: Batch, micro_batches: int
) -> BatchSums:
    """`forward` over `micro_batches` equal parts of the batch, one after the other, added up.

    Losses are formed from the totals, so that they do not depend on the number of parts. Their gradient needs the
    totals before any part can be differentiated; each part is therefore recomputed in the backward pass.
    """
    if micro_batches == 1:
        return forward(params, batch)
    if partitioning_in_use() is None:
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
    else:  # each device divides the rows that it has
        parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
        parts = {key: constrain(x, None, *BATCH_AXES[: x.ndim - 1]) for key, x in parts.items()}

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry, part):
        return carry, forward(params, part)

    _, sums = jax.lax.scan(step, None, parts)
    return jax.tree.map(lambda x: x.sum(axis=0), sums)


def make_train_step(
    model: ModelConfig, train: TrainConfig, num_sources: int, partitioning: Partitioning | None = None
) -> TrainStep:
    """The compiled step, one for all runs that differ only in seed, data or bookkeeping.

    The step takes a state, which it donates, and a batch with the arrays of `jaxmoe.data.Mixture`, and returns the
    next state and metrics that are still being computed:

    * `loss`: sum of weighted negative log-likelihoods / sum of weights, nats per token, no auxiliary loss in it;
      `source_loss` (sources,): the same of each source, NaN where the batch has none of it.
    * `load_balance`, `router_z`: auxiliary losses without their coefficients; `total_loss`: what is differentiated.
    * `grad_norm` before clipping, `learning_rate` of the update.
    * those of `jaxmoe.layers.load_metrics` if a layer routes.
    * `tokens`: predicted positions without padding; `skipped` and `skipped_in_a_row`, as in `TrainState`.
    * those of `jaxmoe.training.spikes.find_spike` if the run looks for spikes.

    A step whose total loss or gradient norm is not finite changes nothing but the counters; nor does a loss spike
    where `spike_action` is `skip` or `stop`, nor with `strict_buffer` one in which a row found no room.

    Args:
      model: of the run.
      train: of the run.
      num_sources: of the mixture, weight 0 included.
      partitioning: of the state and of the batch (see `place_batch`); None for one device.
    """
    return _compiled_step(model, relevant_to_step(train), num_sources, partitioning)


@functools.lru_cache(maxsize=16)
def _compiled_step(
    model: ModelConfig, train: TrainConfig, num_sources: int, partitioning: Partitioning | None
) -> TrainStep:
    optimizer, schedule = make_optimizer(train), learning_rate_schedule(train)
    graph = model_graph(model)

    def objective(params: nnx.State, others: nnx.State, batch: Batch) -> tuple[Float[Array, ""], tuple]:
        def forward(params, rows):
            return batch_sums(nnx.merge(graph, params, others), rows, num_sources)

        sums = accumulated_sums(forward, params, batch, train.gradient_accumulation)
        loss = sums.nll / jnp.maximum(sums.source_weight.sum(), 1e-9)
        auxiliary = {} if sums.router is None else auxiliary_losses(sums.router, model.moe)
        total = loss
        if auxiliary:
            total += model.moe.load_balance_coefficient * auxiliary["load_balance"]
            total += model.moe.router_z_coefficient * auxiliary["router_z"]
        return total, (sums, {"loss": loss, **auxiliary, "total_loss": total})

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = {key: batch[key] for key in _BATCH_KEYS}
        gradient, (sums, losses) = jax.grad(objective, has_aux=True)(state.params, state.others, batch)
        grad_norm = optax.tree.norm(gradient)
        accept = jnp.isfinite(losses["total_loss"]) & jnp.isfinite(grad_norm)
        spikes, leave_out, spike_metrics = find_spike(state.spikes, losses["loss"], train)
        if leave_out is not None:
            accept &= ~leave_out
        if sums.router is not None and model.moe.strict_buffer:
            accept &= sums.router.overflowed.sum() == 0
        with jax.named_scope("update"):
            number = state.step + 1
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.params, step=number, accept=accept
            )
            params = optax.apply_updates(state.params, updates)

        following = state.after_step(
            accept,
            params=keep_unless(accept, params, state.params),
            opt_state=opt_state,
            recent=keep_unless(accept, _add_recent(state.recent, sums), state.recent),
            spikes=spikes,
        )
        metrics = {
            **losses,
            "source_loss": sums.source_nll / sums.source_weight,
            "grad_norm": grad_norm,
            "learning_rate": schedule(number),
            **({} if sums.router is None else load_metrics(sums.router)),
            "tokens": sums.tokens,
            "skipped": following.skipped,
            "skipped_in_a_row": following.skipped_in_a_row,
            **spike_metrics,
        }
        return following, metrics

    options = step_options(model, partitioning)
    if partitioning is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)

    def step_on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_partitioning(partitioning):
            return step(state, batch)

    # Pinned: left to itself, the compiler may return moments spread otherwise than they came.
    shardings = abstract_shardings(model, train, num_sources, partitioning)
    everywhere = partitioning.sharding((), ())
    return jax.jit(
        step_on_mesh,
        donate_argnums=0,
        out_shardings=(shardings, everywhere),
        compiler_options=options,
    )


def step_options(model: ModelConfig, partitioning: Partitioning | None) -> dict[str, str] | None:
    """`compiler_options` of a program that differentiates a model: what its kernels and their exchanges need."""
    options = kernel_options() if model.num_moe_layers else {}
    if model.num_moe_layers and model.moe.expert_overlap and partitioning is not None:
        options |= exchange_options(partitioning)
    return options or None


@jax.jit
def parameter_norm(params: nnx.State) -> Float[Array, ""]:
    """The L2 norm of all parameters. No step needs it, and it reads them all: for the steps that are logged."""
    return optax.tree.norm(params)


def place_batch(batch: Batch, partitioning: Partitioning | None = None, batch_size: int | None = None) -> Batch:
    """A batch as arrays over the mesh, of which this process has, and gives, the rows that its devices hold.

    Args:
      batch: as `jaxmoe.data.Mixture` makes it, of the rows that `jaxmoe.sharding.rows_here` names.
      partitioning: None leaves the batch as it is.
      batch_size: B, over all processes; None where there is one.
    """
    if partitioning is None:
        return batch
    batch_size = len(batch["source"]) if batch_size is None else batch_size
    here = rows_here(partitioning, batch_size)

    def place(x: np.ndarray) -> Array:
        shape = (batch_size, *x.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(here, start))
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, partitioning.sharding(BATCH_AXES[: x.ndim], shape), part)

    return {key: place(np.asarray(batch[key])) for key in _BATCH_KEYS}


def _add_recent(recent: RecentSums, sums: BatchSums) -> RecentSums:
    routed = sums.router is not None
    return RecentSums(
        source_nll=recent.source_nll + sums.source_nll,
        source_weight=recent.source_weight + sums.source_weight,
        expert_count=recent.expert_count + sums.router.expert_count if routed else recent.expert_count,
        dropped=recent.dropped + sums.router.dropped.sum() if routed else recent.dropped,
    )
