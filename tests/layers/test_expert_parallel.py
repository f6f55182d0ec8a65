"""Expert parallelism, in a process with eight devices."""

import pathlib


def test_on_eight_devices(run_on_devices):
    run_on_devices(pathlib.Path(__file__).with_name("expert_parallel_on_devices.py"))
