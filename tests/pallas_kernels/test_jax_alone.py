"""`pallas_kernels` needs jax and what jax brings, and nothing else."""

import subprocess
import sys

PROGRAM = """
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"absl", "etils", "flax", "jaxmoe", "jaxtyping", "optax", "orbax", "tensorstore"}:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
import jax.numpy as jnp
import pallas_kernels

for operation in ("dispatch", "combine", "grouped_matmul", "moe_mlp"):
    for module in ("reference", "mosaic_tpu", "triton_gpu"):
        importlib.import_module(f"pallas_kernels.{operation}.{module}")
y = pallas_kernels.moe_mlp(
    jnp.ones((2, 4)), jnp.array([[0], [1]]), jnp.ones((2, 1)), jnp.ones((2, 4, 6)), jnp.ones((2, 3, 4))
)
assert y.shape == (2, 4), y.shape
"""


def test_everything_is_imported_and_runs_where_only_jax_is_installed():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
