"""Compiles every Pallas kernel ahead of time, for chips that are not here, with the real compilers.

    python -m pallas_kernels.compile_all                  # every kernel and layer, shape, dtype and chip: hours
    python -m pallas_kernels.compile_all --sample         # the corners of the shapes: minutes a chip
    python -m pallas_kernels.compile_all --chip=v5p --json
    python -m pallas_kernels.compile_all --chip=h100 --alone --largest    # the most that each kernel takes

One line for each kernel and chip: what the compiler says of its FLOPs, bytes and memory. None of it is measured. The
exit status is 1 if something does not compile, 2 if a compiler is missing. What is more than one device's memory is
named, and no failure.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params

from pallas_kernels import cases, targets
from pallas_kernels.execution import CHIPS, PLATFORMS, Target, compiling_for
from pallas_kernels.gpu_resources import resources

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Result:
    """What compiling one call gave; everything but `seconds` is the compiler's word.

    Attributes:
      chip, kernel, shape, dtype: what was compiled; shape is T, K, E, D, F.
      error: the first line of the compiler's refusal, or None.
      too_large: the same, where arguments, results and what has to be between them are more than one device's memory:
        no fault of a kernel.
      seconds: that compiling took.
      executed_flops: the kernels' own estimates, which count the most tiles that a routing can touch; 0 where a kernel
        gives none.
      active_flops: of the products with rows that there are.
      bytes_accessed: moved to and from HBM, by the same estimates; copies that XLA makes around a kernel are not in it.
      least_bytes: every argument read and every result written once, without what a layer holds in between.
      fast_memory_bytes: the most VMEM (GPU: shared memory of a program, where XLA knows it: not of Mosaic GPU's
        kernels) that a kernel of the call is given.
      temporary_bytes: device memory beside arguments and results.
      registers: the most per thread of a kernel; GPU only.
      spilled_bytes: per thread, of registers written to memory and read back; GPU only.
      kernels: the fast memory (None where it is not known) and registers (None on TPU) of the call's kernels by name.
    """

    chip: str
    kernel: str
    shape: tuple[int, ...]
    dtype: str
    error: str | None = None
    too_large: str | None = None
    seconds: float = 0.0
    executed_flops: int = 0
    active_flops: int = 0
    bytes_accessed: int = 0
    least_bytes: int = 0
    fast_memory_bytes: int = 0
    temporary_bytes: int = 0
    registers: int | None = None
    spilled_bytes: int | None = None
    kernels: dict[str, tuple[int | None, int | None]] = dataclasses.field(default_factory=dict)


def traced(case: cases.Case, chip: str) -> jax.stages.Traced:
    """The call, traced for one device of the chip.

    Raises:
      targets.CompilerMissing: there is no compiler for it.
    """
    mesh = targets.mesh_of(chip)
    arguments = [targets.abstract(mesh, like.shape, like.dtype) for like in case.arguments.values()]
    with compiling_for(chip), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(case.function).trace(*arguments)


def lowered(case: cases.Case, chip: str) -> jax.stages.Lowered:
    """The call, lowered for one device of the chip."""
    call = traced(case, chip)
    with compiling_for(chip), jax.sharding.use_abstract_mesh(targets.mesh_of(chip).abstract_mesh):
        return call.lower()


def planned(jaxpr: Jaxpr) -> tuple[float, float]:
    """FLOPs and bytes that the kernels of a program say they take, those in a loop as often as it turns.

    NaN if a kernel says nothing: those of Mosaic GPU cannot (jax 0.10.2).
    """
    flops = bytes_accessed = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            parts = [(equation.params["cost_estimate"].flops, equation.params["cost_estimate"].bytes_accessed)]
        elif equation.primitive.name in ("core_map", "mpmd_map"):
            parts = [(math.nan, math.nan)]
        else:
            parts = list(map(planned, jaxprs_in_params(equation.params)))
        for part in parts:
            flops += part[0] * equation.params.get("length", 1)
            bytes_accessed += part[1] * equation.params.get("length", 1)
    return flops, bytes_accessed


def vmem_of_kernels(program: str) -> dict[str, int]:
    """Bytes of VMEM that Mosaic gives each kernel, from a compiled TPU program's text.

    XLA may hold whole arrays in VMEM from one kernel to the next. Then a kernel's memory begins behind them, and what
    the program calls used counts from the start.
    """
    found = {}
    for line in program.splitlines():
        name = re.search(r"%(\w+?)(?:\.\d+)? = ", line)
        if 'custom_call_target="tpu_custom_call"' in line and name:
            given = re.search(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)"', line)
            used = line.partition('"used_scoped_memory_configs":')[2].partition("]")[0]
            sizes = [int(size) for size in re.findall(r'"memory_space":"1".*?"size":"(\d+)"', used)]
            own = max(sizes, default=0) - int(given[1] if given else 0)
            found[name[1]] = max(found.get(name[1], 0), own)
    return found


def _figures(before: jax.stages.Lowered, chip: str) -> dict[str, Any]:
    """Compiles, and reads what the chip's compiler says of memory and registers."""
    kernels: dict[str, tuple[int | None, int | None]] = {}
    spilled = {}
    if CHIPS[chip] == "gpu":
        program, found = resources(before)
        for kernel in found:
            most = most_of(kernels.get(kernel.kernel), (kernel.shared_bytes, kernel.registers))
            kernels[kernel.kernel] = most
        spilled = {"spilled_bytes": sum(kernel.spill_stores + kernel.spill_loads for kernel in found)}
    else:
        program = before.compile()
        kernels = {name: (size, None) for name, size in vmem_of_kernels(program.as_text()).items()}
    fast, registers = functools.reduce(most_of, kernels.values(), (None, None))
    return spilled | {
        "kernels": kernels,
        "fast_memory_bytes": fast or 0,
        "registers": registers,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def most_of(
    one: tuple[int | None, int | None] | None, other: tuple[int | None, int | None]
) -> tuple[int | None, int | None]:
    """Of each figure the larger one, or the one that is known."""
    pairs = zip(one or other, other, strict=True)
    return tuple(max(pair, key=lambda figure: -1 if figure is None else figure) for pair in pairs)


def result_of(case: cases.Case, shape: cases.Shape, dtype: str, chip: str) -> Result:
    """Compiles a call; a refusal is a result too."""
    start = time.perf_counter()
    least_bytes = 0
    try:
        call = traced(case, chip)
        least_bytes = case.least_bytes(call.out_info)
        with compiling_for(chip), jax.sharding.use_abstract_mesh(targets.mesh_of(chip).abstract_mesh):
            figures = _figures(call.lower(), chip)
    except targets.CompilerMissing:
        raise
    except Exception as error:  # a compiler refuses with any exception, Pallas before it too
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        refusal = f"{type(error).__name__}: {first}"
        available = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error))
        if available and least_bytes + case.held_bytes > float(available[1]) * 2**30:
            return Result(chip, case.kernel, tuple(shape), dtype, too_large=refusal)
        return Result(chip, case.kernel, tuple(shape), dtype, error=refusal)
    flops, bytes_accessed = (0 if math.isnan(number) else int(number) for number in planned(call.jaxpr.jaxpr))
    return Result(
        chip,
        case.kernel,
        tuple(shape),
        dtype,
        seconds=round(time.perf_counter() - start, 2),
        executed_flops=flops,
        active_flops=case.active_flops,
        bytes_accessed=bytes_accessed,
        least_bytes=least_bytes,
        **figures,
    )


def results(
    chips: list[str], shapes: list[cases.Shape], dtypes: list[str], *, layers: bool = True
) -> Iterator[Result]:
    """Compiles everything, or all but the layers; what several shapes have in common once."""
    for chip in chips:
        targets.mesh_of(chip)
        target = Target(CHIPS[chip], chip=chip)
        done = set()
        for dtype in dtypes:
            for shape in shapes:
                every = cases.kernel_cases(shape, jnp.dtype(dtype), target)
                every += cases.layer_cases(shape, jnp.dtype(dtype), target) if layers else []
                for case in every:
                    key = (case.kernel, *((like.shape, like.dtype) for like in case.arguments.values()))
                    if key not in done:
                        done.add(key)
                        yield result_of(case, shape, dtype, chip)


def line_of(result: Result) -> str:
    """For reading."""
    head = f"{result.chip:6} {result.dtype:8} {'x'.join(map(str, result.shape)):24} {result.kernel:26}"
    if result.error:
        return f"{head} REFUSED {result.error}"
    if result.too_large:
        return f"{head} too large for one device: {result.too_large}"
    flops = f"{result.executed_flops / result.active_flops:5.2f} x active FLOPs" if result.active_flops else " " * 20
    counts = f"{flops} {result.bytes_accessed / result.least_bytes:6.2f} x least bytes"
    if not result.bytes_accessed:
        counts = f"{'FLOPs and bytes are not counted':39}"
    line = (
        f"{head} {result.seconds:6.1f} s {counts} "
        f"{result.fast_memory_bytes / 2**10:8.0f} KiB fast memory {result.temporary_bytes / 2**20:8.1f} MiB temporary"
    )
    return line if result.registers is None else f"{line} {result.registers} registers {result.spilled_bytes} spilled"


def markdown(every: list[Result]) -> str:
    """A table with a row for each kernel, shape and dtype, and a column for each chip.

    A cell holds executed / active FLOPs, bytes moved / least bytes, MiB of fast memory, and for a GPU the registers.
    """
    chips = list(dict.fromkeys(result.chip for result in every))
    rows: dict[tuple, dict[str, Result]] = {}
    for result in every:
        rows.setdefault((result.kernel, result.shape, result.dtype), {})[result.chip] = result

    def cell(result: Result | None) -> str:
        if result is None:
            return ""
        if result.error or result.too_large:
            return "refused" if result.error else "too large"
        counted = result.executed_flops and result.active_flops
        flops = f"{result.executed_flops / result.active_flops:.2f}" if counted else "–"
        bytes_moved = f"{result.bytes_accessed / result.least_bytes:.2f}" if result.bytes_accessed else "–"
        registers = "" if result.registers is None else f" · {result.registers}"
        return f"{flops} · {bytes_moved} · {result.fast_memory_bytes / 2**20:.2g}{registers}"

    lines = [f"| kernel | T, K, E, D, F | dtype | {' | '.join(chips)} |", "| --- " * (3 + len(chips)) + "|"]
    for (kernel, shape, dtype), of_chip in rows.items():
        cells = " | ".join(cell(of_chip.get(chip)) for chip in chips)
        lines.append(f"| {kernel} | {', '.join(map(str, shape))} | {dtype} | {cells} |")
    return "\n".join(lines)


def largest(every: list[Result]) -> str:
    """A table with a row for each kernel by its own name and a column for each chip and dtype.

    A cell holds the most registers a thread (GPU) and the most KiB of fast memory that any of the calls needs.
    """
    columns = list(dict.fromkeys((result.chip, result.dtype) for result in every))
    rows: dict[str, dict[tuple[str, str], tuple[int | None, int | None]]] = {}
    for result in every:
        for kernel, figures in result.kernels.items():
            row = rows.setdefault(kernel, {})
            row[result.chip, result.dtype] = most_of(row.get((result.chip, result.dtype)), figures)

    def cell(figures: tuple[int | None, int | None] | None) -> str:
        if figures is None:
            return ""
        fast, registers = figures
        said = "not said" if fast is None else f"{fast / 2**10:.0f} KiB"
        return said if registers is None else f"{registers} · {said}"

    heads = " | ".join(f"{chip}, {dtype}" for chip, dtype in columns)
    lines = [f"| kernel | {heads} |", "| --- " * (1 + len(columns)) + "|"]
    for kernel, row in rows.items():
        lines.append(f"| `{kernel}` | {' | '.join(cell(row.get(column)) for column in columns)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    chips = [chip for chip, backend in CHIPS.items() if backend in PLATFORMS]
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.compile_all", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", action="append", choices=chips, help="only this chip; may be given again")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype; may be given again")
    parser.add_argument("--sample", action="store_true", help="a few shapes in place of all")
    parser.add_argument("--shape", action="append", metavar="T,K,E,D,F", help="this shape; may be given again")
    parser.add_argument("--alone", action="store_true", help="the kernels, without whole layers")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object with `results`")
    output.add_argument("--markdown", action="store_true", help="a table for the documentation")
    output.add_argument("--largest", action="store_true", help="a table of the most that each kernel takes")
    options = parser.parse_args(arguments)
    shapes = cases.SAMPLE if options.sample else [*cases.STUDY, *cases.FINE_GRAINED]
    if options.shape:
        try:
            shapes = [cases.Shape(*map(int, shape.split(","))) for shape in options.shape]
        except (TypeError, ValueError):
            parser.error(f"--shape={options.shape}; five integers T,K,E,D,F are expected.")
    every = []
    missing = []
    for chip in options.chip or chips:
        try:
            for result in results(
                [chip], shapes, options.dtype or list(DTYPES), layers=not options.alone
            ):
                every.append(result)
                if not (options.json or options.markdown or options.largest):
                    print(line_of(result), flush=True)
        except targets.CompilerMissing as error:
            missing.append(str(error))
    refused = [result for result in every if result.error]
    if options.json:
        print(json.dumps({"results": [dataclasses.asdict(result) for result in every], "missing": missing}))
    elif options.markdown:
        print(markdown(every))
    elif options.largest:
        print(largest(every))
    for message in missing:
        print(message, file=sys.stderr)
    too_large = [result for result in every if result.too_large]
    compiled = f"{len(every) - len(refused) - len(too_large)} of {len(every)} compiled"
    if too_large:
        compiled += f", {len(too_large)} are too large for one device"
    print(f"{compiled}; these are the compilers' figures, nothing was run", file=sys.stderr)
    for result in refused:
        print(line_of(result), file=sys.stderr)
    return 1 if refused else 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
