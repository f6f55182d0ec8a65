"""What a kernel is traced for: the device at hand, another chip (ahead of time), or an interpreter.

A `Target` is settled once, when a public operation is called, and travels as a static argument into its backward
pass, which may be traced later and elsewhere.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax

from pallas_kernels import native

TPU_CHIPS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""Device kinds as JAX names them, to the names that the tile table uses."""

_GPU_CHIPS = {"H100": "h100", "H200": "h100", "B200": "b200"}
"""What the names of GPUs hold, to the names that the tile table uses; other GPUs go by the name that they have."""

CHIPS = {"v4": "tpu", "v5e": "tpu", "v5p": "tpu", "v6e": "tpu", "tpu7x": "tpu", "h100": "gpu", "b200": "gpu"}
"""Chips that kernels can be compiled for without having one, and their backends."""

PLATFORMS = {"tpu": ("tpu",), "gpu": ("gpu",)}
"""Backends made of Pallas kernels, and the platforms that run them."""

_OLD_TPUS = ("TPU v2", "TPU v3", "TPU v4 lite")
"""Device kinds that no kernel was compiled for: scalar memory of 16 KiB (v2, v3), or nowhere on offer."""

_HARDWARE = {"tpu": "TPU v4, v5e, v5p, v6e, 7x or newer", "gpu": "NVIDIA GPUs of compute capability 8.0 or newer"}


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a traced operation will run.

    Attributes:
      backend: one of `pallas_kernels.BACKENDS`.
      chip: name in the tile table; None where no kernel is compiled.
      interpret: run Pallas kernels in an interpreter.
      detect_races: interpret with the TPU interpreter and look for races.
    """

    backend: str
    chip: str | None = None
    interpret: bool = False
    detect_races: bool = False


_context: contextvars.ContextVar[Target | None] = contextvars.ContextVar("pallas_kernels_target", default=None)


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
    """Kernels traced inside run in Pallas' interpreter, on any platform, slowly: for tests.

    A function that was jitted and traced outside keeps what it was traced for.

    Args:
      detect_races: TPU kernels run in the TPU interpreter, which looks for races between copies and reads.
    """
    token = _context.set(Target("", interpret=True, detect_races=detect_races))
    try:
        yield
    finally:
        _context.reset(token)


@contextlib.contextmanager
def compiling_for(chip: str) -> Iterator[None]:
    """Kernels traced inside are made for `chip`, whatever this machine has: for ahead-of-time compilation.

    Raises:
      ValueError: a chip that is not in `CHIPS`.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r}; choose one of {', '.join(CHIPS)}.")
    token = _context.set(Target("", chip=chip))
    try:
        yield
    finally:
        _context.reset(token)


def platform() -> str:
    """The platform that `auto` resolves by: that of `compiling_for`, else `jax.default_backend()`.

    A device that the kernels are not made for has a name of its own, as TPUs before v4. JAX calls AMD's GPUs `gpu` too,
    and old ones have neither bfloat16 products nor the shared memory of the tiles.
    """
    context = _context.get()
    if context is not None and context.chip:
        return CHIPS[context.chip]
    here = jax.default_backend()
    if here == "tpu" and jax.devices()[0].device_kind.startswith(_OLD_TPUS):
        return jax.devices()[0].device_kind
    if here == "gpu":
        device = jax.devices()[0]
        if "rocm" in device.client.platform_version.lower():
            return "rocm"
        capability = str(getattr(device, "compute_capability", "8.0"))
        if float(capability) < 8.0:
            return f"gpu of compute capability {capability}"
    return here


def target_of(backend: str) -> Target:
    """The target of a resolved backend in this context.

    Raises:
      ValueError: a backend on a platform that cannot run it, or one that is to be built first.
    """
    if backend == "cpu_native":
        if platform() != "cpu":
            raise ValueError(f"backend='cpu_native' runs on CPU but the platform is {platform()!r}; choose 'auto'.")
        native.load()
    if backend not in PLATFORMS:
        return Target(backend)
    context = _context.get()
    if context is not None and context.interpret:
        return dataclasses.replace(context, backend=backend)
    here = platform()
    if here not in PLATFORMS[backend]:
        raise ValueError(
            f"backend={backend!r} runs on {_HARDWARE[backend]} but the platform is {here!r}; choose backend='auto', "
            f"or trace inside pallas_kernels.interpreted() or pallas_kernels.compiling_for(chip)."
        )
    return Target(backend, chip=context.chip if context is not None else _chip_at_hand())


def _chip_at_hand() -> str:
    kind = jax.devices()[0].device_kind
    if kind in TPU_CHIPS:
        return TPU_CHIPS[kind]
    return next((chip for name, chip in _GPU_CHIPS.items() if name in kind), kind)
