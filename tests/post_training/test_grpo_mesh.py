"""GRPO on a mesh of 8 devices, in a process of its own."""

import pathlib


def test_grpo_on_eight_devices(run_on_devices):
    """Everything in `grpo_on_eight_devices.py`."""
    run_on_devices(pathlib.Path(__file__).with_name("grpo_on_eight_devices.py"))
