"""What `jax.shard_map(check_vma=True)` wants to know: along which axes of the mesh an array differs between devices.

A Pallas call has to say it of its outputs, a loop of what it starts with, and a custom VJP returns gradients that vary
like what they belong to. So the public operations make all of their arrays vary alike first; the transpose of that sums
the gradient of what was the same on several devices. Outside `shard_map`, and without its check, no array varies and
nothing here does anything.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def axes_of(*trees) -> frozenset[str]:
    """The mesh's axes along which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(trees)))


def vary(tree: Tree, axes: frozenset[str]) -> Tree:
    """The arrays, varying along these axes too."""

    def cast(array):
        missing = axes - axes_of(array)
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(cast, tree) if axes else tree


def alike(*trees):
    """The arrays, each varying along every axis along which one of them does."""
    axes = axes_of(trees)
    return tuple(vary(tree, axes) for tree in trees)


def struct(shape: tuple[int, ...], dtype, *like) -> jax.ShapeDtypeStruct:
    """Of an output that is computed from the arrays `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes_of(like)))


def zeros(shape: tuple[int, ...], dtype, *like) -> jax.Array:
    """Zeros, for what is to be added up from the arrays `like`."""
    return vary(jnp.zeros(shape, dtype), axes_of(like))
