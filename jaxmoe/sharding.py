"""Meshes, and which of their axes each axis of an array is spread over.

Arrays name their axes in the model's terms (`batch`, `experts`, `width`); a `Partitioning` is a mesh and the rules
that turn those names into mesh axes. Layers ask for the one in use and, where there is none, do nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxmoe.config import MESH_AXES, ConfigError, MeshConfig, RunConfig, check_mesh

RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocabulary": ("tensor",),
    # parameters
    "width": ("fsdp", "expert"),
    "experts": ("expert", "tensor"),
    "expert_width": ("fsdp",),
}
"""Mesh axes of each logical axis. A name that is not here, or None, is not spread.

The batch goes over `expert`, too: where no routed layer needs it, that axis is one more of data and parameters.
"""


KEPT_ONLY = ("width", "expert_width")
"""Axes along which parameters are spread to be kept, and gathered to be computed with."""


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """A mesh, and the rules for naming its axes.

    Attributes:
      mesh: with the axes of `jaxmoe.config.MESH_AXES`.
    """

    mesh: Mesh

    def size(self, *axes: str) -> int:
        """Devices along mesh axes together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Where an array goes, from the logical names of its axes.

        An axis is spread over the longest leading part of its rule that divides it, so that nothing is padded.

        Args:
          axes: one name for each of the last axes of the array; leading axes without one (layers) are not spread.
          shape: of the array.
        """
        names = (None,) * (len(shape) - len(axes)) + tuple(axes)
        return PartitionSpec(*(self.mesh_axes(name, size) or None for name, size in zip(names, shape, strict=True)))

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def mesh_axes(self, name: str | None, size: int) -> tuple[str, ...]:
        """The axes of the mesh over which an axis of that name and size is spread; those of size 1 are left out."""
        chosen: tuple[str, ...] = ()
        for axis in RULES.get(name, ()):
            if size % self.size(*chosen, axis):
                break
            chosen = (*chosen, axis)
        return tuple(axis for axis in chosen if self.mesh.shape[axis] > 1)


def rows_here(partitioning: Partitioning, rows: int) -> np.ndarray:
    """Which rows of a batch of that many the devices of this process hold, in rising order."""
    places = partitioning.sharding(("batch",), (rows,)).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[place] for place in places]))


def placed(x: np.ndarray, partitioning: Partitioning | None, *axes: str | None) -> jax.Array:
    """An array that every process has, over the mesh by the logical names of its axes; each device gets its part."""
    if partitioning is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, partitioning.sharding(axes, x.shape), lambda index: x[index])


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration, its axes laid out so that those that talk most are next to each other.

    With several slices, `data` is divided among them first. A slice is what the devices say (TPU pods, NVLink
    domains), or, where they say nothing, the devices of one process.

    Args:
      config: an axis of -1 is what is left of the devices.
      devices: real ones or those of a described topology; None for all there are.

    Raises:
      ConfigError: axes that do not multiply to the number of devices, or another number of slices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    config = config.resolved(len(devices))
    shape = tuple(config.shape.values())
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if config.slices == 1:
        if len(slices) > 1 and devices[0].platform == "tpu":
            raise ConfigError(
                f"mesh: slices=1, but the devices are of {len(slices)} slices; give mesh.slices={len(slices)} and "
                f"mesh.data a multiple of it."
            )
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES)
    by_process = len(slices) != config.slices
    processes = {device.process_index for device in devices}
    if by_process and len(processes) != config.slices:
        raise ConfigError(
            f"mesh: slices={config.slices}, but the devices are of {len(slices)} slices, and of {len(processes)} "
            f"processes; give mesh.slices={len(slices)}."
        )
    inner = (config.data // config.slices, *shape[1:])
    outer = (config.slices, *(1 for _ in shape[1:]))
    return Mesh(
        mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
        ),
        MESH_AXES,
    )


def make_partitioning(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Partitioning | None:
    """The partitioning over the mesh of a configuration; None on one device, where nothing is spread."""
    mesh = build_mesh(config, devices)
    return Partitioning(mesh) if mesh.size > 1 else None


def partitioning_of_run(run: RunConfig, devices: Sequence[jax.Device] | None = None) -> Partitioning | None:
    """`make_partitioning` of a run's mesh.

    Args:
      run: the configuration.
      devices: None for all there are.

    Raises:
      ConfigError: the run does not fit the mesh, or the mesh the devices; nothing is allocated.
    """
    devices = jax.devices() if devices is None else devices
    check_mesh(run.mesh.resolved(len(devices)), run.model, run.train, run.grpo)
    return make_partitioning(run.mesh, devices)


_IN_USE: contextvars.ContextVar[Partitioning | None] = contextvars.ContextVar("partitioning", default=None)


def partitioning_in_use() -> Partitioning | None:
    """What `use_partitioning` installed; None on one device."""
    return _IN_USE.get()


@contextlib.contextmanager
def use_partitioning(partitioning: Partitioning | None) -> Iterator[None]:
    """Layers traced in this context spread their arrays so."""
    token = _IN_USE.set(partitioning)
    try:
        # JAX keeps what it traced of inner functions by the mesh in use, too.
        with contextlib.nullcontext() if partitioning is None else use_abstract_mesh(partitioning.mesh.abstract_mesh):
            yield
    finally:
        _IN_USE.reset(token)


def explicit_axes() -> tuple[str, ...]:
    """The axes of the mesh that `jax.set_mesh` has set whose shardings are part of the arrays' types."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` spread by the logical names of its axes where a partitioning is in use, else `x`."""
    partitioning = partitioning_in_use()
    if partitioning is None:
        return x
    return jax.lax.with_sharding_constraint(x, partitioning.sharding(axes, x.shape))


def gathered(parameter: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter as it is computed with: whole along the axes over which it is only kept, spread along the others.

    Its gradient comes back spread as the parameter is, so that it is summed and spread in one exchange.

    Args:
      parameter: to compute with, in the dtype of the computation, so that no more is exchanged than is needed.
      axes: its logical axes.
    """
    partitioning = partitioning_in_use()
    return parameter if partitioning is None else _gathered(parameter, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(parameter: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(constrain(parameter, *axes), *(None if axis in KEPT_ONLY else axis for axis in axes))


def _gathered_forward(parameter, axes):
    return _gathered(parameter, axes), None


def _gathered_backward(axes, _, gradient):
    return (constrain(gradient, *axes),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
