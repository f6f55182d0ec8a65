"""How parameters are made: float32, normal, from the `params` stream; and the names of dtypes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxmoe.config import ModelConfig
from jaxmoe.sharding import partitioning_in_use


def normal_parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], std: float, *, axes: tuple[str | None, ...] | None = None
) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2); the same numbers on every mesh.

    Args:
      rngs: the `params` stream draws.
      shape: of the parameter.
      std: standard deviation.
      axes: logical name of each axis (see `jaxmoe.sharding.RULES`), kept as the variable's `logical_axes`; None for
        a parameter that is not spread.
    """
    metadata = {} if axes is None else {"logical_axes": axes}
    # Drawn flat on one device: the same numbers, but XLA:CPU takes several times longer to compile random bits with
    # many axes. On a mesh that would draw the whole parameter on every device.
    drawn = (math.prod(shape),) if partitioning_in_use() is None else shape
    return nnx.Param(std * jax.random.normal(rngs.params(), drawn, jnp.float32).reshape(shape), **metadata)


def residual_output_std(config: ModelConfig) -> float:
    """Standard deviation for matrices that write to the residual stream: init_std / sqrt(2L) if `scaled`."""
    return config.init_std / math.sqrt(2 * config.num_layers) if config.residual_init == "scaled" else config.init_std


def dtype_name(dtype: DTypeLike) -> str:
    """`jnp.bfloat16`, `np.dtype("bfloat16")` and the like as "bfloat16"; a name stays as it is."""
    return dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
