"""The programs of a run's steps, traced for devices that are not here."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import RunConfig
from jaxmoe.config.errors import require
from jaxmoe.models import init_cache
from jaxmoe.post_training.loss import Rows
from jaxmoe.post_training.update import make_updates
from jaxmoe.sharding import Partitioning, use_partitioning
from jaxmoe.training.state import abstract_state
from jaxmoe.training.step import BATCH_AXES, make_train_step

What = Literal["train", "decode"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A step as it is traced.

    Attributes:
      traced: of `jax.jit(...).trace`.
      tokens: that it takes, padding included.
      held: bytes of a device that are needed beside the program's own while it runs.
    """

    traced: Any
    tokens: int
    held: int


def traced_program(
    run: RunConfig, partitioning: Partitioning, what: What, *, rows: int | None = None, length: int | None = None
) -> Program:
    """The step that is asked for.

    Args:
      run: the configuration.
      partitioning: of the devices.
      what: `train`: the step as it is trained; of GRPO the updates of a rollout step, the reference held beside them.
        `decode`: one token more of each row, by parameters in the compute dtype; in a rollout of GRPO by those that are
        trained, with moments and reference held beside them.
      rows, length: decode: rows at a time and cached tokens of each. None: one for each device, and the model's longest
        sequence; in a rollout `grpo.rollout_batch_size`, and a prompt with a response.

    Raises:
      ConfigError: rows that are longer than the model's longest.
    """
    if what == "train":
        return _training_step(run, partitioning) if run.grpo is None else _updates(run, partitioning)
    grpo = run.grpo
    if rows is None:
        rows = partitioning.mesh.size if grpo is None else grpo.rollout_batch_size
    if length is None:
        in_rollout = grpo is not None
        length = grpo.max_prompt_tokens + grpo.max_response_tokens if in_rollout else run.model.max_sequence_length
    longest = run.model.max_sequence_length
    require(length <= longest, f"length={length} is more than model.max_sequence_length={longest}.")
    return _decoding_step(run, partitioning, rows, length)


def _spread(partitioning: Partitioning, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    """An array over the mesh by the logical names of its axes."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioning.sharding(axes, shape))


def _training_step(run: RunConfig, partitioning: Partitioning) -> Program:
    shape = run.train.batch_size, run.train.sequence_length
    tokens = functools.partial(_spread, partitioning, shape)
    batch = {
        "inputs": tokens(jnp.int32, *BATCH_AXES), "targets": tokens(jnp.int32, *BATCH_AXES),
        "loss_weights": tokens(jnp.float32, *BATCH_AXES), "segment_ids": tokens(jnp.int32, *BATCH_AXES),
        "source": _spread(partitioning, shape[:1], jnp.int32, BATCH_AXES[0]),
    }  # fmt: skip
    step = make_train_step(run.model, run.train, len(run.data.sources), partitioning)
    return Program(step.trace(abstract_state(run, partitioning)[1], batch), math.prod(shape), held=0)


def _updates(run: RunConfig, partitioning: Partitioning) -> Program:
    train, grpo = run.train, run.grpo
    parts = grpo.updates_per_step, train.gradient_accumulation
    shape = *parts, grpo.responses_per_update(train) // train.gradient_accumulation, train.sequence_length
    integers = _spread(partitioning, shape, jnp.int32, None, None, *BATCH_AXES)
    numbers = _spread(partitioning, shape, jnp.float32, None, None, *BATCH_AXES)
    rows = Rows(
        inputs=integers, targets=integers, segment_ids=integers, weights=numbers, old=numbers, reference=numbers,
        advantages=_spread(partitioning, shape[:3], jnp.float32, None, None, BATCH_AXES[0]),
    )  # fmt: skip
    state = abstract_state(run, partitioning)[1]
    step = make_updates(run.model, train, grpo, len(run.data.sources), partitioning)
    return Program(step.trace(state, rows), math.prod(shape), held=_bytes((state.params, state.others)))


def _decoding_step(run: RunConfig, partitioning: Partitioning, rows: int, length: int) -> Program:
    graph, state = abstract_state(run, partitioning)
    params, held = state.params, 0
    if run.grpo is None:
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, run.model.compute_dtype, sharding=leaf.sharding), params
        )
    else:
        held = _bytes((state.params, state.others, state.opt_state))
    cache = jax.eval_shape(functools.partial(init_cache, run.model, rows, length))
    cache = jax.tree.map(
        lambda leaf: _spread(partitioning, leaf.shape, leaf.dtype, "batch", "heads", None, None), cache
    )
    tokens = _spread(partitioning, (rows,), jnp.int32, "batch")

    def decode(params: nnx.State, others: nnx.State, tokens: Any, positions: Any, cache: Any) -> Any:
        with use_partitioning(partitioning):
            return nnx.merge(graph, params, others).decode_step(tokens, positions, cache)

    traced = jax.jit(decode, donate_argnums=4).trace(params, state.others, tokens, tokens, cache)
    return Program(traced, rows, held)


def _bytes(tree: Any) -> int:
    """Of a device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
