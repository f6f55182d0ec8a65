"""`moe_mlp` on CPU: tokens are gathered straight into the windows of `pallas_kernels.windows`.

Rows never exist in the plan's order. Kept for the backward pass: the hidden layer of the windows; the hidden layer
of the blocks is computed again. The gate's gradient comes from the hidden width, ∂y/∂gate = a·(W_down ∂y), so the
experts' outputs are not kept. All gathers, no scatter.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.expert_products import bits, outer_product, product, product_transposed
from pallas_kernels.gather import take, take_valid
from pallas_kernels.moe_mlp import elementwise
from pallas_kernels.plan import Plan
from pallas_kernels.varying import zeros
from pallas_kernels.windows import Layout, Rows, add_at, collect, layout_of


def _swiglu(hidden: jax.Array) -> jax.Array:
    gated, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gated) * up


def _layout(plan: Plan, w_down: jax.Array, recompute: bool) -> Layout:
    """The windows and blocks; where memory is to be saved, turns of the loop that copy few experts' weights."""
    _, hidden, width = w_down.shape
    layout = layout_of(plan.group_sizes, plan.num_rows, weights_per_expert=3 * hidden * width)
    return layout.with_batch(2) if recompute else layout


_MANY_NUMBERS = 2**23
"""Numbers in the rows' arrays from which on windows are taken part by part: 32 MiB in float32."""

_CACHED_NUMBERS = 2**21
"""Weights converted to float32 at a time, where they are to be: 8 MiB."""


def _num_parts(recompute: bool, plan: Plan, w_down: jax.Array) -> int:
    """How many parts of the experts are to be taken one after the other.

    A part's weights are copied, and its gradients are held beside those of all. So there are more parts the more the
    weights weigh beside the rows' arrays (as the layer is defined: (N, D) twice and (N, F) thrice), and more with
    `recompute`, where less is held beside them. Without it they cost a tenth to a sixth of the time: one part does
    where the rows' arrays are small, or small beside the weights. XLA:CPU multiplies bfloat16 in float32: there
    parts are what the cache holds, a quarter of the experts at most, since a part's weights are converted.
    """
    experts, hidden, width = w_down.shape
    rows, weights = plan.num_rows * (2 * width + 3 * hidden), 3 * experts * hidden * width
    least = 1 if w_down.dtype == jnp.float32 else min(experts, max(4, weights // _CACHED_NUMBERS))
    if recompute:
        return max(least, 8 + 12 * weights // rows)
    return max(least, 4 + 4 * weights // rows) if rows >= max(_MANY_NUMBERS, 2 * weights // 3) else least


def _part_size(experts: int, parts: int) -> int:
    """Experts of a part: a divisor of E where there is one that is nearly as large as E / parts."""
    most = max(experts // parts, 1)
    return next((size for size in range(most, most // 2, -1) if experts % size == 0), most)


def _in_parts(parts: int, function, *arrays):
    """`function` of arrays over the experts, of about E / `parts` experts at a time.

    All parts are of one size; where it does not divide E, the last one begins earlier and repeats some experts.
    """
    experts = jax.tree.leaves(arrays)[0].shape[0]
    size = _part_size(experts, parts)
    if size == experts:
        return function(*arrays)

    def cut(first):
        return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, size), arrays)

    def step(i, outs):
        first = jnp.minimum(i * size, experts - size)
        return jax.tree.map(
            lambda out, part: jax.lax.dynamic_update_slice_in_dim(out, part, first, axis=0), outs, function(*cut(first))
        )

    like = jax.eval_shape(lambda: function(*cut(0)))
    outs = jax.tree.map(lambda part: zeros((experts, *part.shape[1:]), part.dtype, arrays), like)
    return jax.lax.fori_loop(0, -(-experts // size), step, outs)


def _tokens(plan: Plan, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Assignment and token of each row."""
    assignment = take(plan.order, rows.index)
    return assignment, assignment // plan.experts_per_token


def _experts(x_rows, w_gate_up, w_down):
    """(G, R, D) rows through G experts: hidden (G, R, 2F) in the dtype of x, output (G, R, D) float32."""
    hidden = product(x_rows, w_gate_up).astype(x_rows.dtype)
    return hidden, product(_swiglu(hidden).astype(x_rows.dtype), w_down)


def _experts_backward(x_rows, y_gradient, gate, hidden, w_gate_up, w_down):
    """Gradients of G experts: rows (G, R, D), gate (G, R), w_gate_up and w_down, all float32.

    Args:
      x_rows, y_gradient: (G, R, D); the gradient is that of the token, not yet weighted by its gate.
      gate: (G, R) float32.
      hidden: (G, R, 2F), before the nonlinearity.
    """
    from_output = product_transposed(y_gradient, w_down)
    weighted, hidden_gradient, gate_gradient = elementwise.hidden_gradient(hidden, from_output, gate)
    w_down_gradient = outer_product(weighted, y_gradient)
    x_gradient = product_transposed(hidden_gradient, w_gate_up)
    w_gate_up_gradient = outer_product(x_rows, hidden_gradient)
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
    layout = _layout(plan, w_down, recompute)
    rows, parts = layout.windows(), _num_parts(recompute, plan, w_down)
    bits_in, bits_out = bits(w_gate_up), bits(w_down)

    def window(rows, w_in, w_out):
        return _experts(take_valid(x, _tokens(plan, rows)[1], rows.valid), w_in, w_out)

    if recompute:
        hidden, window_out = None, _in_parts(parts, lambda *part: window(*part)[1], rows, bits_in, bits_out)
    else:
        hidden, window_out = _in_parts(parts, window, rows, bits_in, bits_out)

    def overflow(expert, rows, slot, block_out):
        x_rows = take_valid(x, _tokens(plan, rows)[1], rows.valid)
        _, out = _experts(x_rows, take(bits_in, expert), take(bits_out, expert))
        return jax.lax.dynamic_update_slice_in_dim(block_out, out.reshape(-1, out.shape[-1]), slot, axis=0)

    block_out = layout.for_blocks(overflow, zeros((layout.block_capacity, x.shape[1]), jnp.float32, window_out))
    slots = layout.slots(plan.inverse, plan.expert)
    weight = jnp.where(slots.in_window | slots.in_block, gate, 0).astype(jnp.float32)
    y = sum(weight[:, j, None] * collect(window_out, block_out, slots.choice(j)) for j in range(plan.experts_per_token))
    return y.astype(x.dtype), (x, plan, gate, w_gate_up, w_down, hidden)


def _backward(recompute, residuals, y_gradient):
    x, plan, gate, w_gate_up, w_down, hidden = residuals
    layout = _layout(plan, w_down, recompute)
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
        hidden = product(x_rows, w_in).astype(x.dtype)
        return _experts_backward(x_rows, y_rows, row_gate, hidden, w_in, w_out)

    windows, parts = layout.windows(), _num_parts(recompute, plan, w_down)
    bits_in, bits_out = bits(w_gate_up), bits(w_down)
    if recompute:
        of_windows = _in_parts(parts, again, windows, bits_in, bits_out)
    else:
        of_windows = _in_parts(
            parts,
            lambda rows, *part: _experts_backward(*gathered(rows), *part),
            windows,
            hidden,
            bits_in,
            bits_out,
        )
    window_x, window_gate, *weight_gradients = of_windows

    def overflow(expert, rows, slot, carry):
        block_x, block_gate, weight_gradients = carry
        x_part, gate_part, *weight_parts = again(rows, take(bits_in, expert), take(bits_out, expert))
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
