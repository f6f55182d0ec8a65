"""Combine: (N, D) rows back to (T, D) tokens, weighted by the gate."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import resolved_backend
from pallas_kernels.checks import require, require_float, require_rank
from pallas_kernels.dispatch.api import gather_tokens, sum_rows
from pallas_kernels.execution import Target, target_of
from pallas_kernels.gather import take
from pallas_kernels.plan import Plan
from pallas_kernels.varying import alike


def combine(rows: jax.Array, plan: Plan, gate: jax.Array | None, *, backend: str = "auto") -> jax.Array:
    """Sums each token's K rows, weighted by its gate.

    Gathers forward and backward; the sum over K and the gate's gradient are taken in float32.

    Args:
      rows: (N, D) float32 or bfloat16, in the plan's order.
      plan: of T tokens.
      gate: (T, K) float32 or bfloat16; its entries for choices of no expert are not read. None: rows that are weighted
        already, whose gradient does not need the rows.
      backend: `auto` or one of `BACKENDS`; all but the Pallas ones are K gathers in XLA.

    Returns:
      (T, D) in the dtype of `rows`; zero for a token that no expert took.

    Raises:
      ValueError: rows or gate do not fit the plan, or have another dtype; or a backend that cannot run here.
    """
    require_rank("rows", rows, "N D")
    require_float(rows=rows)
    require(
        rows.shape[0] == plan.num_rows,
        f"rows has {rows.shape[0]} rows but the plan has N = {plan.num_rows}; they must be the same.",
    )
    if gate is not None:
        require_float(gate=gate)
        require(
            gate.shape == plan.inverse.shape,
            f"gate has shape {tuple(gate.shape)}; (T, K) = {tuple(plan.inverse.shape)} of the plan is expected.",
        )
    target = target_of(resolved_backend(backend))
    if plan.num_tokens == 0:
        return jnp.zeros((0, rows.shape[1]), rows.dtype)
    with jax.named_scope("combine"):
        if gate is None:
            return _sum(target, *alike(rows, plan))
        return _combine(target, *alike(rows, plan, gate))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(target: Target, rows: jax.Array, plan: Plan) -> jax.Array:
    return sum_rows(rows, plan, None, target)


def _sum_forward(target, rows, plan):
    return sum_rows(rows, plan, None, target), plan


def _sum_backward(target, plan, y_gradient):
    return gather_tokens(y_gradient, plan, target), None


_sum.defvjp(_sum_forward, _sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(target: Target, rows: jax.Array, plan: Plan, gate: jax.Array) -> jax.Array:
    return sum_rows(rows, plan, gate, target)


def _combine_forward(target, rows, plan, gate):
    return sum_rows(rows, plan, gate, target), (rows, plan, gate)


def _combine_backward(target, residuals, y_gradient):
    rows, plan, gate = residuals
    row_gate = take(gate.reshape(-1), plan.order).astype(jnp.float32)
    y_rows = gather_tokens(y_gradient, plan, target).astype(jnp.float32)
    rows_gradient = jnp.where(plan.routed[:, None], row_gate[:, None] * y_rows, 0).astype(rows.dtype)
    row_products = jnp.sum(rows.astype(jnp.float32) * y_rows, axis=1)
    routed = plan.inverse < plan.group_offsets[-1]
    gate_gradient = jnp.where(routed, take(row_products, plan.inverse), 0).astype(gate.dtype)
    return rows_gradient, None, gate_gradient


_combine.defvjp(_combine_forward, _combine_backward)
