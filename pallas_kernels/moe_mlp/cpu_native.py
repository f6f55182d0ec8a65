"""`moe_mlp` on CPU by the compiled kernels of `pallas_kernels.native`: one call forward, one backward.

Rows are taken expert by expert in pieces that fit the cache; each weight is read where it lies, and nothing is padded
to a window. Kept for the backward pass: the hidden layer (N, 2F).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.plan import Plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def moe_mlp(
    recompute: bool, x: jax.Array, plan: Plan, gate: jax.Array, w_gate_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    """As `pallas_kernels.moe_mlp`, for a plan, in float32.

    Args:
      recompute: keep nothing but the inputs; the backward pass computes the up product again.
    """
    return _forward(recompute, x, plan, gate, w_gate_up, w_down)[0]


def _forward(recompute, x, plan, gate, w_gate_up, w_down):
    rows, (_, hidden, width) = plan.num_rows, w_down.shape
    y, of_rows, _ = native.call(
        "Forward", (x.shape, (rows, 2 * hidden), (rows, width)),
        x, gate.astype(jnp.float32), plan.order, plan.inverse, plan.group_offsets, w_gate_up, w_down,
    )  # fmt: skip
    return y, (x, plan, gate, w_gate_up, w_down, None if recompute else of_rows)


def _backward(recompute, residuals, y_gradient):
    x, plan, gate, w_gate_up, w_down, of_rows = residuals
    rows, (_, hidden, width) = plan.num_rows, w_down.shape
    if recompute:
        # After the gradient of y is there: else XLA may take the one of the forward pass, and keep it.
        x_again, _ = jax.lax.optimization_barrier((x, y_gradient))
        (of_rows,) = native.call(
            "Hidden", ((rows, 2 * hidden),), x_again, plan.order, plan.inverse, plan.group_offsets, w_gate_up
        )
    x_gradient, gate_gradient, w_gate_up_gradient, w_down_gradient, *_ = native.call(
        "Backward",
        (x.shape, gate.shape, w_gate_up.shape, w_down.shape, (rows, 2 * hidden), (rows, hidden), (rows, width)),
        x, y_gradient, gate.astype(jnp.float32), plan.order, plan.inverse, plan.group_offsets, of_rows, w_gate_up,
        w_down, in_place={6: 4},  # the hidden layer becomes its gradient
        past_cache=np.bool_(w_gate_up.size + w_down.size >= native.CACHED_NUMBERS),
    )  # fmt: skip
    return x_gradient, None, gate_gradient.astype(gate.dtype), w_gate_up_gradient, w_down_gradient


moe_mlp.defvjp(_forward, _backward)
