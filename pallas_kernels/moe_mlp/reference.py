"""The definition of `moe_mlp`: the operations' definitions, one after the other."""

import jax
import jax.numpy as jnp

from pallas_kernels.combine.reference import combine
from pallas_kernels.dispatch.reference import dispatch
from pallas_kernels.grouped_matmul.reference import grouped_matmul
from pallas_kernels.plan import Plan


def moe_mlp(x: jax.Array, plan: Plan, gate: jax.Array, w_gate_up: jax.Array, w_down: jax.Array) -> jax.Array:
    """SwiGLU of each routed row with its expert's weights, combined by the gate."""
    hidden = grouped_matmul(dispatch(x, plan), w_gate_up, plan.group_sizes)
    gated, up = jnp.split(hidden, 2, axis=1)
    return combine(grouped_matmul(jax.nn.silu(gated) * up, w_down, plan.group_sizes), plan, gate)
