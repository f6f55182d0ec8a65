"""Measures tile sizes on the TPU or GPU at hand and writes them into the table that the kernels read.

    python -m pallas_kernels.tune                                     # the shapes of the studies
    python -m pallas_kernels.tune --shape=4096,8,64,2048,1024 --dtype=bfloat16

For every kernel with a tile and every class of shape, the rule's tile and its neighbours run on random numbers in equal
groups; the fastest goes to the user's table (`pallas_kernels.tiles`). A tile that does not compile is passed over and
reported.
"""

import argparse
import logging
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cases, tiles
from pallas_kernels.backend import resolved_backend
from pallas_kernels.execution import PLATFORMS, Target, platform, target_of

Timer = Callable[[Callable, list[jax.Array]], float]

_REPEATS = 10
_TURNS = 20


def seconds_of(function: Callable, arguments: list[jax.Array]) -> float:
    """Time of one call, without what it takes to start a program on the device.

    A loop on the device makes the calls one after the other, once and 1 + `_TURNS` times; the difference counts.
    """

    @jax.jit
    def looped(turns, arguments):
        def turn(_, carry):
            arguments, seen = carry
            outs = jax.tree.leaves(function(*arguments))
            # The next call's arguments come after this one's results, so that no call leaves the loop.
            return jax.lax.optimization_barrier((arguments, seen + outs[0].reshape(-1)[0].astype(jnp.float32)))

        return jax.lax.fori_loop(0, turns, turn, (arguments, jnp.float32(0)))[1]

    def fastest(turns: int) -> float:
        times = []
        for _ in range(1 + _REPEATS):  # the first compiles
            start = time.perf_counter()
            looped(turns, arguments).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return max(fastest(1 + _TURNS) - fastest(1), 0.0) / _TURNS


def measured(
    case: cases.Case, dtype, chip: str | None, timer: Timer, report: Callable[[str], None]
) -> dict[str, Any] | None:
    """The table's entry for a case: its fastest tile. None where no tile of it runs."""
    tiling = case.tiling
    try:
        inputs = case.inputs()
    except jax.errors.JaxRuntimeError as error:
        report(f"  its arrays do not fit this device: {str(error).splitlines()[0][:200]}")
        return None
    times: dict[tuple, float] = {}
    candidates = tiling.candidates(dtype, chip, **case.sizes)
    for tile in candidates:
        with tiles.trying(tiling.operation, tile):
            try:
                # A new function: jit would take the program of the tile before.
                times[tuple(tile.items())] = timer(jax.jit(lambda *arguments: case.function(*arguments)), inputs)
            except Exception as error:  # whatever a compiler refuses with
                first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                report(f"  {tile} is passed over: {first[:200]}")
    if not times:
        return None
    best = min(times, key=times.get)
    by_rule = times.get(tuple(candidates[0].items()), math.nan)
    return {
        "operation": tiling.operation,
        "chip": chip,
        "dtype": jnp.dtype(dtype).name,
        "sizes": tiles.shape_class(case.sizes),
        "tile": dict(best),
        "microseconds": round(1e6 * times[best], 2),
        "microseconds_by_rule": None if math.isnan(by_rule) else round(1e6 * by_rule, 2),
        "jax": jax.__version__,
    }


def tune(
    target: Target,
    shapes: Iterable[cases.Shape],
    dtypes: Iterable[str],
    table: pathlib.Path,
    *,
    timer: Timer = seconds_of,
    report: Callable[[str], None] = print,
) -> int:
    """Measures and writes; the table is written after each entry, so an interrupted run loses nothing.

    Args:
      target: of a Pallas backend, at hand.
      timer: from a jitted function and its arguments to seconds.
      report: gets one line at a time.

    Returns:
      How many entries were written.
    """
    done = set()
    written = 0
    for dtype in dtypes:
        for shape in shapes:
            for case in cases.kernel_cases(shape, jnp.dtype(dtype), target):
                if case.tiling is None:
                    continue
                key = (case.tiling.operation, dtype, *tiles.shape_class(case.sizes).items())
                if key in done:
                    continue
                done.add(key)
                report(f"{case.tiling.operation} {dtype} {case.sizes}")
                entry = measured(case, dtype, target.chip, timer, report)
                if entry is None:
                    report("  runs without a tile, or with none of its tiles; the rule stays")
                    continue
                tiles.write(table, [entry])
                written += 1
                report(f"  {entry['tile']}: {entry['microseconds']} us, by rule {entry['microseconds_by_rule']} us")
    return written


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="T,K,E,D,F", help="this shape; may be given again")
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float32"))
    parser.add_argument("--table", type=pathlib.Path, default=None, help="the file to write (default: the user's)")
    options = parser.parse_args(arguments)
    try:
        shapes = [cases.Shape(*map(int, shape.split(","))) for shape in options.shape or []]
    except (TypeError, ValueError):
        parser.error(f"--shape={options.shape}; five integers T,K,E,D,F are expected.")
    logging.basicConfig(level=logging.INFO)
    backend = resolved_backend()
    if backend not in PLATFORMS:
        print(
            f"there is nothing to tune on platform {platform()!r}: tiles belong to the Pallas kernels of "
            f"{', '.join(PLATFORMS)}; the cpu backend's windows and blocks follow a rule "
            "(pallas_kernels.windows.tiling_for).",
            file=sys.stderr,
        )
        return 2
    table = options.table or tiles.user_table()
    if table is None:
        parser.error("there is no home directory to hold a table; name one with --table=FILE and, for the kernels to "
                     f"read it, {tiles.ENVIRONMENT_VARIABLE}=FILE.")
    shapes = shapes or [*cases.STUDY, *cases.FINE_GRAINED]
    written = tune(target_of(backend), shapes, options.dtype or ["bfloat16", "float32"], table)
    print(f"{written} entries written to {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
