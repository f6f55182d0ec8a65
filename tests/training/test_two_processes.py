"""Two processes agree on what each of them finds."""

import pathlib


def test_in_two_processes(run_on_devices, tmp_path, monkeypatch):
    """Everything in `in_two_processes.py`."""
    monkeypatch.setenv("SHARED_PATH", str(tmp_path))
    run_on_devices(pathlib.Path(__file__).with_name("in_two_processes.py"), devices=1, processes=2)
