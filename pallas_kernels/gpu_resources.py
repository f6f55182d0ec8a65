"""What ptxas makes of the GPU kernels of a compiled program: registers, shared memory, spills.

XLA writes the PTX that it gives to ptxas into a folder when asked to; ptxas says what it uses with `-v`. Mosaic GPU
calls ptxas by itself, and writes what that said. Needs no GPU.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax

from pallas_kernels import targets


class Resources(NamedTuple):
    """Of one kernel of a program.

    Attributes:
      kernel: its name; a kernel that is compiled several times (for several shapes) is there as often.
      registers: per thread, of 255.
      shared_bytes: shared memory per program, static and dynamic; None for kernels of Mosaic GPU, which do not say.
      spill_stores: bytes per thread that did not fit the registers, as written.
      spill_loads: the same, as read back.
      serialized: tensor-core instructions that should overlap run one after the other (ptxas warns of it).
    """

    kernel: str
    registers: int
    shared_bytes: int | None
    spill_stores: int
    spill_loads: int
    serialized: bool


def resources(
    lowered: jax.stages.Lowered, names: str = r"\w+_gpu"
) -> tuple[jax.stages.Compiled, list[Resources]]:
    """Compiles a program for a GPU, and reports its Pallas kernels.

    Args:
      lowered: `jax.jit(f).lower(...)` with arguments of `targets.mesh_of("h100")`, or of a GPU at hand.
      names: the kernels to report, a regular expression; those of this package if none is given.

    Raises:
      targets.CompilerMissing: ptxas is not at hand.
    """
    ptxas = _ptxas()
    with tempfile.TemporaryDirectory(prefix="pallas-kernels-") as folder:
        dump = pathlib.Path(folder)
        with _mosaic_dumps_to(dump / "mosaic"):
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        launches = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
        reports = [_report(ptxas, path, launches, names) for path in sorted(dump.glob("*.ptx"), key=_number)]
        for path in sorted(dump.glob("mosaic/*.ptxas")):
            reports.append(_figures(path.name.rsplit("_", 1)[0], None, path.read_text()))
    return compiled, [report for report in reports if report is not None]


@contextlib.contextmanager
def _mosaic_dumps_to(folder: pathlib.Path) -> Iterator[None]:
    """Mosaic GPU reads its wishes from the environment."""
    folder.mkdir()
    wishes = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    before = {name: os.environ.get(name) for name in wishes}
    os.environ.update(wishes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _number(path: pathlib.Path) -> int:
    return int(path.name.split(".")[-2])


def _ptxas() -> str:
    """The assembler of the nvcc package, else that of a CUDA toolkit."""
    targets.use_gpu_compiler()
    try:
        package = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        package = None
    folders = [] if package is None else [f"{place}/bin" for place in package.submodule_search_locations]
    found = shutil.which("ptxas", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        raise targets.CompilerMissing("ptxas is not at hand; the package nvidia-cuda-nvcc-cu12 brings it.")
    return found


def _report(ptxas: str, path: pathlib.Path, launches: str, names: str) -> Resources | None:
    """The figures of a file of PTX, which holds one kernel; None for others than the named ones."""
    ptx = path.read_text()
    entry = re.search(rf"\.entry ((?:{names})(?:__\d+)?)\(", ptx)
    if entry is None:
        return None
    architecture = re.search(r"\.target (\w+)", ptx)[1]
    command = [ptxas, "-v", f"--gpu-name={architecture}", str(path), "-o", str(path.with_suffix(".cubin"))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    shared = re.search(rf"\] {entry[1]} grid.* shared_memory: (\d+) bytes", launches)
    return _figures(entry[1].split("__")[0], int(shared[1]) if shared else 0, said)


def _figures(kernel: str, shared_bytes: int | None, said: str) -> Resources:
    """From the words of ptxas -v."""
    return Resources(
        kernel=kernel,
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        shared_bytes=shared_bytes,
        spill_stores=int(re.search(r"(\d+) bytes spill stores", said)[1]),
        spill_loads=int(re.search(r"(\d+) bytes spill loads", said)[1]),
        serialized="wgmma.mma_async instructions are serialized" in said,
    )
