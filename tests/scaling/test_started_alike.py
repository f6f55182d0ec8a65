"""Processes that were not started alike say so before anything is built."""

import pathlib


def test_in_two_processes(run_on_devices):
    """Everything in `started_alike_in_two_processes.py`."""
    run_on_devices(pathlib.Path(__file__).with_name("started_alike_in_two_processes.py"), devices=1, processes=2)
