"""`moe_mlp` from Pallas kernels.

Forward: gather, both up products and SwiGLU are one kernel; the down product; the gate-weighted sum. Backward: the
gradient of the hidden layer, one product, two weight gradients. Kept for the backward pass: the (N, 2F) products before
the nonlinearity, or nothing but the inputs with `recompute`, which computes them again for some of the rows at a time.
The gate's gradient comes from the hidden width, d y/d gate = a (W_down d y), so the experts' outputs are not kept.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.backend import kernels
from pallas_kernels.dispatch import api as dispatch_api
from pallas_kernels.execution import Target
from pallas_kernels.gather import take
from pallas_kernels.grouped_matmul import api as grouped_matmul_api
from pallas_kernels.plan import Plan

_PARTS = 4
"""Parts of the rows whose hidden layers are computed again one after the other."""

_LEAST_ROWS = 4096
"""Fewer rows than these are computed again at once, and so are hidden layers narrower than the rows: there is little to
save."""


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


class _Rows(NamedTuple):
    """Consecutive rows of the plan's order: their tokens, gates, and how many belong to each group.

    Attributes:
      token: (R,) int32.
      gate: (R,) float32.
      group_sizes: (E,) int32, of these rows.
    """

    token: jax.Array
    gate: jax.Array
    group_sizes: jax.Array


def _all_rows(plan: Plan, gate: jax.Array) -> _Rows:
    return _Rows(plan.token, take(gate.astype(jnp.float32).reshape(-1), plan.order), plan.group_sizes)


def _parts(rows: _Rows, count: int) -> _Rows:
    """The rows in `count` parts of equal length along a new first axis, the last one padded."""
    length = -(-rows.token.shape[0] // (128 * count)) * 128
    first = length * jnp.arange(count, dtype=jnp.int32)[:, None]
    ends = jnp.cumsum(rows.group_sizes, dtype=jnp.int32)
    inside = jnp.clip(ends, first, first + length) - jnp.clip(ends - rows.group_sizes, first, first + length)

    def cut(array):
        return jnp.pad(array, (0, count * length - array.shape[0])).reshape(count, length)

    return _Rows(cut(rows.token), cut(rows.gate), inside)


def _by_row(target, array, rows):
    """(T, D) to (R, D); on GPU it stays as it is, for the kernels look up each row's token."""
    if target.backend == "gpu":
        return array
    num_routed = jnp.sum(rows.group_sizes, dtype=jnp.int32)
    return kernels("dispatch", target).gather_tokens(array, rows.token, num_routed, target)


def _up(target, x, rows, w_gate_up, save_hidden):
    module = kernels("moe_mlp", target)
    return module.up(x, rows.token, w_gate_up, rows.group_sizes, target, save_hidden=save_hidden)


def _product_to_sum(target, rows, weights, group_sizes, transpose_weights):
    """The product, laid out so that its rows can be fetched one by one."""
    width = weights.shape[1 if transpose_weights else 2]
    if target.backend == "tpu" and width % 128 == 0:
        module = kernels("grouped_matmul", target)
        return module.product(rows, weights, group_sizes, transpose_weights, target, in_lanes=True)
    return grouped_matmul_api.product(rows, weights, group_sizes, transpose_weights, target)


def _hidden_gradient(target, y_rows, hidden, rows, w_down):
    """On the hidden width: activation times gate, gradient before the nonlinearity, and the gates' gradient by row."""
    module = kernels("moe_mlp", target)
    if target.backend == "gpu":
        return module.hidden_gradient(y_rows, rows.token, rows.gate, hidden, w_down, rows.group_sizes, target)
    return module.hidden_gradient(y_rows, hidden, rows.gate, w_down, rows.group_sizes, target)


def _weight_gradient(target, left, right, rows, previous, **by_token):
    """Of one product's weights; `by_token` names the operand that the GPU's kernel finds by its token."""
    gradient = kernels("grouped_matmul", target).weight_gradient
    if target.backend == "gpu":
        own = gradient(left, right, rows.group_sizes, target, token=rows.token, **by_token)
        return own if previous is None else (previous.astype(jnp.float32) + own.astype(jnp.float32)).astype(own.dtype)
    return gradient(left, right, rows.group_sizes, target, previous=previous)


def _forward(target, recompute, x, plan, gate, w_gate_up, w_down):
    activation, hidden = _up(target, x, _all_rows(plan, gate), w_gate_up, save_hidden=not recompute)
    out = _product_to_sum(target, activation, w_down, plan.group_sizes, transpose_weights=False)
    return dispatch_api.sum_rows(out, plan, gate, target), (x, plan, gate, w_gate_up, w_down, hidden)


def _rows_backward(target, x, y_gradient, hidden, rows, w_gate_up, w_down, previous=(None, None)):
    """Gradients of the rows' tokens, of their gates, and of the weights, added to the previous ones if there are any.

    The barriers keep what comes later from being gathered while what comes before still takes memory.
    """
    y_gradient, hidden = jax.lax.optimization_barrier((y_gradient, hidden))
    y_rows = _by_row(target, y_gradient, rows)
    weighted, hidden_gradient, gate_gradient = _hidden_gradient(target, y_rows, hidden, rows, w_down)
    w_down_gradient = _weight_gradient(target, weighted, y_rows, rows, previous[1], gradient_by_token=True)
    w_down_gradient, hidden_gradient, x = jax.lax.optimization_barrier((w_down_gradient, hidden_gradient, x))
    x_rows = _by_row(target, x, rows)
    w_gate_up_gradient = _weight_gradient(target, x_rows, hidden_gradient, rows, previous[0], rows_by_token=True)
    w_gate_up_gradient, hidden_gradient = jax.lax.optimization_barrier((w_gate_up_gradient, hidden_gradient))
    rows_gradient = _product_to_sum(target, hidden_gradient, w_gate_up, rows.group_sizes, transpose_weights=True)
    return rows_gradient, gate_gradient, (w_gate_up_gradient, w_down_gradient)


def _takes_parts(target: Target, num_rows: int, experts: int, width: int, hidden: int) -> bool:
    """Whether hidden layers of N rows of D numbers, F of them hidden, are computed again part by part.

    The TPU's kernel adds a part's weight gradients in place. On GPU a second set of them is held meanwhile, so parts
    save memory only where the rows' arrays outweigh both.
    """
    if target.backend == "gpu" and num_rows * (2 * width + 3 * hidden) < 2 * 3 * experts * width * hidden:
        return False
    return num_rows >= _LEAST_ROWS and 2 * hidden >= width


def _in_parts(target, x, y_gradient, rows, w_gate_up, w_down):
    """As `_rows_backward`, the hidden layer computed again for one part of the rows after the other."""

    def step(weight_gradients, part):
        _, hidden = _up(target, x, part, w_gate_up, save_hidden=True)
        *of_rows, weight_gradients = _rows_backward(
            target, x, y_gradient, hidden, part, w_gate_up, w_down, weight_gradients
        )
        return weight_gradients, of_rows

    if target.backend == "tpu" and x.shape[1] % 128 == 0:  # laid out for fetching rows once, not in each turn
        x, y_gradient = (array.reshape(-1, x.shape[1] // 128, 128) for array in (x, y_gradient))
    zeros = jnp.zeros_like(w_gate_up), jnp.zeros_like(w_down)
    weight_gradients, of_rows = jax.lax.scan(step, zeros, _parts(rows, _PARTS))
    return *(array.reshape(-1, *array.shape[2:]) for array in of_rows), weight_gradients


def _backward(target, recompute, residuals, y_gradient):
    x, plan, gate, w_gate_up, w_down, hidden = residuals
    rows = _all_rows(plan, gate)
    experts, hidden_width, width = w_down.shape
    if recompute and _takes_parts(target, plan.num_rows, experts, width, hidden_width):
        rows_gradient, row_gate_gradient, weight_gradients = _in_parts(target, x, y_gradient, rows, w_gate_up, w_down)
    else:
        if recompute:
            _, hidden = _up(target, x, rows, w_gate_up, save_hidden=True)
        rows_gradient, row_gate_gradient, weight_gradients = _rows_backward(
            target, x, y_gradient, hidden, rows, w_gate_up, w_down
        )
    x_gradient = dispatch_api.sum_rows(rows_gradient, plan, None, target)
    routed = plan.inverse < plan.group_offsets[-1]
    gate_gradient = jnp.where(routed, take(row_gate_gradient, plan.inverse), 0).astype(gate.dtype)
    w_gate_up_gradient, w_down_gradient = weight_gradients
    return (
        x_gradient,
        None,
        gate_gradient,
        w_gate_up_gradient.astype(w_gate_up.dtype),
        w_down_gradient.astype(w_down.dtype),
    )


moe_mlp.defvjp(_forward, _backward)
