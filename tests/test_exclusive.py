"""Two processes never train in one run directory, and a killed one leaves it free."""

import os
import subprocess
import sys

import pytest

from jaxmoe.config import ConfigError
from jaxmoe.exclusive import LOCK_FILE, check_unused, exclusive

_HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path):
    with (
        exclusive(tmp_path / "E8"),
        pytest.raises(ConfigError, match=f"E8: process {os.getpid()} on .* is training in this folder now"),
        exclusive(tmp_path / "E8"),
    ):
        pass
    with exclusive(tmp_path / "E8"):
        pass


def test_checking_leaves_nothing(tmp_path):
    check_unused(tmp_path / "E8")
    assert not (tmp_path / "E8").exists()


def test_a_killed_process_holds_nothing(tmp_path):
    command = [sys.executable, "-c", f"{_HOLD}; time.sleep(60)", str(tmp_path / LOCK_FILE)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process is training in this folder"):
            check_unused(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    check_unused(tmp_path)
    with exclusive(tmp_path):
        pass


def test_an_object_store_has_no_lock():
    with exclusive("gs://nowhere/E8"):
        check_unused("gs://nowhere/E8")
