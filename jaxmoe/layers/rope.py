"""Rotary position embedding, half-split form (Su et al. 2021; the layout of GPT-NeoX and Llama).

S sequence.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(
    positions: Int[Array, "... S"], head_dim: int, theta: float = 10_000.0
) -> tuple[Float[Array, "... S half"], Float[Array, "... S half"]]:
    """Cosine and sine of position · theta^(-2i/head_dim) for i in [0, head_dim/2), float32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "... head_dim"],
    cosine: Float[Array, "#... half"],
    sine: Float[Array, "#... half"],
) -> Float[Array, "... head_dim"]:
    """Rotates the pairs (x[i], x[i + head_dim/2]) by the given angles, in float32.

    Args:
      x: queries or keys.
      cosine, sine: from `rope_angles`, broadcastable to x without its last axis' second half.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)
