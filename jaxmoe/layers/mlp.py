"""The dense SwiGLU MLP. D width, F hidden width."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmoe.layers.parameters import dtype_name, normal_parameter
from jaxmoe.sharding import constrain, gathered, partitioning_in_use


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
        compute_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        self.compute_dtype = dtype_name(compute_dtype)
        self.gate_up = normal_parameter(rngs, (width, 2 * hidden), init_std, axes=("width", "hidden"))
        self.down = normal_parameter(
            rngs, (hidden, width), init_std if output_init_std is None else output_init_std, axes=("hidden", "width")
        )

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate_up, down = (weight[...].astype(self.compute_dtype) for weight in (self.gate_up, self.down))
        with jax.named_scope("dense_mlp"):
            if partitioning_in_use() is None:
                return gated_product(x.astype(self.compute_dtype) @ gate_up, down)
            gate_up, down = gathered(gate_up, "width", "hidden"), gathered(down, "hidden", "width")
            # Stored, gate and up stand one after the other; a device needs the same units of both.
            gate_up = constrain(gate_up.reshape(gate_up.shape[0], 2, -1), None, None, "hidden")
            return gated_product(jnp.einsum("...d,dgf->...gf", x.astype(self.compute_dtype), gate_up), down)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated_product(hidden: Float[Array, "... 2F"], down: Float[Array, "F D"]) -> Float[Array, "... D"]:
    """The gated hidden states times `down`. The backward pass keeps `hidden` alone and gates it again.

    Args:
      hidden: gate and up one after the other, or along an axis of their own, (..., 2, F).
      down: the projection back.
    """
    if hidden.shape[-1] == down.shape[0]:
        gate, up = hidden[..., 0, :], hidden[..., 1, :]
    else:
        gate, up = jnp.split(hidden, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ down
