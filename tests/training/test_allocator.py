"""The C library's allocator while training runs, in a process without the heap of other tests."""

import pathlib


def test_in_a_process_of_its_own(run_on_devices):
    run_on_devices(pathlib.Path(__file__).with_name("allocator_alone.py"), devices=1)
