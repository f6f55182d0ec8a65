"""The compiled kernels of backend `cpu_native`: their library, built by `python -m pallas_kernels.build_native`.

They are C++ (`grouped.h`, `moe_mlp.cc`), called through XLA's foreign function interface, float32, and made for the
processor that builds them. The library is named after all that it depends on, its sources, jaxlib's headers and the
machine, so that one of another version is not found instead of being called.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from pallas_kernels import tiles
from pallas_kernels.varying import axes_of, vary

SOURCES = ("moe_mlp.cc", "grouped.h")
OPERATIONS = ("Forward", "Hidden", "Backward", "Product", "WeightGradient")
"""Handlers of the library, by the names of `jax.ffi.ffi_call` without their prefix."""

CACHED_NUMBERS = 2**26
"""A gradient of as many numbers (256 MiB) is written past the cache: it is not there any more when it is read."""

COMMAND = "python -m pallas_kernels.build_native"
DIRECTORY_VARIABLE = "PALLAS_KERNELS_NATIVE"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")


def name_of(operation: str) -> str:
    """What `jax.ffi.ffi_call` calls one of `OPERATIONS`."""
    return f"pallas_kernels_{operation}"


def call(
    operation: str,
    shapes: tuple[tuple[int, ...], ...],
    *operands: jax.Array,
    in_place: dict[int, int] | None = None,
    **attributes: np.bool_,
) -> tuple[jax.Array, ...]:
    """Calls one of `OPERATIONS`; its outputs are float32, and differ between devices as the operands do.

    Args:
      in_place: the number of an operand, and that of the output which takes its memory. XLA copies an operand that is
        needed again.
    """
    outs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    function = jax.ffi.ffi_call(name_of(operation), outs, input_output_aliases=in_place)
    return vary(tuple(function(*operands, **attributes)), axes_of(operands))


def library() -> pathlib.Path:
    """Where the library of this version is, or would be: in `$PALLAS_KERNELS_NATIVE`, else in the user's cache.

    Raises:
      ValueError: neither is there.
    """
    named = os.environ.get(DIRECTORY_VARIABLE)
    folder = pathlib.Path(named) if named else tiles.cache_directory()
    if folder is None:
        raise ValueError(f"there is no home folder to keep the library in; name a folder with {DIRECTORY_VARIABLE}=.")
    here = pathlib.Path(__file__).parent
    parts = [(here / name).read_bytes() for name in SOURCES]
    parts += [jaxlib.__version__.encode(), platform.machine().encode(), _processor().encode(), repr(_FLAGS).encode()]
    return folder / f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"


def build(compiler: str | None = None) -> pathlib.Path:
    """Compiles the library, and returns where it is.

    Args:
      compiler: a C++17 compiler of GNU's or LLVM's command line; None: `$CXX`, else g++ or clang++.

    Raises:
      FileNotFoundError: there is no compiler.
      RuntimeError: it failed; its message is in the error.
    """
    chosen = compiler or os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not chosen or not shutil.which(shlex.split(chosen)[0]):
        raise FileNotFoundError(
            f"no C++ compiler {'called ' + repr(chosen) if chosen else 'is here'}; install g++ 12 or clang++, or name "
            "one with CXX=."
        )
    path = library()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    source = pathlib.Path(__file__).parent / SOURCES[0]
    command = [*shlex.split(chosen), *_FLAGS, "-isystem", jax.ffi.include_dir(), "-o", str(unfinished), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
    unfinished.replace(path)
    return path


def is_built() -> bool:
    """Whether the library is there."""
    try:
        return library().exists()
    except ValueError:
        return False


@functools.cache
def load() -> None:
    """Registers the library's handlers with XLA, once.

    Raises:
      ValueError: it was not built, or not for this version of its sources, jaxlib and processor.
    """
    path = library()
    if not path.exists():
        raise ValueError(
            f"backend='cpu_native' is a compiled library that is not there ({path}); build it with `{COMMAND}`, or "
            "choose backend='cpu'."
        )
    handlers = ctypes.cdll.LoadLibrary(str(path))
    for operation in OPERATIONS:
        handler = jax.ffi.pycapsule(getattr(handlers, f"PallasKernels{operation}"))
        jax.ffi.register_ffi_target(name_of(operation), handler, platform="cpu")


def _processor() -> str:
    """The processor's instruction set, as far as the system tells: what -march=native depends on."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    return platform.processor()
