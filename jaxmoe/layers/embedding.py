"""Token embedding. V vocabulary, D width."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmoe.layers.parameters import normal_parameter
from jaxmoe.sharding import gathered


class Embedding(nnx.Module):
    """A table of V vectors.

    Args:
      vocab_size: V.
      width: D.
      init_std: standard deviation of the normal initialization.
      compute_dtype: of what is returned.
    """

    def __init__(
        self, vocab_size: int, width: int, *, init_std: float = 0.02, compute_dtype: str = "float32", rngs: nnx.Rngs
    ):
        self.compute_dtype = compute_dtype
        self.table = normal_parameter(rngs, (vocab_size, width), init_std, axes=("vocabulary", "width"))

    def __call__(self, tokens: Int[Array, "*tokens"]) -> Float[Array, "*tokens D"]:
        """The vectors of `tokens`, each in [0, V); another number gives NaN, so that it cannot pass unseen."""
        table = gathered(self.table[...], "vocabulary", "width")
        return jnp.take(table, tokens, axis=0, mode="fill").astype(self.compute_dtype)
