"""Inside `jax.shard_map` with its check of what varies between devices."""

import pathlib

import pytest


@pytest.mark.slow
def test_on_two_devices(run_on_devices):
    """Everything in `on_two_devices.py`."""
    run_on_devices(pathlib.Path(__file__).with_name("on_two_devices.py"), devices=2)
