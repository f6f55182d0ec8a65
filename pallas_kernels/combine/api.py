"""Combine: (N, D) rows back to (T, D) tokens, weighted by the gate."""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import require, require_float, require_rank
from pallas_kernels.dispatch.api import sum_rows
from pallas_kernels.gather import take
from pallas_kernels.plan import Plan


def combine(rows: jax.Array, plan: Plan, gate: jax.Array) -> jax.Array:
    """Sums each token's K rows, weighted by its gate.

    Gathers forward and backward; the sum over K and the gate's gradient are taken in float32.

    Args:
      rows: (N, D) float32 or bfloat16, in the plan's order.
      plan: of T tokens.
      gate: (T, K) float32 or bfloat16; its entries for choices of no expert are not read.

    Returns:
      (T, D) in the dtype of `rows`; zero for a token that no expert took.

    Raises:
      ValueError: rows or gate do not fit the plan, or have another dtype.
    """
    require_rank("rows", rows, "N D")
    require_float(rows=rows, gate=gate)
    require(
        rows.shape[0] == plan.num_rows,
        f"rows has {rows.shape[0]} rows but the plan has N = {plan.num_rows}; they must be the same.",
    )
    require(
        gate.shape == plan.inverse.shape,
        f"gate has shape {tuple(gate.shape)}; (T, K) = {tuple(plan.inverse.shape)} of the plan is expected.",
    )
    with jax.named_scope("combine"):
        return _combine(rows, plan, gate)


@jax.custom_vjp
def _combine(rows: jax.Array, plan: Plan, gate: jax.Array) -> jax.Array:
    return sum_rows(rows, plan, gate)


def _combine_forward(rows, plan, gate):
    return sum_rows(rows, plan, gate), (rows, plan, gate)


def _combine_backward(residuals, y_gradient):
    rows, plan, gate = residuals
    routed_rows = jnp.arange(plan.num_rows) < plan.group_offsets[-1]
    row_gate = take(gate.reshape(-1), plan.order).astype(jnp.float32)
    y_rows = take(y_gradient, plan.order // plan.experts_per_token).astype(jnp.float32)
    rows_gradient = jnp.where(routed_rows[:, None], row_gate[:, None] * y_rows, 0).astype(rows.dtype)
    row_products = jnp.sum(rows.astype(jnp.float32) * y_rows, axis=1)
    routed = plan.inverse < plan.group_offsets[-1]
    gate_gradient = jnp.where(routed, take(row_products, plan.inverse), 0).astype(gate.dtype)
    return rows_gradient, None, gate_gradient


_combine.defvjp(_combine_forward, _combine_backward)
