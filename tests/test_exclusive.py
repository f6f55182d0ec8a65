"""Two processes never train in one run directory, and a killed one leaves it free."""

import os
import subprocess
import sys

import pytest

from jaxmoe import exclusive as exclusive_module
from jaxmoe.config import ConfigError
from jaxmoe.exclusive import LOCK_FILE, HeldElsewhereError, check_unused, exclusive

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


@pytest.fixture
def held_elsewhere(tmp_path):
    """A folder that a process holds which says that it is on another host; calling it ends that process."""
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{_HOLD}; time.sleep(60)", str(tmp_path / LOCK_FILE)], stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    (tmp_path / LOCK_FILE).write_text("process 7 on lost-host")

    def end():
        holder.kill()
        holder.wait()

    yield tmp_path, end
    end()
    holder.stdout.close()


def test_the_lock_of_another_host_is_waited_for(held_elsewhere, monkeypatch):
    """As the file server lets go of what a lost host held."""
    directory, end = held_elsewhere
    warned = []
    monkeypatch.setattr(exclusive_module.logger, "warning", lambda *said: (warned.append(said), end()))
    with exclusive(directory):
        assert f"process {os.getpid()} on" in (directory / LOCK_FILE).read_text()
    assert len(warned) == 1


def test_a_host_that_goes_on_holding_its_lock_is_an_error_that_may_pass(held_elsewhere, monkeypatch):
    directory, _ = held_elsewhere
    monkeypatch.setattr(exclusive_module, "_SECONDS_OF_A_LEASE", 0.2)
    message = "process 7 on lost-host is training in this folder"
    with pytest.raises(HeldElsewhereError, match=message), exclusive(directory):
        pass
    with pytest.raises(HeldElsewhereError):
        check_unused(directory, wait=True)


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
