"""Argument checks shared by the operations: errors in the caller's terms."""

import jax
import jax.numpy as jnp

FLOAT_DTYPES = ("float32", "bfloat16")


def require(condition: bool, message: str) -> None:
    """Raises `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_rank(name: str, array: jax.Array, axes: str) -> None:
    """`axes` is the expected shape in axis letters, such as `T K`."""
    rank = len(axes.split())
    require(array.ndim == rank, f"{name} has shape {tuple(array.shape)}; ({', '.join(axes.split())}) is expected.")


def require_float(**arrays: jax.Array) -> None:
    """Arrays by the names of the arguments: each of one of `FLOAT_DTYPES`."""
    for name, array in arrays.items():
        require(
            jnp.dtype(array.dtype).name in FLOAT_DTYPES,
            f"{name} has dtype {jnp.dtype(array.dtype).name}; choose one of {', '.join(FLOAT_DTYPES)}.",
        )


def require_native_dtype(backend: str, **arrays: jax.Array) -> None:
    """`cpu_native` is compiled for one dtype."""
    for name, array in arrays.items():
        require(
            backend != "cpu_native" or array.dtype == jnp.float32,
            f"{name} has dtype {array.dtype} but backend='cpu_native' is float32 alone; choose backend='cpu', or cast.",
        )


def require_same_dtype(**arrays: jax.Array) -> None:
    """Arrays by the names of the arguments: all of the first one's dtype."""
    (first, first_array), *others = arrays.items()
    for name, array in others:
        require(
            array.dtype == first_array.dtype,
            f"{name} has dtype {array.dtype} but {first} has {first_array.dtype}; cast one of them.",
        )
