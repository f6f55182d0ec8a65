"""Chips that kernels are compiled for on a machine that has none: XLA's own compilers, without a device.

TPU needs libtpu (the `compile` extra). GPU needs jax's CUDA plugin, and nvcc for ptxas, in a folder of their own
(`COMPILERS`): in site-packages of a machine without a GPU the plugin complains whenever jax starts.
"""

import functools
import importlib
import importlib.util
import os
import pathlib
import sys
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

TPU_TOPOLOGIES = {
    "v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"
}  # fmt: skip
"""The smallest topology of each chip that libtpu describes."""

TPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
"""What libtpu has to be told beside a topology's name: that a chip's two cores are one device, as a v4 starts up."""

COMPILERS = pathlib.Path(os.environ.get("PALLAS_KERNELS_COMPILERS", pathlib.Path(sys.prefix) / "compilers"))
"""Where `pip install --target` put jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12."""


class Gpu(NamedTuple):
    """What CUDA says of a card and differs between those here; XLA reads limits and speeds from it.

    Attributes:
      name: of the device.
      capability: compute capability, major and minor.
      cores: streaming multiprocessors.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      l2_cache: bytes.
      clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int
    bandwidth: int
    l2_cache: int
    clock: float


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 84978434048, 3352320000000, 52428800, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 150121545728, 4800000000000, 52428800, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 191514411008, 7672320000000, 132644864, 1.965),
}
"""Cards that programs can be compiled for, in the figures of XLA's own descriptions (its target_config/specs)."""

# The limits that the cards share.
_GPU = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: %(cores)d
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: %(bandwidth)d
  l2_cache_size: %(l2_cache)d
  clock_rate_ghz: %(clock)g
  device_memory_size: %(memory)d
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: %(major)d minor: %(minor)d }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "%(name)s"
"""


def gpu_description(card: str) -> str:
    """A card of `GPUS` as XLA's `target_config`."""
    major, minor = GPUS[card].capability
    return _GPU % (GPUS[card]._asdict() | {"major": major, "minor": minor})


class CompilerMissing(RuntimeError):
    """The compiler of a chip is not installed; the message says what to install."""


@functools.cache
def use_gpu_compiler() -> None:
    """Makes jax's CUDA plugin known, as a compiler: it is initialized after the backends, and becomes none of them.

    Raises:
      CompilerMissing: it is neither installed nor in `COMPILERS`.
    """
    jax.devices()  # the backends are settled, with an installed plugin among them where there is a GPU
    if _has("jax_plugins.xla_cuda12") or _has("jax_plugins.xla_cuda13"):
        return
    sys.path.append(str(COMPILERS))
    importlib.invalidate_caches()
    if not _has("jax_plugins.xla_cuda12"):
        sys.path.remove(str(COMPILERS))
        raise CompilerMissing(
            f"the compiler for GPU is not at hand; pip install --target {COMPILERS} --no-deps "
            f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12 brings it."
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the libraries that only a run needs are not there
    os.environ.setdefault("MOSAIC_GPU_RUNTIME_LIB_PATH", str(COMPILERS / "jax_cuda12_plugin/libmosaic_gpu_runtime.so"))
    importlib.import_module("jax_plugins.xla_cuda12").initialize()


def _has(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


@functools.cache
def devices_of(chip: str, topology: str | None = None) -> list[jax.Device]:
    """Abstract devices of a chip: arrays spread over them lower and compile for them.

    Args:
      chip: one of `execution.CHIPS`.
      topology: as the compiler names it, `v5p:4x4x4`, or hosts and devices of GPUs, `1x1x8`; None for the smallest.

    Raises:
      CompilerMissing: libtpu or the CUDA plugin is not installed.
      KeyError: an unknown chip.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked for a pod that is not there
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once
    try:
        if chip in GPUS:
            use_gpu_compiler()
            description = topologies.get_topology_desc(
                topology_name=chip, platform="cuda", target_config=gpu_description(chip), topology=topology or "1x1x1"
            )
        else:
            name, options = topology or TPU_TOPOLOGIES[chip], TPU_OPTIONS.get(chip, {})
            description = topologies.get_topology_desc(name, platform="tpu", **options)
    except (KeyError, CompilerMissing):
        raise
    except Exception as error:
        advice = "; pip install 'jaxmoe[compile]' brings it" if chip in TPU_TOPOLOGIES else ""
        raise CompilerMissing(
            f"the compiler for {chip} is not at hand ({type(error).__name__}: {str(error).splitlines()[0]})"
            f"{advice}."
        ) from error
    return description.devices


@functools.cache
def mesh_of(chip: str) -> Mesh:
    """A mesh of one abstract device of the chip; errors as of `devices_of`."""
    return Mesh(devices_of(chip)[:1], ("device",))


def abstract(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An argument on the mesh's device for `jit(f).lower`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))
