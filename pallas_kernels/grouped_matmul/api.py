"""Grouped matmul: consecutive groups of rows, each times its own matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import kernels, resolved_backend
from pallas_kernels.checks import require, require_float, require_native_dtype, require_rank, require_same_dtype
from pallas_kernels.execution import PLATFORMS, Target, target_of
from pallas_kernels.grouped_matmul import cpu_native, ragged_dot, reference, xla_cpu
from pallas_kernels.varying import alike

_XLA = {"cpu": xla_cpu, "cpu_native": cpu_native, "ragged_dot": ragged_dot}


def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_weights: bool = False,
    backend: str = "auto",
) -> jax.Array:
    """Multiplies the rows of group e with `weights[e]`.

    Args:
      rows: (N, D) float32 or bfloat16; the first group_sizes[0] rows are group 0, and so on.
      weights: (E, D, F), or (E, F, D) with `transpose_weights`; dtype of `rows`.
      group_sizes: (E,) int32, their sum at most N. Under jit, where nobody can check, a negative size counts as zero
        and the groups end at N.
      transpose_weights: multiply with the transposed matrices.
      backend: `auto` or one of `BACKENDS`.

    Returns:
      (N, F) in the dtype of `rows`, summed in float32. Rows past the groups are zero, and so are their gradients.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown backend or one that cannot run here, or, where the
        values are known (outside jit), negative sizes or a sum above N.
    """
    target = target_of(resolved_backend(backend))
    _check(rows, weights, group_sizes, transpose_weights)
    require_native_dtype(target.backend, rows=rows)
    if rows.shape[0] == 0:
        return jnp.zeros((0, weights.shape[1 if transpose_weights else 2]), rows.dtype)
    group_sizes = _within(group_sizes, rows.shape[0])
    with jax.named_scope("grouped_matmul"):
        if target.backend == "reference":
            matrices = weights.swapaxes(1, 2) if transpose_weights else weights
            return reference.grouped_matmul(rows, matrices, group_sizes)
        return _grouped_matmul(target, transpose_weights, *alike(rows, weights, group_sizes))


def _check(rows, weights, group_sizes, transpose_weights):
    require_rank("rows", rows, "N D")
    require_rank("weights", weights, "E F D" if transpose_weights else "E D F")
    require_rank("group_sizes", group_sizes, "E")
    require_float(rows=rows, weights=weights)
    require_same_dtype(rows=rows, weights=weights)
    require(
        jnp.issubdtype(group_sizes.dtype, jnp.integer),
        f"group_sizes has dtype {group_sizes.dtype}; an integer dtype is expected.",
    )
    require(weights.shape[0] >= 1, f"weights has shape {tuple(weights.shape)}; at least one expert is needed.")
    contracted = 2 if transpose_weights else 1
    require(
        weights.shape[contracted] == rows.shape[1],
        f"rows has width D={rows.shape[1]} but weights has shape {tuple(weights.shape)}, whose axis {contracted} "
        f"must be {rows.shape[1]} (transpose_weights={transpose_weights}).",
    )
    require(
        group_sizes.shape[0] == weights.shape[0],
        f"group_sizes names {group_sizes.shape[0]} groups but weights has E={weights.shape[0]} experts.",
    )
    if not isinstance(group_sizes, jax.core.Tracer):
        sizes = np.asarray(group_sizes)
        require(
            sizes.min(initial=0) >= 0 and sizes.sum() <= rows.shape[0],
            f"group_sizes={sizes.tolist()} with sum {sizes.sum()}; sizes of at least 0 with a sum of at most "
            f"N={rows.shape[0]} are expected.",
        )


def _within(group_sizes, num_rows):
    """Sizes that kernels may trust: int32, none negative, their sum at most N."""
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes.astype(jnp.int32), 0)), num_rows)
    return jnp.diff(ends, prepend=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(target, transpose_weights, rows, weights, group_sizes):
    return product(rows, weights, group_sizes, transpose_weights, target)


def _forward(target, transpose_weights, rows, weights, group_sizes):
    return product(rows, weights, group_sizes, transpose_weights, target), (rows, weights, group_sizes)


def _backward(target, transpose_weights, residuals, out_gradient):
    rows, weights, group_sizes = residuals
    rows_gradient = product(out_gradient, weights, group_sizes, not transpose_weights, target)
    operands = (out_gradient, rows) if transpose_weights else (rows, out_gradient)
    weights_gradient = weight_gradient(*operands, group_sizes, target).astype(weights.dtype)
    return rows_gradient, weights_gradient, None


_grouped_matmul.defvjp(_forward, _backward)


def product(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transpose_weights: bool, target: Target
) -> jax.Array:
    """(N, D) x (E, D, F) to (N, F) by the target's backend; with `transpose_weights` the weights are (E, F, D)."""
    if target.backend in PLATFORMS:
        module = kernels("grouped_matmul", target)
        return module.product(rows, weights, group_sizes, transpose_weights, target)
    return _XLA[target.backend].product(rows, weights, group_sizes, transpose_weights)


def weight_gradient(rows: jax.Array, out_gradient: jax.Array, group_sizes: jax.Array, target: Target) -> jax.Array:
    """(N, D), (N, F) to (E, D, F) by the target's backend, summed in float32."""
    if target.backend in PLATFORMS:
        return kernels("grouped_matmul", target).weight_gradient(rows, out_gradient, group_sizes, target)
    return _XLA[target.backend].weight_gradient(rows, out_gradient, group_sizes)
