"""The smallest slice of each chip on which a member's train step fits, and the table of them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.accounting import memory_bytes
from jaxmoe.config import RunConfig
from jaxmoe.scaling.fit import Fit, check_fit, memory_limit
from jaxmoe.scaling.fit_search import expected_bytes, plans_of
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
    """The first of `SLICES` on which the run's thriftiest plan compiles and fits; None if it fits on none.

    The plan is the one of `plans_of` that needs the least by the count of `jaxmoe.accounting`: most often one row of a
    device at a time and everything recomputed. Slices that could not hold the parameters and their moments are passed
    over without compiling.
    """
    memory = memory_bytes(run.model, run.train)
    for name in SLICES[chip]:
        topology = describe_topology(name)
        if (memory.weights + memory.optimizer) / len(topology.devices) > memory_limit(topology):
            continue
        plans = list(plans_of(run, topology))
        if not plans:
            continue
        fit = check_fit(min(plans, key=expected_bytes), topology)
        if fit.fits:
            return fit
    return None


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
        entry = results[key]
        if entry is None:
            return f"none up to {SLICES[chip][-1]}"
        mesh = " ".join(f"{axis}={size}" for axis, size in entry["mesh"].items()) or "one device"
        return (
            f"{entry['topology']} ({mesh}): {entry['peak'] / GIB:.3g} of {entry['limit'] / GIB:.3g} GiB; remat "
            f"{entry['remat']}, {entry['gradient_accumulation']} micro-batches"
        )

    written = ", ".join(f"{package} {version}" for package, version in versions().items())
    lines = [
        "# Where each member fits",
        "",
        "The smallest slice of each chip on which the member's train step fits with its thriftiest plan, as compiled "
        f"by `python -m experiments.fit_table` with {written}. Compile-time figures: nothing was run.",
        "",
        f"| member | {' | '.join(chips)} |",
        f"| --- |{' --- |' * len(chips)}",
        *(f"| {name} | {' | '.join(cell(name, chip) for chip in chips)} |" for name in names),
    ]
    return "\n".join(lines) + "\n"
