"""How many devices each kind of parallelism gets: `MeshConfig`."""

from __future__ import annotations

import dataclasses
import math

from jaxmoe.config.errors import require, require_positive

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
"""The mesh's axes, the ones that talk least first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The sizes of the mesh's axes. No number that a run records depends on them, beyond rounding.

    Attributes:
      data: copies of the model, each training on its part of the batch.
      fsdp: devices over which each parameter is spread, with its gradient and moments; the batch is as well.
      expert: devices over which the experts are spread; tokens travel between them. The batch is spread, too.
      context: devices over which each sequence is spread.
      tensor: devices over which heads, hidden units of dense layers, and the vocabulary are spread. In routed
        layers they are further devices of the expert axis, and each takes its part of the sequence.
      slices: of the accelerator; `data` is what they divide among them, over the data-centre network.

    One axis may be -1: what is left of the devices.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self):
        open_axes = [axis for axis in MESH_AXES if getattr(self, axis) == -1]
        require(len(open_axes) <= 1, f"mesh: {' and '.join(open_axes)} are -1; one axis at most can be what is left.")
        require_positive(self, *(axis for axis in MESH_AXES if axis not in open_axes), "slices")
        require(
            self.data == -1 or self.data % self.slices == 0,
            f"mesh: data={self.data} cannot be divided among slices={self.slices}; make it a multiple.",
        )

    @property
    def shape(self) -> dict[str, int]:
        """Size of every axis, in the mesh's order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def resolved(self, devices: int) -> MeshConfig:
        """The same with an axis of -1 as what is left of `devices`.

        Raises:
          ConfigError: the axes do not multiply to the number of devices.
        """
        known = math.prod(size for size in self.shape.values() if size != -1)
        written = ", ".join(f"{axis}={size}" for axis, size in self.shape.items() if size != 1) or "all axes 1"
        for axis, size in self.shape.items():
            if size == -1:
                require(
                    devices % known == 0,
                    f"mesh: {written} on {devices} devices: they cannot be divided by {known}.",
                )
                return dataclasses.replace(self, **{axis: devices // known})
        require(known == devices, f"mesh: {written} makes {known} devices, and there are {devices}.")
        return self
