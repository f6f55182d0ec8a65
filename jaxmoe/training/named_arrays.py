"""A state as named arrays, which is how a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Leaf = jax.Array | jax.ShapeDtypeStruct


def named_arrays(state: Any) -> dict[str, Leaf]:
    """The leaves of a state by name; random keys as the numbers they are made of.

    Args:
      state: of arrays, or of `jax.ShapeDtypeStruct`s that say where each is to go (`sharding`).
    """
    return {_name(path): _as_numbers(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def rebuilt(arrays: Mapping[str, jax.Array], like: Any) -> Any:
    """The inverse of `named_arrays`, in the structure of `like`."""

    def leaf(path: tuple, old: Leaf) -> jax.Array:
        new = arrays[_name(path)]
        return jax.random.wrap_key_data(new, impl=_key_implementation(old)) if _is_key(old) else new

    return jax.tree_util.tree_map_with_path(leaf, like)


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Names with slashes as nested dictionaries."""
    root: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        place = root
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = array
    return root


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found


def _name(path: tuple) -> str:
    """`params/stacks/0/blocks/0/mlp/down`: where a leaf stands in the state."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")


def _is_key(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_implementation(leaf: Leaf) -> Any:
    return leaf.dtype._impl if isinstance(leaf, jax.ShapeDtypeStruct) else jax.random.key_impl(leaf)


def _as_numbers(leaf: Leaf) -> Leaf:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        numbers = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)
