"""Training on meshes: in a process with 8 devices, and in two processes with 2 devices each."""

import pathlib


def test_training_on_eight_devices(run_on_devices):
    """Everything in `on_eight_devices.py`."""
    run_on_devices(pathlib.Path(__file__).with_name("on_eight_devices.py"))


def test_training_in_two_processes(run_on_devices):
    """One mesh of `on_eight_devices.py` over the devices of both."""
    run_on_devices(pathlib.Path(__file__).with_name("on_eight_devices.py"), devices=2, processes=2)
