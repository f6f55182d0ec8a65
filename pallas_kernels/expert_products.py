"""Products of experts' rows with their matrices, in the forms that XLA:CPU is fast at; they sum in float32.

E experts, C rows of each, D and F the widths.
"""

import jax
import jax.numpy as jnp

FEW_ROWS = 48
"""Rows an expert up to which laying out a transposed matrix costs more than transposing the product."""


def bits(weights: jax.Array) -> jax.Array:
    """bfloat16 weights as uint16, which the products here take; others as they are.

    To take some experts' weights of. XLA:CPU takes slices and gathers of bfloat16 in float32, and converts the whole
    array for that, before the loop that does it.
    """
    return jax.lax.bitcast_convert_type(weights, jnp.uint16) if weights.dtype == jnp.bfloat16 else weights


def _numbers(weights: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(weights, jnp.bfloat16) if weights.dtype == jnp.uint16 else weights


def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """(E, C, D) x (E, D, F) to (E, C, F) float32."""
    return _einsum("ecd,edf->ecf", rows, _numbers(weights))


def product_transposed(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """(E, C, D) x (E, F, D) to (E, C, F) float32: with the transposed matrices, of which none is made.

    XLA:CPU lays the right operand of a product out anew, which is slow for one that is to be transposed: with 20 rows
    an expert four times as slow as the product itself. So the rows, which are few, are made the right operand, and what
    comes out is transposed. The barrier keeps XLA from turning that back into the product that was avoided.
    """
    weights = _numbers(weights)
    if rows.shape[1] > FEW_ROWS:
        return _einsum("ecd,efd->ecf", rows, weights)
    made = jax.lax.optimization_barrier(_einsum("efd,ecd->efc", weights, rows))
    return jax.lax.optimization_barrier(made.swapaxes(1, 2))


def outer_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """(E, C, D), (E, C, F) to (E, D, F) float32: summed over each expert's rows."""
    return _einsum("ecd,ecf->edf", left, right)


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
