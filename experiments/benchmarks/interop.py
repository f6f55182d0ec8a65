"""Importing a checkpoint of transformers: throughput, and how much host memory it takes beside what it fills.

A random Mixtral of 1.2 GB in float32, in four safetensors files, is read in processes of their own: onto one device,
and onto a mesh of eight CPU devices, each of which gets its part. On CPU the destination is host memory too, so the
peak is told less the destination, in units of the largest tensor.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.benchmarks.timing import machine, peak_bytes

MESHES = {"one device": None, "8 devices, fsdp 2 x expert 4": {"fsdp": 2, "expert": 4}}
SHAPE = {"vocab_size": 65_536, "width": 1024, "num_layers": 5, "num_heads": 16, "num_kv_heads": 8}
EXPERTS = {"num_experts": 8, "experts_per_token": 2, "expert_hidden": 1280}
SHARD_BYTES = 4 * 10**8


def run(*, rounds: int) -> dict[str, Any]:
    """Everything, as plain JSON values."""
    with tempfile.TemporaryDirectory() as folder:
        size, largest = write_checkpoint(pathlib.Path(folder))
        imports = [_in_a_process(folder, name, rounds, largest) for name in MESHES]
    return {"machine": machine(), "checkpoint_bytes": size, "largest_tensor_bytes": largest, "import": imports}


def write_checkpoint(folder: pathlib.Path) -> tuple[int, int]:
    """Writes random numbers as a checkpoint; returns its bytes and those of its largest tensor."""
    from jaxmoe.config import ModelConfig, MoEConfig
    from jaxmoe.interop.huggingface.architectures import ARCHITECTURES
    from jaxmoe.interop.huggingface.config_json import config_values
    from jaxmoe.interop.huggingface.layout import parts_of
    from jaxmoe.interop.safetensors_files import TensorToWrite, write_tensors

    config, architecture = ModelConfig(**SHAPE, moe=MoEConfig(**EXPERTS)), ARCHITECTURES["mixtral"]
    random = np.random.default_rng(0)

    def rows(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        for _ in range(shape[0]):
            yield random.standard_normal(shape[1:], np.float32)

    parts = parts_of(config, architecture)
    tensors = [TensorToWrite(part.tensor, part.shape, lambda shape=part.shape: rows(shape)) for part in parts]
    write_tensors(folder, tensors, "F32", shard_bytes=SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(config_values(config, architecture, "float32")))
    sizes = [4 * int(np.prod(part.shape)) for part in parts]
    return sum(sizes), max(sizes)


def _in_a_process(folder: str, name: str, rounds: int, largest: int) -> dict[str, Any]:
    devices = 1 if MESHES[name] is None else 8
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}"
    )
    program = f"from experiments.benchmarks.interop import measure; measure({folder!r}, {name!r}, {rounds})"
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    measured = json.loads(ended.stdout)
    extra = measured["peak_bytes"] - measured["destination_bytes"]
    return {"onto": name, **measured, "peak_beyond_destination_over_largest_tensor": round(extra / largest, 2)}


def measure(folder: str, name: str, rounds: int) -> None:
    """Imports a checkpoint `rounds` times and prints what it took, as JSON; memory is the first time's."""
    import jax
    from flax import nnx

    from jaxmoe.config import MeshConfig
    from jaxmoe.interop.huggingface import load_pretrained

    jax.block_until_ready(jax.numpy.ones(8) + 1)  # the backend is there before anything is measured
    mesh = None if MESHES[name] is None else MeshConfig(**MESHES[name])
    before, seconds, measured = _resident_bytes(), [], {}
    for _ in range(rounds):
        started = time.perf_counter()
        model = load_pretrained(folder, mesh=mesh)
        seconds.append(time.perf_counter() - started)
        arrays = jax.tree.leaves(nnx.state(model))
        destination = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
        if not measured:
            measured = {"destination_bytes": destination, "peak_bytes": peak_bytes() - before}
        del model, arrays
    read = sum(path.stat().st_size for path in pathlib.Path(folder).glob("*.safetensors"))
    gigabytes = read / 1e9
    first, usual = gigabytes / seconds[0], gigabytes / statistics.median(seconds)
    print(json.dumps({**measured, "first_gb_per_second": first, "gb_per_second": usual}))


def _resident_bytes() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def describe(result: dict[str, Any]) -> str:
    """The result as text for people."""
    lines = ["  ".join(f"{key}: {value}" for key, value in result["machine"].items()), ""]
    size, largest = result["checkpoint_bytes"], result["largest_tensor_bytes"]
    lines.append(f"import of {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    for row in result["import"]:
        extra = row["peak_beyond_destination_over_largest_tensor"]
        lines.append(
            f"  onto {row['onto']:<30} {row['gb_per_second']:.2f} GB/s (first time {row['first_gb_per_second']:.2f})   "
            f"peak beyond the destination {extra:.2f} x the largest tensor"
        )
    return "\n".join(lines)
