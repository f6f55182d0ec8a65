"""`moe_mlp` from Pallas kernels.

Forward: gather, both up products and SwiGLU are one kernel; the down product; the gate-weighted sum. Backward: two
products, two weight gradients, and the elementwise part, which XLA fuses (on GPU it ends the first product's kernel).
Kept for the backward pass: the (N, 2F) products before the nonlinearity, or nothing but the inputs with `recompute`.
The gate's gradient comes from the hidden width, d y/d gate = a (W_down d y), so the experts' outputs are not kept.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import kernels
from pallas_kernels.dispatch.api import gather_tokens, sum_rows
from pallas_kernels.execution import Target
from pallas_kernels.gather import take
from pallas_kernels.grouped_matmul.api import product, weight_gradient
from pallas_kernels.plan import Plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def moe_mlp(
    target: Target,
    recompute: bool,
    x: jax.Array,
    plan: Plan,
    gate: jax.Array,
    w_gate_up: jax.Array,
    w_down: jax.Array,
) -> jax.Array:
    """As `pallas_kernels.moe_mlp`, for a plan.

    Args:
      target: of a Pallas backend.
      recompute: compute the up products again in the backward pass instead of keeping them.
    """
    del recompute
    return _forward(target, True, x, plan, gate, w_gate_up, w_down)[0]


def _up(target, x, plan, w_gate_up, save_hidden):
    module = kernels("moe_mlp", target)
    return module.up(x, plan.token, w_gate_up, plan.group_sizes, target, save_hidden=save_hidden)


def _summed_product(target, rows, weights, plan, gate, transpose_weights):
    """The product, and each token's sum over its K rows of it."""
    width = weights.shape[1 if transpose_weights else 2]
    if target.backend == "tpu" and width % 128 == 0:  # rows written so that they can be fetched one by one
        module = kernels("grouped_matmul", target)
        out = module.product(rows, weights, plan.group_sizes, transpose_weights, target, in_lanes=True)
    else:
        out = product(rows, weights, plan.group_sizes, transpose_weights, target)
    return sum_rows(out, plan, gate, target)


def _forward(target, recompute, x, plan, gate, w_gate_up, w_down):
    activation, hidden = _up(target, x, plan, w_gate_up, save_hidden=not recompute)
    y = _summed_product(target, activation, w_down, plan, gate, transpose_weights=False)
    return y, (x, plan, gate, w_gate_up, w_down, hidden)


def _by_row(target, array, plan):
    """(T, D) to (N, D); on GPU it stays as it is, for the kernels look up each row's token."""
    return array if target.backend == "gpu" else gather_tokens(array, plan, target)


def _hidden_gradient(target, y_rows, plan, row_gate, hidden, w_down):
    """On the hidden width: activation times gate, gradient before the nonlinearity, and the gates' gradient by row."""
    if target.backend == "gpu":
        module = kernels("moe_mlp", target)
        return module.hidden_gradient(y_rows, plan.token, row_gate, hidden, w_down, plan.group_sizes, target)
    from_output = product(y_rows, w_down, plan.group_sizes, True, target).astype(jnp.float32)
    row_gate = row_gate[:, None]
    gated, up = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
    sigmoid = jax.nn.sigmoid(gated)
    silu = gated * sigmoid
    activation = silu * up
    weighted = (row_gate * activation).astype(y_rows.dtype)
    activation_gradient = row_gate * from_output
    hidden_gradient = jnp.concatenate(
        [activation_gradient * up * (sigmoid * (1 + gated * (1 - sigmoid))), activation_gradient * silu], axis=1
    ).astype(y_rows.dtype)
    return weighted, hidden_gradient, jnp.sum(activation * from_output, axis=1)


def _weight_gradients(target, x_rows, y_rows, plan, weighted, hidden_gradient):
    """Of gate and up, and of down."""
    if target.backend == "gpu":
        gradient = functools.partial(kernels("grouped_matmul", target).weight_gradient, token=plan.token)
        return (
            gradient(x_rows, hidden_gradient, plan.group_sizes, target, rows_by_token=True),
            gradient(weighted, y_rows, plan.group_sizes, target, gradient_by_token=True),
        )
    return (
        weight_gradient(x_rows, hidden_gradient, plan.group_sizes, target),
        weight_gradient(weighted, y_rows, plan.group_sizes, target),
    )


def _backward(target, recompute, residuals, y_gradient):
    x, plan, gate, w_gate_up, w_down, hidden = residuals
    if recompute:
        _, hidden = _up(target, x, plan, w_gate_up, save_hidden=True)
    y_rows = _by_row(target, y_gradient, plan)
    row_gate = take(gate.astype(jnp.float32).reshape(-1), plan.order)
    weighted, hidden_gradient, row_gate_gradient = _hidden_gradient(target, y_rows, plan, row_gate, hidden, w_down)
    x_gradient = _summed_product(target, hidden_gradient, w_gate_up, plan, None, transpose_weights=True)
    w_gate_up_gradient, w_down_gradient = _weight_gradients(
        target, _by_row(target, x, plan), y_rows, plan, weighted, hidden_gradient
    )
    routed = plan.inverse < plan.group_offsets[-1]
    gate_gradient = jnp.where(routed, take(row_gate_gradient, plan.inverse), 0).astype(gate.dtype)
    return (
        x_gradient,
        None,
        gate_gradient,
        w_gate_up_gradient.astype(w_gate_up.dtype),
        w_down_gradient.astype(w_down.dtype),
    )


moe_mlp.defvjp(_forward, _backward)
