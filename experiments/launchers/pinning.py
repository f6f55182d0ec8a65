"""Shares of this machine: which cores and which devices each of several jobs gets."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

from jaxmoe.config import ConfigError

_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclasses.dataclass(frozen=True)
class Share:
    """What one job may use.

    Attributes:
      cores: numbers of the cores; empty where the system cannot pin processes.
      devices: numbers of the accelerators; empty for all that there are, or for none.
      kind: of the devices.
    """

    cores: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    kind: str = "none"

    def environment(self) -> dict[str, str]:
        """Variables that keep JAX to the devices, and XLA:CPU's threads to the cores."""
        variables = {"NPROC": str(len(self.cores))} if self.cores else {}
        numbers = ",".join(map(str, self.devices))
        if self.kind == "cuda":
            variables["CUDA_VISIBLE_DEVICES"] = numbers
        if self.kind == "tpu":
            variables |= {
                "TPU_VISIBLE_CHIPS": numbers,
                "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[len(self.devices)],
                "TPU_PROCESS_BOUNDS": "1,1,1",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            }
        return variables

    def __str__(self) -> str:
        parts = [f"cores {','.join(map(str, self.cores))}"] if self.cores else []
        parts += [f"{self.kind} {','.join(map(str, self.devices))}"] if self.devices else []
        return ", ".join(parts) or "not pinned"


def shares(parallel: int, devices: str = "auto") -> list[Share]:
    """Equal shares of this machine's cores and devices for `parallel` jobs at a time.

    Args:
      parallel: how many.
      devices: `auto` looks for GPUs (CUDA_VISIBLE_DEVICES is respected) and TPU chips, `none` leaves them alone,
        `cuda:0,1,2,3` or `tpu:0,1,2,3` names them.

    Raises:
      ConfigError: there is too little to share, or the devices are not written like that.
    """
    kind, numbers = _devices(devices)
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for what, count in (("cores", len(available)), (f"{kind} devices", len(numbers))):
        if 0 < count < parallel:
            raise ConfigError(f"--parallel={parallel}, but there are {count} {what}; choose 1..{count}.")
    if parallel < 1:
        raise ConfigError(f"--parallel={parallel}; at least one job at a time is needed.")
    each = len(numbers) // parallel
    if kind == "tpu" and each not in _TPU_BOUNDS:
        raise ConfigError(
            f"--parallel={parallel} leaves {each} of {len(numbers)} TPU chips to each job; 1, 2, 4 or 8 can be used."
        )
    return [
        Share(
            cores=tuple(available[job * len(available) // parallel : (job + 1) * len(available) // parallel]),
            devices=numbers[job * each : (job + 1) * each],
            kind=kind,
        )
        for job in range(parallel)
    ]


def _devices(text: str) -> tuple[str, tuple[int, ...]]:
    if text == "auto":
        return _found()
    if text == "none":
        return "none", ()
    if not re.fullmatch(r"(cuda|tpu):\d+(,\d+)*", text):
        raise ConfigError(f"--devices={text}; auto, none, cuda:0,1,2,3 or tpu:0,1,2,3 is needed.")
    kind, _, numbers = text.partition(":")
    return kind, tuple(map(int, numbers.split(",")))


def _found() -> tuple[str, tuple[int, ...]]:
    """The accelerators of this machine, found without starting JAX, which would take them."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "none", ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.fullmatch(r"\d+(,\d+)*", visible):
        return "cuda", tuple(map(int, visible.split(",")))
    if visible is None and (gpus := _numbered("/dev", r"nvidia(\d+)")):
        return "cuda", gpus
    chips = _numbered("/dev", r"accel(\d+)") or _numbered("/dev/vfio", r"(\d+)")
    return ("tpu", tuple(range(len(chips)))) if chips else ("none", ())


def _numbered(folder: str, pattern: str) -> Sequence[int]:
    names = [path.name for path in pathlib.Path(folder).iterdir()] if pathlib.Path(folder).is_dir() else []
    return tuple(sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name))))
