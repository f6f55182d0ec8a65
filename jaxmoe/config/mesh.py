"""How many devices each kind of parallelism gets: `MeshConfig`, and whether a run can be spread so."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from jaxmoe.config.errors import ConfigError, nearest, require, require_positive

if TYPE_CHECKING:
    from jaxmoe.config.grpo import GRPOConfig
    from jaxmoe.config.model import ModelConfig
    from jaxmoe.config.run import TrainConfig

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
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self):
        open_axes = [axis for axis in MESH_AXES if getattr(self, axis) == -1]
        require(
            len(open_axes) <= 1,
            f"mesh: {' and '.join(open_axes)} are -1; one axis at most can be what is left (fsdp is unless given).",
        )
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
        written = ", ".join(f"{axis}={size}" for axis, size in self.shape.items() if size != 1) or "every axis is 1"
        for axis, size in self.shape.items():
            if size == -1:
                require(
                    devices % known == 0,
                    f"mesh: {written}: {devices} devices cannot be divided by {known}; the nearest that fit: axes that "
                    f"multiply to {_nearest_divisors(devices, known)}.",
                )
                return dataclasses.replace(self, **{axis: devices // known})
        others = {axis: known // size for axis, size in self.shape.items() if size > 1}
        fitting = [f"{axis}={devices // other}" for axis, other in others.items() if devices % other == 0]
        if devices % (known // self.fsdp) == 0:
            fitting.append("fsdp=-1 for what is left")
        require(
            known == devices,
            f"mesh: {written} makes {known} devices, and there are {devices}; what fits: "
            f"{', or '.join(fitting) or f'axes that multiply to {_nearest_divisors(devices, known)}'}.",
        )
        return self


MESH_PRESETS = {
    "fsdp": MeshConfig(),
    "fsdp_ep": MeshConfig(expert=8),
    "fsdp_ep_tp": MeshConfig(expert=4, tensor=2),
    "multislice": MeshConfig(data=2, slices=2, expert=8),
}
"""Meshes by name: where to start from. `fsdp` is what is left of the devices in each."""


def parse_mesh(text: str) -> MeshConfig:
    """A mesh as a command line writes it: `fsdp_ep`, `fsdp=4,expert=2`, or a preset and changes, `fsdp_ep,expert=16`.

    Raises:
      ConfigError: an unknown preset or axis, or no whole number.
    """
    known = [field.name for field in dataclasses.fields(MeshConfig)]
    mesh, sizes = MeshConfig(), {}
    for position, part in enumerate(text.split(",")):
        axis, equals, size = part.strip().partition("=")
        if not equals and position == 0 and axis in MESH_PRESETS:
            mesh = MESH_PRESETS[axis]
            continue
        require(bool(equals), f"mesh {part!r}: no such preset.{nearest(part, MESH_PRESETS)}")
        require(axis in known, f"mesh {part!r}: no such axis.{nearest(axis, known)}")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ConfigError(f"mesh {part!r}: {size!r} is not a whole number.") from None
    return dataclasses.replace(mesh, **sizes)


def check_mesh(
    mesh: MeshConfig, model: ModelConfig, train: TrainConfig, grpo: GRPOConfig | None = None
) -> None:
    """Checks that a run can be spread over a mesh; nothing is allocated.

    Args:
      mesh: `resolved`, so that no axis is -1.
      model: of the run.
      train: of the run.
      grpo: of the run, whose rows are then the responses of an update.

    Raises:
      ConfigError: something cannot be divided; the message has the numbers and the nearest that fit.
    """
    if model.num_moe_layers:
        _check_divides(model.moe.num_experts, "num_experts", mesh, "expert", "tensor")
        _check_divides(model.moe.shared_expert_hidden, "shared_expert_hidden", mesh, "tensor")
    _check_divides(model.num_heads, "num_heads", mesh, "tensor")
    _check_divides(model.kv_heads, "num_kv_heads", mesh, "tensor")
    _check_divides(model.vocab_size, "vocab_size", mesh, "tensor")
    if "dense" in model.layer_kinds:
        _check_divides(model.dense_hidden_size, "dense_hidden", mesh, "tensor")
    _check_divides(model.width, "width", mesh, "fsdp")
    _check_divides(train.sequence_length, "sequence_length", mesh, "context", "tensor")
    chunks = 2 * mesh.context
    require(
        mesh.context == 1 or train.sequence_length % chunks == 0,
        f"mesh: sequence_length={train.sequence_length} cannot be divided into the two chunks that attention gives "
        f"each of context={mesh.context} devices; choose a multiple of {chunks}.",
    )
    parts = ("data", "fsdp", "expert")
    rows, name, worked_out = train.batch_size, "batch_size", ""
    if grpo is not None:
        rows, name = grpo.responses_per_update(train), "batch_size x group_size / updates_per_step"
        worked_out = f"{train.batch_size} x {grpo.group_size} / {grpo.updates_per_step} = "
    if train.gradient_accumulation > 1:
        name = f"{name} / gradient_accumulation"
        worked_out = f"{worked_out.removesuffix(' = ') or rows} / {train.gradient_accumulation} = "
        rows //= train.gradient_accumulation
    _check_divides(rows, name, mesh, *parts, worked_out=worked_out)


def _check_divides(number: int, name: str, mesh: MeshConfig, *axes: str, worked_out: str = "") -> None:
    """Checks that a number is a multiple of the axes' product; `worked_out` says where it comes from, `8 / 2 = `."""
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if number % devices == 0:
        return
    written = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
    product = f"{written} = {devices}" if len(axes) > 1 else written
    below, above = number // devices * devices, -(-number // devices) * devices
    fitting = math.gcd(number, math.prod(mesh.shape.values()))  # an axis divides the devices, too
    raise ConfigError(
        f"mesh: {name}{f' = {worked_out}' if worked_out else '='}{number} cannot be divided among {product} devices. "
        f"The nearest that fit: {' x '.join(axes)} = {_nearest_divisors(fitting, devices)}, or {name} = "
        f"{f'{below} or ' if below else ''}{above}."
    )


def _nearest_divisors(number: int, size: int) -> str:
    """The divisors of `number` next to `size`, `4 or 8`."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < size][-1:]
    above = [divisor for divisor in divisors if divisor > size][:1]
    return " or ".join(map(str, below + above))
