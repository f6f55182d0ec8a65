"""The definition of `combine`."""

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan


def combine(rows: jax.Array, plan: Plan, gate: jax.Array) -> jax.Array:
    r"""$y_t = \sum_j gate_{tj} rows_{inverse_{tj}}$ in float32, over the choices that were routed."""
    routed = plan.inverse < plan.group_offsets[-1]
    weighted = gate.astype(jnp.float32)[:, :, None] * rows[plan.inverse].astype(jnp.float32)
    return jnp.where(routed[:, :, None], weighted, 0).sum(axis=1).astype(rows.dtype)
