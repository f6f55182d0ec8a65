"""How parameters are made: float32, normal, from the `params` stream; and the names of dtypes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxmoe.config import ModelConfig


def normal_parameter(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2).

    Drawn flat: the same numbers, but XLA:CPU takes several times longer to compile random bits with many axes.
    """
    return nnx.Param(std * jax.random.normal(rngs.params(), (math.prod(shape),), jnp.float32).reshape(shape))


def residual_output_std(config: ModelConfig) -> float:
    """Standard deviation for matrices that write to the residual stream: init_std / sqrt(2L) if `scaled`."""
    return config.init_std / math.sqrt(2 * config.num_layers) if config.residual_init == "scaled" else config.init_std


def dtype_name(dtype: DTypeLike) -> str:
    """`jnp.bfloat16`, `np.dtype("bfloat16")` and the like as "bfloat16"; a name stays as it is."""
    return dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
