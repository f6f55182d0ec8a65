"""Which implementation runs: named explicitly, or chosen once by platform."""

import functools
import importlib
import logging
import types

from pallas_kernels import execution

BACKENDS = ("reference", "cpu", "cpu_native", "tpu", "gpu", "ragged_dot")
"""`reference`: the definitions, dense over E; `cpu`: windows and blocks in XLA; `cpu_native`: compiled kernels in
float32, after `python -m pallas_kernels.build_native`; `tpu`, `gpu`: Pallas kernels by Mosaic and Triton;
`ragged_dot`: `jax.lax.ragged_dot`."""

_KERNEL_MODULES = {"tpu": "mosaic_tpu", "gpu": "triton_gpu"}

_logger = logging.getLogger(__name__)


def resolved_backend(backend: str = "auto") -> str:
    """The backend that a call with this argument runs.

    Args:
      backend: one of `BACKENDS`, or `auto`: `cpu`, `tpu` or `gpu` where that is the platform (`jax.default_backend()`,
        or that of the chip of `compiling_for`), else `ragged_dot`. The choice is made and logged once per platform.

    Raises:
      ValueError: an unknown name.
    """
    if backend == "auto":
        return _backend_of_platform(execution.platform())
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; choose 'auto' or one of {', '.join(map(repr, BACKENDS))}.")
    return backend


@functools.cache
def _backend_of_platform(platform: str) -> str:
    if platform in ("cpu", "tpu", "gpu"):
        _logger.info("backend 'auto' is %r on platform %r", platform, platform)
        return platform
    _logger.warning(
        "backend 'auto' is 'ragged_dot' on platform %r, which has no Pallas kernels here: its weight gradient is a "
        "dense expansion over all experts (E times the work)",
        platform,
    )
    return "ragged_dot"


def compiler_options() -> dict[str, str]:
    """What `jax.jit` of a program with these kernels needs as `compiler_options`, on the platform that is traced for.

    TPU: a kernel asks for the VMEM that it uses, but where XLA (libtpu 0.0.42) writes its output straight into a larger
    array, as into the stack of what a scan over layers keeps for its backward pass, it forgets that and refuses the
    program by its own limit. So the program's limit is that of the kernels. Elsewhere: nothing.
    """
    if execution.platform() != "tpu":
        return {}
    from pallas_kernels import mosaic  # Pallas is slow to import

    return {"xla_tpu_scoped_vmem_limit_kib": str(mosaic.vmem_limit(execution.target_of("tpu").chip) // 1024)}


def kernels(operation: str, target: execution.Target) -> types.ModuleType:
    """The module with an operation's Pallas kernels; imported when first needed, for Pallas is slow to import."""
    return importlib.import_module(f"pallas_kernels.{operation}.{_KERNEL_MODULES[target.backend]}")
