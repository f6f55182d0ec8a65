"""When one of two processes fails or is lost, the other ends, too, in time and with a status that says what to do."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile

import jax
import pytest

from experiments.launchers.job import PREEMPTED, as_preempted
from jaxmoe import ending
from jaxmoe.ending import lost_another

LOST_AFTER = 10

_PROCESS = """
import sys, time
from jaxmoe.ending import ending_together
from jaxmoe.processes import connect, told_by_all

connect(lost_after_seconds=int(sys.argv[1]))
with ending_together(OSError):
    told_by_all("ready", "yes")
    print("ready", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise OSError("the disk is gone")
    time.sleep(300)
"""


@pytest.fixture
def two_processes(monkeypatch):
    """Two processes that are connected and wait, and what each said; what is written to one is its command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]  # a pipe may fill
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _PROCESS, str(LOST_AFTER)], env={**shared, "JAX_PROCESS_ID": str(number)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )
            for number, file in enumerate(errors)
        ]  # fmt: skip

        def said(number: int) -> str:
            errors[number].seek(0)
            return errors[number].read()

        try:
            for number, process in enumerate(processes):
                assert process.stdout.readline() == "ready\n", said(number)
            yield processes, said
        finally:
            for process in processes:
                process.kill()
                process.communicate()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_tells_the_other_which_fails_with_it(two_processes, failing):
    processes, said = two_processes
    processes[failing].stdin.write("fail\n")
    processes[failing].stdin.flush()
    assert processes[1 - failing].wait(timeout=300) == 1
    assert f"process {failing} failed: OSError: the disk is gone" in said(1 - failing)
    assert processes[failing].wait(timeout=300) == 1
    assert said(failing).endswith("failed: the disk is gone\n")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_falls_silent_is_lost_in_time_and_the_other_is_to_be_started_again(two_processes, lost):
    """As a host is that hangs or is cut off: its connections stay open. JAX's runtime ends the other one."""
    processes, _ = two_processes
    processes[lost].send_signal(signal.SIGSTOP)
    status = processes[1 - lost].wait(timeout=250)  # of the 300 for which it would live by itself
    assert as_preempted(status, processes=2) == PREEMPTED


def test_an_error_of_what_is_computed_together_says_that_another_process_is_lost(monkeypatch):
    broken = "UNKNOWN: Gloo all-reduce failed: [gloo/pair.cc:538] Read error [127.0.0.1]:9: Connection reset by peer"
    assert not lost_another(jax.errors.JaxRuntimeError(broken)), "alone, there is no other"
    monkeypatch.setattr(ending, "alone", lambda: False)
    assert lost_another(jax.errors.JaxRuntimeError(broken))
    assert not lost_another(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"))
    assert not lost_another(ConnectionResetError("Connection reset by peer")), "of storage"
    assert not lost_another(None)
