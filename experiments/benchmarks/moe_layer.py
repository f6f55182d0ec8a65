"""One SwiGLU MoE layer's training step: shapes, routings, contenders, and calls that can be timed.

The whole layer: router in float32, top-k, softmax gate, plan, dispatch, products, combine; forward and backward with
respect to tokens, router and experts. A step gets the previous step's outputs donated and writes over them, as a
training step does: fresh pages would otherwise be most of the time at large E. The dense MLP takes its T·K rows the
same way.

Contenders: the platform's backend of `pallas_kernels`, and `cpu_native` where it was built; `capacity_einsum`, the
layer of one-hot products with a capacity for each 1,024 tokens; `capacity_einsum_ungrouped`, the same with one capacity
for all tokens.
Routings: `balanced` is a random router on random tokens; `zipf` draws the experts of a token without replacement with
probability proportional to rank^-1.2; `hot` has expert 0 among every token's choices.

T tokens, D width, F expert hidden width, E experts, K experts per token, N = T·K rows; G groups of S tokens and
C rows of one expert's capacity, of the capacity layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.layers.router import scores_of, top_experts
from pallas_kernels import moe_mlp, native, resolved_backend

ROUTINGS = ("balanced", "zipf", "hot")
ZIPF_EXPONENT = 1.2


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer: T, D, F, E, K."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    @property
    def rows(self) -> int:
        """N."""
        return self.tokens * self.k

    @property
    def training_flops(self) -> int:
        """Of the router's and the experts' products, forward and backward."""
        return 3 * 2 * (self.rows * 3 * self.width * self.hidden + self.tokens * self.width * self.experts)


def measured_backends() -> tuple[str, ...]:
    """The platform's own backend, and the compiled one where it was built."""
    own = resolved_backend()
    return (own, "cpu_native") if own == "cpu" and native.is_built() else (own,)


def routing_bias(routing: str, key: jax.Array, tokens: int, experts: int) -> jax.Array:
    """What is added to the logits before the choice, so that a fresh router chooses as `routing` says: (T or 1, E)."""
    if routing == "balanced":
        return jnp.zeros((1, experts), jnp.float32)
    if routing == "hot":
        return jnp.zeros((1, experts), jnp.float32).at[0, 0].set(1e6)
    if routing == "zipf":
        log_popularity = -ZIPF_EXPONENT * jnp.log(jnp.arange(1, experts + 1, dtype=jnp.float32))
        return log_popularity + jax.random.gumbel(key, (tokens, experts), jnp.float32)
    raise ValueError(f"routing={routing!r}; choose one of {', '.join(map(repr, ROUTINGS))}.")


def route(router: jax.Array, x: jax.Array, bias: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Chosen experts and gates, (T, K) each; the bias moves the choice only."""
    logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    expert_index = top_experts(jax.lax.stop_gradient(logits) + bias, k)
    return expert_index, jax.nn.softmax(scores_of(logits, expert_index), axis=-1)


def capacity_einsum(
    x: jax.Array,
    expert_index: jax.Array,
    gate: jax.Array,
    w_gate_up: jax.Array,
    w_down: jax.Array,
    *,
    capacity_factor: float = 1.5,
    group: int | None = 1024,
) -> jax.Array:
    """The routed SwiGLU MLP as products with one-hot (G, S, E, C) tensors (GShard), arguments as of `moe_mlp`.

    Args:
      capacity_factor: C = ceil(capacity_factor · S · K / E); an expert's later tokens are dropped.
      group: the most tokens that share a capacity, S; it must divide T where T is larger. None: all of them.
    """
    tokens, k = expert_index.shape
    experts, size = w_gate_up.shape[0], min(tokens, group or tokens)
    capacity = math.ceil(capacity_factor * size * k / experts)
    grouped = x.reshape(-1, size, x.shape[1])
    chosen = jax.nn.one_hot(expert_index.reshape(-1, size, k), experts, dtype=jnp.int32)
    earlier = jnp.cumsum(chosen.reshape(-1, size * k, experts), axis=1).reshape(chosen.shape) - chosen
    slot = jax.nn.one_hot(jnp.sum(earlier * chosen, axis=-1), capacity, dtype=x.dtype)  # zeros beyond the capacity
    chosen = chosen.astype(x.dtype)
    dispatch = jnp.einsum("gske,gskc->gsec", chosen, slot)
    combine = jnp.einsum("gske,gskc->gsec", chosen, slot * gate.reshape(-1, size, k, 1).astype(x.dtype))
    received = jnp.einsum("gsec,gsd->egcd", dispatch, grouped)
    gated, up = jnp.split(jnp.einsum("egcd,edf->egcf", received, w_gate_up), 2, axis=-1)
    returned = jnp.einsum("egcf,efd->egcd", jax.nn.silu(gated) * up, w_down)
    return jnp.einsum("gsec,egcd->gsd", combine, returned).reshape(x.shape)


EINSUMS = {
    "capacity_einsum": capacity_einsum,
    "capacity_einsum_ungrouped": functools.partial(capacity_einsum, group=None),
}


def dense_call(shape: Shape, dtype: Any = jnp.float32, steps: int = 1) -> Callable[[], None]:
    """Steps of one SwiGLU MLP on the N rows of `shape`."""
    stacked = weights_of(dataclasses.replace(shape, experts=1), dtype)
    weights = {name: stacked[name][0] for name in ("gate_up", "down")}
    x = jax.random.normal(jax.random.key(1), (shape.rows, shape.width), dtype)
    return _call(_training_step("dense", 1), weights, x, None, steps)


def moe_call(
    shape: Shape, routing: str, contender: str, weights: Mapping[str, jax.Array], steps: int = 1
) -> tuple[Callable[[], None], int]:
    """Steps of a contender's layer, and how many experts have at least one row."""
    x = jax.random.normal(jax.random.key(1), (shape.tokens, shape.width), weights["gate_up"].dtype)
    bias = routing_bias(routing, jax.random.key(3), shape.tokens, shape.experts)
    touched = np.unique(route(weights["router"], x, bias, shape.k)[0]).size
    return _call(_training_step(contender, shape.k), weights, x, bias, steps), touched


def _call(
    step: Callable[..., Any], weights: Any, x: jax.Array, bias: jax.Array | None, steps: int
) -> Callable[[], None]:
    """A call that takes `steps` steps, each given the outputs of the one before to write over, and waits."""
    cotangent = jax.random.normal(jax.random.key(2), x.shape, x.dtype)
    outputs = jax.tree.map(jnp.zeros_like, (x, (weights, x)))

    def call() -> None:
        nonlocal outputs
        for _ in range(steps):
            outputs = step(weights, x, bias, cotangent, outputs)
        jax.block_until_ready(outputs)

    return call


@functools.cache
def _training_step(contender: str, k: int) -> Callable[..., Any]:
    """Forward and backward of `contender`: outputs, and the gradients of weights and tokens."""
    mlp = EINSUMS.get(contender) or functools.partial(moe_mlp, backend=contender)

    def layer(weights, x, bias):
        if contender == "dense":
            gated, up = jnp.split(x @ weights["gate_up"], 2, axis=1)
            return (jax.nn.silu(gated) * up) @ weights["down"]
        expert_index, gate = route(weights["router"], x, bias, k)
        return mlp(x, expert_index, gate, weights["gate_up"], weights["down"])

    # The output is returned too: unused, its products would not be computed.
    @functools.partial(jax.jit, donate_argnums=4, keep_unused=True)
    def step(weights, x, bias, cotangent, previous):
        y, pull_back = jax.vjp(lambda weights, x: layer(weights, x, bias), weights, x)
        return y, pull_back(cotangent)

    return step


def weights_of(shape: Shape, dtype: Any) -> dict[str, jax.Array]:
    """A fresh layer's weights, the router in float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    e, d, f = shape.experts, shape.width, shape.hidden
    sizes = {"router": (d, e), "gate_up": (e, d, 2 * f), "down": (e, f, d)}
    dtypes = {"router": jnp.float32, "gate_up": dtype, "down": dtype}
    return {name: 0.02 * jax.random.normal(key, sizes[name], dtypes[name]) for name, key in zip(sizes, keys)}


def stream_call(array_bytes: int) -> Callable[[], None]:
    """A call that reads two arrays of that size and writes a third."""

    @functools.partial(jax.jit, donate_argnums=2, keep_unused=True)
    def stream(a, b, previous):
        return a + 2 * b

    a, b, output = (jnp.full(array_bytes // 4, value, jnp.float32) for value in (1, 2, 3))

    def call() -> None:
        nonlocal output
        output = jax.block_until_ready(stream(a, b, output))

    return call


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
