"""Checkpoints and meshes of 8 devices, in a process of its own."""

import pathlib


def test_checkpoints_on_eight_devices(run_on_devices):
    """Everything in `huggingface_on_eight_devices.py`."""
    run_on_devices(pathlib.Path(__file__).with_name("huggingface_on_eight_devices.py"))
