"""Dispatch: (T, D) tokens to (N, D) rows grouped by expert."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import kernels, resolved_backend
from pallas_kernels.checks import require, require_float, require_rank
from pallas_kernels.execution import PLATFORMS, Target, target_of
from pallas_kernels.gather import take
from pallas_kernels.plan import Plan
from pallas_kernels.varying import alike


def dispatch(x: jax.Array, plan: Plan, *, backend: str = "auto") -> jax.Array:
    """Copies each token to the rows of its K experts.

    A gather; its gradient is a gather too (each token sums its K rows, in float32).

    Args:
      x: (T, D) float32 or bfloat16.
      plan: of the same T tokens.
      backend: `auto` or one of `BACKENDS`; all but the Pallas ones are one gather in XLA.

    Returns:
      (N, D) rows in the plan's order; rows of no expert are zero.

    Raises:
      ValueError: x is not (T, D) of the plan's T, or has another dtype; or a backend that cannot run here.
    """
    require_rank("x", x, "T D")
    require_float(x=x)
    require(
        x.shape[0] == plan.num_tokens,
        f"x has {x.shape[0]} tokens but the plan is for {plan.num_tokens}; they must be the same.",
    )
    target = target_of(resolved_backend(backend))
    if x.shape[0] == 0:
        return jnp.zeros((plan.num_rows, x.shape[1]), x.dtype)
    with jax.named_scope("dispatch"):
        return _dispatch(target, *alike(x, plan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(target: Target, x: jax.Array, plan: Plan) -> jax.Array:
    return gather_tokens(x, plan, target)


def _dispatch_forward(target, x, plan):
    return gather_tokens(x, plan, target), plan


def _dispatch_backward(target, plan, rows_gradient):
    return sum_rows(rows_gradient, plan, None, target), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def gather_tokens(x: jax.Array, plan: Plan, target: Target) -> jax.Array:
    """(T, D) to (N, D): each row's token, zero for rows of no expert."""
    if target.backend in PLATFORMS:
        rows = kernels("dispatch", target).gather_tokens(x, plan.token, plan.group_offsets[-1], target)
        if plan.block == 1:
            return rows
    else:
        rows = take(x, plan.token)
    return jnp.where(plan.routed[:, None], rows, 0)


def sum_rows(rows: jax.Array, plan: Plan, gate: jax.Array | None, target: Target) -> jax.Array:
    """(N, D) to (T, D): each token's K rows, summed in float32; rows of no expert count nothing."""
    if target.backend in PLATFORMS:
        return kernels("combine", target).sum_rows(rows, plan.inverse, plan.group_offsets[-1], gate, target)
    routed = plan.inverse < plan.group_offsets[-1]

    def choice(j):
        taken = take(rows, plan.inverse[:, j]).astype(jnp.float32)
        weighted = taken if gate is None else taken * gate[:, j, None].astype(jnp.float32)
        return jnp.where(routed[:, j, None], weighted, 0)

    return functools.reduce(jnp.add, map(choice, range(plan.experts_per_token))).astype(rows.dtype)
