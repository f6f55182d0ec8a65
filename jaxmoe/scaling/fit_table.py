"""The smallest slice of each chip on which a member's train step fits, and the table of them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxmoe.accounting import memory_bytes
from jaxmoe.config import MeshConfig, RunConfig
from jaxmoe.scaling.fit import Fit, check_fit, memory_limit
from jaxmoe.scaling.fit_search import expected_bytes, plans_of
from jaxmoe.scaling.study import Member
from jaxmoe.scaling.topologies import GIB, describe_topology
from pallas_kernels.targets import COMPILERS

SLICES = {
    "v5p": ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8"),
    "v6e": ("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
    "v5e": ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    "tpu7x": ("tpu7x:2x2x1", "tpu7x:2x2x2", "tpu7x:2x2x4", "tpu7x:2x4x4", "tpu7x:4x4x4"),
    "h100": ("h100:1", "h100:2", "h100:4", "h100:8", "h100:16", "h100:32", "h100:64", "h100:128", "h100:256"),
}
"""Slices of each chip from the smallest on."""


def versions() -> dict[str, str]:
    """Of the compilers, where they are installed."""
    path = [*sys.path, str(COMPILERS)]  # the GPU's stands apart, and is found there once it has been used
    found = {}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin"):
        newest = next(iter(importlib.metadata.distributions(name=package, path=path)), None)
        if newest is not None:
            found[package] = newest.version
    return found


def smallest_fit(run: RunConfig, chip: str) -> Fit | None:
    """The first of `SLICES` on which a thrifty plan of the run compiles and fits; None if it fits on none.

    The plan is the one of `plans_of` that needs the least by `expected_bytes`: most often one row of a device at a time
    and everything recomputed. Where it does not fit, that of the next thriftiest mesh is compiled, too, since the count
    is not exact enough to choose between meshes at the limit. Slices that could not hold the parameters and their
    moments are passed over without compiling.
    """
    memory = memory_bytes(run.model, run.train)
    for name in SLICES[chip]:
        topology = describe_topology(name)
        if (memory.weights + memory.optimizer) / len(topology.devices) > memory_limit(topology):
            continue
        for plan in _thriftiest(plans_of(run, topology))[:2]:
            fit = check_fit(plan, topology)
            if fit.fits:
                return fit
    return None


def _thriftiest(plans: Iterable[RunConfig]) -> list[RunConfig]:
    """Of each mesh the plan that needs the least, by count; those that need less first."""
    of_mesh: dict[MeshConfig, RunConfig] = {}
    for plan in sorted(plans, key=expected_bytes):
        of_mesh.setdefault(plan.mesh, plan)
    return list(of_mesh.values())


def fill(
    results: dict[str, Mapping[str, Any] | None],
    members: Sequence[Member],
    chips: Sequence[str],
    *,
    again: bool = False,
    limit: int | None = None,
) -> Iterator[str]:
    """Compiles what `results` lacks, one entry at a time, and says of each what it came to.

    Args:
      results: as for `table`; an entry is in it before it is told.
      members, chips: whose entries.
      again: entries that are there are compiled, too, and what is told has the difference.
      limit: ends after so many.
    """
    wanted = [(member, chip) for member in members for chip in chips]
    wanted = [(member, chip) for member, chip in wanted if again or f"{member.name} {chip}" not in results]
    for member, chip in wanted[:limit]:
        key = f"{member.name} {chip}"
        found = smallest_fit(member.config, chip)
        now = None if found is None else found.summary()
        change = _change(results[key], now) if key in results else ""
        results[key] = now
        yield f"{member.name}, {chip}: {entry(now)}{change}"


def _change(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    if before is None or now is None or any(before[key] != now[key] for key in ("topology", "mesh")):
        return f"; before, {entry(before)}"
    return f"; {now['peak'] / before['peak']:.3f} times the memory of before"


def rows_and_columns(
    results: Mapping[str, Any], names: Sequence[str], chips: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Members and chips of a table: all that have results, in their order, and those that are asked for."""
    rows = dict.fromkeys([*(key.rpartition(" ")[0] for key in results), *names])
    present = {*(key.rpartition(" ")[2] for key in results), *chips}
    return list(rows), [chip for chip in SLICES if chip in present]


def entry(found: Mapping[str, Any] | None) -> str:
    """A result of `smallest_fit` in words."""
    if found is None:
        return "none fits"
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    return (
        f"{found['topology']} ({mesh}): {found['peak'] / GIB:.3g} of {found['limit'] / GIB:.3g} GiB; remat "
        f"{found['remat']}, {found['gradient_accumulation']} micro-batches"
    )


def table(names: Sequence[str], chips: Sequence[str], results: Mapping[str, Mapping[str, Any] | None]) -> str:
    """The table as Markdown.

    Args:
      names: of the members, in order.
      chips: the columns.
      results: `MEMBER CHIP` -> `Fit.summary`, None where no slice holds it; what is not there was not compiled yet.
    """

    def cell(name: str, chip: str) -> str:
        key = f"{name} {chip}"
        if key not in results:
            return "not compiled yet"
        return f"none up to {SLICES[chip][-1]}" if results[key] is None else entry(results[key])

    written = ", ".join(f"{package} {version}" for package, version in versions().items())
    lines = [
        "# Where each member fits",
        "",
        "The smallest slice of each chip on which the member's train step fits with a thrifty plan, as compiled "
        f"by `python -m experiments.fit_table` with {written}. Compile-time figures: nothing was run.",
        "",
        f"| member | {' | '.join(chips)} |",
        f"| --- |{' --- |' * len(chips)}",
        *(f"| {name} | {' | '.join(cell(name, chip) for chip in chips)} |" for name in names),
    ]
    return "\n".join(lines) + "\n"
