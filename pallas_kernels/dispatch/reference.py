"""The definition of `dispatch`."""

import jax
import jax.numpy as jnp

from pallas_kernels.plan import Plan


def dispatch(x: jax.Array, plan: Plan) -> jax.Array:
    """Row n is the token of assignment `plan.order[n]`, zero for rows of no expert."""
    return jnp.where(plan.routed[:, None], x[plan.order // plan.experts_per_token], 0)
