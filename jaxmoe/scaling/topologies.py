"""Slices of accelerators by name, described without having one: `v5p:4x4x4`, `h100:64`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jaxmoe.config import ConfigError
from pallas_kernels import execution, targets

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a maker says of one device (JAX's: a core where a chip has two of them).

    Attributes:
      name: as topologies begin.
      platform: whose compiler.
      kernels: chip that kernels are made for (`pallas_kernels.execution.CHIPS`).
      flops: bfloat16 operations a second, dense.
      memory: bytes of its memory; the compiler keeps a part of a TPU's for itself.
      bandwidth: bytes a second of its memory.
      interconnect: bytes a second that it receives from the others of its slice or node, all links together.
      network: bytes a second that it receives over the data-centre network, about.
      dimensions: of a slice; 0 for a number of GPUs.
      least: smallest slice that the compiler describes.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    kernels: str
    flops: float
    memory: int
    bandwidth: float
    interconnect: float
    network: float
    dimensions: int = 0
    least: tuple[int, ...] = ()


# Google Cloud's pages on v4, v5e, v5p, v6e and TPU7x: half of the bidirectional bandwidth of a chip's links, and its
# share of the data-centre network. The page on v4 has neither: six links of 50 GB/s (Jouppi et al. 2023, table 4), and
# about 100 Gb/s for a host of four chips (PaLM, Chowdhery et al. 2022, section 4). NVIDIA's data sheets (B200: that of
# HGX B200, and DGX B200's 180 GB): NVLink in one direction, and one 400 Gb/s adapter for each GPU.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", "v4", 275e12, 32 * GIB, 1200e9, 300e9, 3.125e9, 3, (2, 2, 1)),
        Chip("v5e", "tpu", "v5e", 197e12, 16 * GIB, 819e9, 200e9, 3.125e9, 2, (2, 2)),
        Chip("v5p", "tpu", "v5p", 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9, 3, (2, 2, 1)),
        Chip("v6e", "tpu", "v6e", 918e12, 32 * GIB, 1638e9, 400e9, 12.5e9, 2, (2, 2)),
        # JAX has two devices on a chip; these are of one.
        Chip("tpu7x", "tpu", "tpu7x", 2307e12 / 2, 192 * GIB // 2, 7380e9 / 2, 300e9, 6.25e9, 3, (2, 2, 1)),
        Chip("h100", "cuda", "h100", 989e12, 80 * 10**9, 3352e9, 450e9, 50e9),
        Chip("h200", "cuda", "h100", 989e12, 141 * 10**9, 4800e9, 450e9, 50e9),
        Chip("b200", "cuda", "b200", 2250e12, 180 * 10**9, 8000e9, 900e9, 50e9),
    )
}

EXAMPLES = ("v4:4x4x4", "v5e:4x4", "v5p:4x4x4", "v6e:16x16", "tpu7x:4x4x4", "h100:8", "h100:64", "h200:8", "b200:8")
_GPUS_OF_A_NODE = 8
_WITHOUT_A_POD = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked for a pod that is not there
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    "TPU_WORKER_HOSTNAMES": "localhost",  # or libtpu complains of missing ones
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that programs can be compiled for.

    Attributes:
      name: as given.
      chip: of every device.
      devices: abstract ones, of all slices.
      slices: of TPUs, how many; 1 for GPUs, whose nodes are in the name.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    slices: int

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Kernels traced inside are made for these devices."""
        with execution.compiling_for(self.chip.kernels):
            yield


def describe_topology(name: str, slices: int = 1) -> Topology:
    """The devices that a name stands for.

    Args:
      name: `CHIP:AxBxC`, chips along each direction of a TPU slice, or `CHIP:N` GPUs.
      slices: how many such slices, connected by the data-centre network.

    Raises:
      ConfigError: an unknown chip or shape (the known are listed), or a compiler that is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise ConfigError(f"--topology={name}: unknown chip {kind!r}. Known: {', '.join(CHIPS)}. {_examples()}")
    chip = CHIPS[kind]
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ConfigError(f"--topology={name}: no shape can be read after the chip. {_examples()}")
    sizes = tuple(map(int, shape.split("x")))
    try:
        devices = _gpus(chip, sizes, slices) if chip.platform == "cuda" else _tpus(name, chip, sizes, slices)
    except targets.CompilerMissing as error:
        raise ConfigError(f"--topology={name}: {error}") from error
    return Topology(name, chip, devices, slices)


def _examples() -> str:
    return f"A topology is written like {', '.join(EXAMPLES)}."


def _tpus(name: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Sequence[Any]:
    from jax.experimental import topologies

    if len(sizes) != chip.dimensions or math.prod(sizes) < math.prod(chip.least):
        least = "x".join(map(str, chip.least))
        wanted = f"{chip.name} has {chip.dimensions} directions, {least} or more"
        raise ConfigError(f"--topology={name}: {wanted}. {_examples()}")
    for variable, value in _WITHOUT_A_POD.items():
        os.environ.setdefault(variable, value)
    options = targets.TPU_OPTIONS.get(chip.name, {})
    try:
        return topologies.get_topology_desc(name, platform="tpu", num_slices=slices, **options).devices
    except Exception as error:  # libtpu missing, or a shape that it does not know, in many classes
        text = str(error).splitlines()[0]
        if "libtpu" in text.lower() or "TPU_LIBRARY_PATH" in text:
            missing = f"libtpu is not at hand ({text}); pip install 'jaxmoe[compile]' brings it."
            raise targets.CompilerMissing(missing) from error
        refused = f"--topology={name}: the TPU compiler describes no such slice ({text})."
        raise ConfigError(f"{refused} {_examples()}") from error


def _gpus(chip: Chip, sizes: tuple[int, ...], slices: int) -> Sequence[Any]:
    from jax.experimental import topologies

    count = math.prod(sizes)
    if len(sizes) != 1 or (count > _GPUS_OF_A_NODE and count % _GPUS_OF_A_NODE):
        shape = "x".join(map(str, sizes))
        wanted = f"a number of GPUs, up to {_GPUS_OF_A_NODE} or a multiple of {_GPUS_OF_A_NODE}"
        raise ConfigError(f"--topology={chip.name}:{shape}: choose {wanted}. {_examples()}")
    if slices != 1:
        raise ConfigError(f"--slices={slices}: of TPU slices only; nodes of GPUs are in the number, {chip.name}:64.")
    targets.use_gpu_compiler()
    nodes, each = max(1, count // _GPUS_OF_A_NODE), min(count, _GPUS_OF_A_NODE)
    return topologies.get_topology_desc(
        topology_name=chip.name,
        platform="cuda",
        target_config=targets.gpu_description(chip.name),
        topology=f"1x{nodes}x{each}",
    ).devices
