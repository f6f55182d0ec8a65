"""`moe_mlp` on CPU: tokens are gathered straight into the windows of `pallas_kernels.windows`.

Rows never exist in the plan's order. Kept for the backward pass: the hidden layer of the windows; the hidden layer
of the blocks is computed again. The gate's gradient comes from the hidden width, ∂y/∂gate = a·(W_down ∂y), so the
experts' outputs are not kept. All gathers, no scatter.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gather import take, take_valid
from pallas_kernels.moe_mlp import elementwise
from pallas_kernels.plan import Plan
from pallas_kernels.varying import zeros
from pallas_kernels.windows import Layout, Rows, add_at, collect, layout_of


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _swiglu(hidden: jax.Array) -> jax.Array:
    gated, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gated) * up


def _layout(plan: Plan, w_down: jax.Array) -> Layout:
    _, hidden, width = w_down.shape
    return layout_of(plan.group_sizes, plan.num_rows, weights_per_expert=3 * hidden * width)


_PARTS = 8
"""The most parts of the experts whose windows are taken one after the other where memory is to be saved."""


def _in_parts(function, *arrays):
    """`function` of arrays over the experts, of as many experts at a time as divide E into up to `_PARTS` parts."""
    experts = jax.tree.leaves(arrays)[0].shape[0]
    parts = max(count for count in range(1, _PARTS + 1) if experts % count == 0)
    cut = jax.tree.map(lambda array: array.reshape(parts, experts // parts, *array.shape[1:]), arrays)
    return jax.tree.map(
        lambda array: array.reshape(experts, *array.shape[2:]), jax.lax.map(lambda part: function(*part), cut)
    )


_MANY_NUMBERS = 2**25


def _rows_outweigh(plan: Plan, w_down: jax.Array) -> bool:
    """Whether the rows' arrays, (N, D) twice and (N, F) thrice, are large and more than twice the weights.

    Then windows are taken part by part, which halves the memory for about an eighth of the time: a part's weights are
    copied, little beside the arrays of its rows.
    """
    experts, hidden, width = w_down.shape
    return plan.num_rows * (2 * width + 3 * hidden) >= max(_MANY_NUMBERS, 2 * 3 * experts * hidden * width)


def _tokens(plan: Plan, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Assignment and token of each row."""
    assignment = take(plan.order, rows.index)
    return assignment, assignment // plan.experts_per_token


def _experts(x_rows, w_gate_up, w_down):
    """(G, R, D) rows through G experts: hidden (G, R, 2F) in the dtype of x, output (G, R, D) float32."""
    hidden = _einsum("ecd,edf->ecf", x_rows, w_gate_up).astype(x_rows.dtype)
    return hidden, _einsum("ecf,efd->ecd", _swiglu(hidden).astype(x_rows.dtype), w_down)


def _experts_backward(x_rows, y_gradient, gate, hidden, w_gate_up, w_down):
    """Gradients of G experts: rows (G, R, D), gate (G, R), w_gate_up and w_down, all float32.

    Args:
      x_rows, y_gradient: (G, R, D); the gradient is that of the token, not yet weighted by its gate.
      gate: (G, R) float32.
      hidden: (G, R, 2F), before the nonlinearity.
    """
    from_output = _einsum("ecd,efd->ecf", y_gradient, w_down)
    weighted, hidden_gradient, gate_gradient = elementwise.hidden_gradient(hidden, from_output, gate)
    w_down_gradient = _einsum("ecf,ecd->efd", weighted, y_gradient)
    x_gradient = _einsum("ecf,edf->ecd", hidden_gradient, w_gate_up)
    w_gate_up_gradient = _einsum("ecd,ecf->edf", x_rows, hidden_gradient)
    return x_gradient, gate_gradient, w_gate_up_gradient, w_down_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def moe_mlp(
    recompute: bool, x: jax.Array, plan: Plan, gate: jax.Array, w_gate_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    """As `pallas_kernels.moe_mlp`, for a plan.

    Args:
      recompute: keep nothing but the inputs, and take the windows part by part, forward and backward; the backward
        pass computes each part's up product again.
    """
    return _forward(recompute, x, plan, gate, w_gate_up, w_down)[0]


def _forward(recompute, x, plan, gate, w_gate_up, w_down):
    layout = _layout(plan, w_down)
    rows = layout.windows()

    def window(rows, w_in, w_out):
        return _experts(take_valid(x, _tokens(plan, rows)[1], rows.valid), w_in, w_out)

    if recompute:
        hidden, window_out = None, _in_parts(lambda *part: window(*part)[1], rows, w_gate_up, w_down)
    elif _rows_outweigh(plan, w_down):
        hidden, window_out = _in_parts(window, rows, w_gate_up, w_down)
    else:
        hidden, window_out = window(rows, w_gate_up, w_down)

    def overflow(expert, rows, slot, block_out):
        x_rows = take_valid(x, _tokens(plan, rows)[1], rows.valid)
        _, out = _experts(x_rows, take(w_gate_up, expert), take(w_down, expert))
        return jax.lax.dynamic_update_slice_in_dim(block_out, out.reshape(-1, out.shape[-1]), slot, axis=0)

    block_out = layout.for_blocks(overflow, zeros((layout.block_capacity, x.shape[1]), jnp.float32, window_out))
    slots = layout.slots(plan.inverse, plan.expert)
    weight = jnp.where(slots.in_window | slots.in_block, gate, 0).astype(jnp.float32)
    y = sum(weight[:, j, None] * collect(window_out, block_out, slots.choice(j)) for j in range(plan.experts_per_token))
    return y.astype(x.dtype), (x, plan, gate, w_gate_up, w_down, hidden)


def _backward(recompute, residuals, y_gradient):
    x, plan, gate, w_gate_up, w_down, hidden = residuals
    layout = _layout(plan, w_down)
    flat_gate = gate.astype(jnp.float32).reshape(-1)

    def gathered(rows):
        assignment, token = _tokens(plan, rows)
        return (
            take_valid(x, token, rows.valid),
            take_valid(y_gradient, token, rows.valid),
            take_valid(flat_gate, assignment, rows.valid),
        )

    def again(rows, w_in, w_out):
        x_rows, y_rows, row_gate = gathered(rows)
        hidden = _einsum("ecd,edf->ecf", x_rows, w_in).astype(x.dtype)
        return _experts_backward(x_rows, y_rows, row_gate, hidden, w_in, w_out)

    windows = layout.windows()
    if recompute:
        of_windows = _in_parts(again, windows, w_gate_up, w_down)
    elif _rows_outweigh(plan, w_down):
        of_windows = _in_parts(
            lambda rows, *part: _experts_backward(*gathered(rows), *part), windows, hidden, w_gate_up, w_down
        )
    else:
        of_windows = _experts_backward(*gathered(windows), hidden, w_gate_up, w_down)
    window_x, window_gate, *weight_gradients = of_windows

    def overflow(expert, rows, slot, carry):
        block_x, block_gate, weight_gradients = carry
        x_part, gate_part, *weight_parts = again(rows, take(w_gate_up, expert), take(w_down, expert))
        return (
            jax.lax.dynamic_update_slice_in_dim(block_x, x_part.reshape(-1, x.shape[1]), slot, axis=0),
            jax.lax.dynamic_update_slice_in_dim(block_gate, gate_part.reshape(-1), slot, axis=0),
            [add_at(total, expert, part) for total, part in zip(weight_gradients, weight_parts, strict=True)],
        )

    block_x, block_gate, (w_gate_up_gradient, w_down_gradient) = layout.for_blocks(
        overflow,
        (
            zeros((layout.block_capacity, x.shape[1]), jnp.float32, window_x),
            zeros((layout.block_capacity,), jnp.float32, window_gate),
            weight_gradients,
        ),
    )
    slots = layout.slots(plan.inverse, plan.expert)
    gate_gradient = collect(window_gate, block_gate, slots)
    x_gradient = sum(collect(window_x, block_x, slots.choice(j)) for j in range(plan.experts_per_token))
    return (
        x_gradient.astype(x.dtype),
        None,
        gate_gradient.astype(gate.dtype),
        w_gate_up_gradient.astype(w_gate_up.dtype),
        w_down_gradient.astype(w_down.dtype),
    )


moe_mlp.defvjp(_forward, _backward)
