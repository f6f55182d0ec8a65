"""Fingerprints: the same number on a device and on the host, another one after any change."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.training.fingerprints import fingerprint_on_host, fingerprints, fingerprints_of_save
from jaxmoe.training.host_copies import HostCopies


def noise(shape, dtype, seed=0):
    words = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    return words.view(dtype)[..., 0] if dtype != np.bool_ else (words % 2).astype(np.bool_)[..., 0]


# 40,000 elements are more than are multiplied at a time.
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 3, 11), (40_000,)])
def test_the_host_and_the_device_agree(shape):
    arrays = {
        str(dtype): noise(shape, dtype)
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint32, np.int8, np.bool_)
    }
    found = np.asarray(fingerprints({name: jnp.asarray(array) for name, array in arrays.items()}))
    assert found.tolist() == [fingerprint_on_host(array) for array in arrays.values()]


def test_those_of_a_save_are_those_that_a_restore_compares():
    arrays = {"a": jnp.asarray(noise((300, 200), np.float32)), "b": jnp.asarray(noise((9,), np.int32, seed=1))}
    assert fingerprints_of_save(arrays, HostCopies().of(arrays))().tolist() == np.asarray(fingerprints(arrays)).tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 69_999), st.integers(0, 69_999), st.integers(0, 31))
def test_a_flipped_bit_and_two_exchanged_elements_show(first, second, bit):
    array = noise((70_000,), np.uint32)
    before = fingerprint_on_host(array)
    array[first] ^= np.uint32(1 << bit)
    assert fingerprint_on_host(array) != before
    array[first] ^= np.uint32(1 << bit)
    array[[first, second]] = array[[second, first]]
    # The places' difference, doubled, times the elements' difference is 0 modulo 2^32 for one pair in a great many.
    differs = 2 * (first - second) * (int(array[first]) - int(array[second])) % 2**32 != 0
    assert (fingerprint_on_host(array) != before) == differs
