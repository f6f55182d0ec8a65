"""Chips that kernels are compiled for on a machine that has none: XLA's own compilers, without a device.

Needs the `compile` extra: libtpu for TPU; jax's CUDA plugin and nvcc (for ptxas) for GPU.
"""

import functools
import os

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest topology of each chip that libtpu describes."""

# What cudaGetDeviceProperties says of the card; XLA reads limits and speeds from here.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class CompilerMissing(RuntimeError):
    """The compiler of a chip is not installed; the message says what to install."""


@functools.cache
def mesh_of(chip: str) -> Mesh:
    """A mesh of one abstract device of the chip: arrays of this sharding lower and compile for it.

    Raises:
      CompilerMissing: libtpu or the CUDA plugin is not installed.
      KeyError: an unknown chip.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked for a pod that is not there
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once
    try:
        if chip == "h100":
            description = topologies.get_topology_desc(
                topology_name="h100", platform="cuda", target_config=_H100, topology="1x1x1"
            )
        else:
            description = topologies.get_topology_desc(TPU_TOPOLOGIES[chip], platform="tpu")
    except KeyError:
        raise
    except Exception as error:
        raise CompilerMissing(
            f"the compiler for {chip} is not at hand ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "pip install 'jaxmoe[compile]' brings it."
        ) from error
    return Mesh(description.devices[:1], ("device",))


def abstract(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An argument on the mesh's device for `jit(f).lower`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))
