"""Gathers along the first axis, without the bounds checks that `array[index]` compiles to."""

import jax
import jax.numpy as jnp


def take(array: jax.Array, index: jax.Array) -> jax.Array:
    """`array[index]` along the first axis, for indices known to be in bounds."""
    return array.at[index].get(mode="promise_in_bounds")


def take_valid(array: jax.Array, index: jax.Array, valid: jax.Array) -> jax.Array:
    """`array[index]` where valid, else zero; `valid` has the shape of `index`."""
    return jnp.where(valid.reshape(valid.shape + (1,) * (array.ndim - 1)), take(array, index), 0)
