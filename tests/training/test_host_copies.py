"""Copies of a state on the host: right, independent of it, and on a CPU in the same memory every time."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.training.host_copies import HostCopies


def test_later_copies_are_written_over_the_first():
    copies = HostCopies()
    double = jax.jit(lambda arrays: jax.tree.map(lambda array: 2 * array, arrays), donate_argnums=0)
    state = {"a": jnp.arange(300_000, dtype=jnp.float32), "b": jnp.arange(3, dtype=jnp.uint32)}
    places = []
    for factor in (1, 2, 4):
        found = copies.of(state)
        state = double(state)  # which may write over what is still being copied
        np.testing.assert_array_equal(found["a"], factor * np.arange(300_000, dtype=np.float32))
        np.testing.assert_array_equal(found["b"], factor * np.arange(3, dtype=np.uint32))
        places.append({name: copy.unsafe_buffer_pointer() for name, copy in found.items()})
    assert places[0] == places[1] == places[2]


def test_what_is_still_read_is_left_alone():
    copies = HostCopies()
    read = np.asarray(copies.of({"a": jnp.zeros(1000)})["a"])
    copies.of({"a": jnp.ones(1000)})
    assert not read.any()
