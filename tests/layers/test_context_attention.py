"""Attention of sequences over devices: the order of their chunks here, the numbers on eight devices."""

import pathlib

from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.layers.context_attention import travels, zigzag_order


@given(devices=st.integers(1, 64))
def test_every_device_has_equal_work(devices):
    """Chunk c of queries meets c + 1 chunks of keys, the last of them half."""
    order = zigzag_order(devices)
    assert sorted(order) == list(range(2 * devices))
    assert {order[2 * device] + 1 + order[2 * device + 1] + 1 for device in range(devices)} == {2 * devices + 1}


@given(devices=st.integers(1, 64))
def test_both_chunks_of_a_device_travel_by_permutations_to_where_they_are_computed(devices):
    order = zigzag_order(devices)
    for parity, route in enumerate(travels(devices)):
        assert [here for here, _ in route] == sorted(there for _, there in route) == list(range(devices))
        assert all(2 * here + parity in order[2 * there : 2 * there + 2] for here, there in route)


def test_sequences_on_eight_devices(run_on_devices):
    run_on_devices(pathlib.Path(__file__).with_name("attention_on_eight_devices.py"))
