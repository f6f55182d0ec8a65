"""Timing that holds on a noisy machine: contenders take turns, medians are quoted, CPU seconds beside wall seconds."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: medians over the rounds, and the fastest round."""

    wall: float
    cpu: float
    fastest: float


def interleaved(contenders: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Times each contender `rounds` times, taking turns, so that drift of the machine's speed hits all alike.

    Args:
      contenders: by name; a call must return only when its work is done.
      rounds: timed calls of each.
      warmup: untimed calls of each, first.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    return {
        name: Timing(statistics.median(wall[name]), statistics.median(cpu[name]), min(wall[name]))
        for name in contenders
    }


def import_seconds(statement: str, *, rounds: int = 7) -> float:
    """Median wall seconds of `python -c statement` less those of an empty program, in fresh processes."""

    def once(program: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        return time.perf_counter() - started

    once(statement)
    pairs = [(once(statement), once("pass")) for _ in range(rounds)]
    return statistics.median(full - empty for full, empty in pairs)


def peak_bytes() -> int:
    """Most memory that this program has held, in bytes.

    Linux's `ru_maxrss` is inherited from the process that started this one, so its own high-water mark is read.
    """
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> dict[str, str | int]:
    """What a figure has to be read with: processor, cores and versions."""
    import jax
    import jaxlib

    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "cores": cores,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
