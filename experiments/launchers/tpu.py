"""TPU slices as GKE and xpk name them.

Source: Google's table of TPU machine types and topologies for GKE, as xpk's `system_characteristics.py` has it.
"""

from __future__ import annotations

import dataclasses
import math
import re

from jaxmoe.config import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class _Generation:
    """One generation of TPU: label, machine, xpk's prefix, and its topologies.

    Attributes:
      planar: all topologies, of a generation whose slices are planes.
      cubes: of 4x4x4 chips in the largest slice, of one whose slices are tori; 0 otherwise.
      single: machine of one chip, if there is one.
      not_in_xpk: topologies that GKE has and xpk does not.
    """

    accelerator: str
    machine: str
    xpk: str
    planar: tuple[str, ...] = ()
    cubes: int = 0
    single: str | None = None
    not_in_xpk: tuple[str, ...] = ()


_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_GENERATIONS = {
    "v4": _Generation("tpu-v4-podslice", "ct4p-hightpu-4t", "v4", cubes=64),
    "v5e": _Generation(
        "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v5litepod", _PLANES, single="ct5lp-hightpu-1t",
        not_in_xpk=("1x1", "2x2"),
    ),
    "v5p": _Generation("tpu-v5p-slice", "ct5p-hightpu-4t", "v5p", cubes=140),
    "v6e": _Generation("tpu-v6e-slice", "ct6e-standard-4t", "v6e", _PLANES, single="ct6e-standard-1t"),
    "tpu7x": _Generation("tpu7x", "tpu7x-standard-4t", "tpu7x", cubes=144, single="tpu7x-standard-1t"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips.

    Attributes:
      accelerator: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      topology: value of `cloud.google.com/gke-tpu-topology`.
      machine: type of its hosts.
      chips_per_host, hosts: numbers.
      xpk_type: for `xpk workload create --tpu-type`; None where xpk does not know it.
    """

    accelerator: str
    topology: str
    machine: str
    chips_per_host: int
    hosts: int
    xpk_type: str | None

    @property
    def chips(self) -> int:
        """Of the whole slice."""
        return self.hosts * self.chips_per_host


def parse_topology(text: str) -> Slice:
    """The slice that `GENERATION:TOPOLOGY` names, such as `v5p:4x4x4`.

    Raises:
      ConfigError: there is none; the message lists what there is.
    """
    name, _, topology = text.partition(":")
    if name not in _GENERATIONS:
        raise ConfigError(
            f"--topology={text}: unknown TPU generation {name!r}.{nearest(name, _GENERATIONS)} Known: {known()}."
        )
    generation = _GENERATIONS[name]
    if not _exists(generation, topology):
        raise ConfigError(f"--topology={text}: {name} has no topology {topology!r}. Known: {_known(name)}.")
    chips = math.prod(map(int, topology.split("x")))
    per_host = 1 if chips == 1 else 4
    return Slice(
        accelerator=generation.accelerator,
        topology=topology,
        machine=generation.single if chips == 1 else generation.machine,
        chips_per_host=per_host,
        hosts=chips // per_host,
        xpk_type=None if topology in generation.not_in_xpk else f"{generation.xpk}-{topology}",
    )


def known() -> str:
    """All generations and their topologies, for people."""
    return "; ".join(_known(name) for name in _GENERATIONS)


def _known(name: str) -> str:
    generation = _GENERATIONS[name]
    if generation.planar:
        return ", ".join(f"{name}:{topology}" for topology in generation.planar)
    small = ((("1x1x1",) if generation.single else ()) + _SMALL)
    return (
        f"{', '.join(f'{name}:{topology}' for topology in small)}, and {name}:AxBxC with A <= B <= C, each a multiple "
        f"of 4, up to {64 * generation.cubes} chips, such as {name}:4x4x4 or {name}:4x8x8"
    )


def _exists(generation: _Generation, topology: str) -> bool:
    if generation.planar:
        return topology in generation.planar
    if topology in _SMALL or (topology == "1x1x1" and generation.single):
        return True
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", topology):
        return False
    sides = list(map(int, topology.split("x")))
    return (
        all(side % 4 == 0 for side in sides)
        and sides == sorted(sides)
        and math.prod(sides) <= 64 * generation.cubes
    )
