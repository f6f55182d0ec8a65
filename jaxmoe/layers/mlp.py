"""The dense SwiGLU MLP. D width, F hidden width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmoe.layers.parameters import normal_parameter


class DenseMLP(nnx.Module):
    r"""$(\mathrm{silu}(x W_g) \odot x W_u) W_d$, no bias (Shazeer 2020); gate and up stored as one matrix.

    Args:
      width: D.
      hidden: F.
      init_std: of gate and up; `output_init_std` of down, None for the same.
      compute_dtype: of the matrix products.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        init_std: float = 0.02,
        output_init_std: float | None = None,
        compute_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.compute_dtype = compute_dtype
        self.gate_up = normal_parameter(rngs, (width, 2 * hidden), init_std)
        self.down = normal_parameter(rngs, (hidden, width), init_std if output_init_std is None else output_init_std)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(self.compute_dtype)
        gate, up = jnp.split(x @ self.gate_up[...].astype(self.compute_dtype), 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ self.down[...].astype(self.compute_dtype)
