"""Root-mean-square normalization. D width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def rms_normalize(x: Float[Array, "... D"], scale: Float[Array, "#... D"], epsilon: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32, in the dtype of x."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    r"""$x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot \mathrm{scale}$ (Zhang and Sennrich 2019).

    Args:
      width: D, the size of the last axis.
      epsilon: added to the mean square.
      rngs: unused (the scale starts at one); taken so that every layer is made alike.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs | None = None):
        del rngs
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_normalize(x, self.scale[...], self.epsilon)
