"""AdamW with decay on matrices only, clipped by the global norm."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmoe.config import TrainConfig
from jaxmoe.training.schedule import Schedule, learning_rate_schedule

_STACKED = "blocks"
"""Attribute under which a model keeps layers that share one array, with a leading axis of layers."""


def decay_mask(params: Any) -> Any:
    """Which parameters weight decay applies to: True for matrices, False for vectors.

    A matrix has two axes or more beside the leading axis of layers that a scan adds: embedding, head, router,
    attention and expert weights. The gains of norms are vectors, though stacked over layers they have two axes.

    Args:
      params: `nnx.State` of a model's parameters, or any tree of them.

    Returns:
      Booleans in the same structure.
    """

    def is_matrix(path: tuple, parameter: Any) -> bool:
        stacked = any(getattr(key, "key", getattr(key, "name", None)) == _STACKED for key in path)
        return parameter.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping, Adam, decoupled weight decay on matrices, and the learning rate, as one optax transformation.

    Its `update` takes `step=`, the number of this update counted from 1, since the learning rate follows the run's
    steps, also past those that a non-finite loss skipped; Adam's moments and their bias correction follow the
    updates that were made. With `accept=` false the state stays as it was, and the updates must not be applied.
    """
    return optax.chain(
        optax.identity() if config.clip_norm is None else _clip_by_global_norm(config.clip_norm),
        _scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        _scale_by_learning_rate(learning_rate_schedule(config)),
    )


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """optax's clipping as a multiplication, which XLA fuses into the moments; a division it computes beforehand."""

    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda update: update * factor, updates), state

    return optax.GradientTransformation(optax.identity().init, update)


def _scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
    """optax's Adam, the direction taken from moments that are already written back.

    Where the direction is computed from the old moments, as XLA otherwise chooses to, donated moments are copied
    before they are overwritten.
    """
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)

    def update(updates, state, params=None, *, accept=True, **_):
        del params
        moved = adam.update(updates, state)[1]
        state = jax.lax.optimization_barrier(jax.tree.map(functools.partial(jnp.where, accept), moved, state))
        first = optax.tree.bias_correction(state.mu, beta1, state.count)
        second = optax.tree.bias_correction(state.nu, beta2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), first, second), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


class _NoState(NamedTuple):
    pass


def _scale_by_learning_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate of update number `step`."""

    def update(updates, state, params=None, *, step, **_):
        del params
        rate = schedule(step)
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: _NoState(), update)
