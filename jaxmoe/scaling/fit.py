"""Whether a run fits on devices that are not here, and how fast it could be: the real compilers' answer.

What comes from a compiler's plan or from a maker's data sheet is no measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.accounting import flops_per_token
from jaxmoe.config import MeshConfig, MoEConfig, RunConfig
from jaxmoe.config.mesh import check_mesh
from jaxmoe.layers.expert_parallel import expert_axes
from jaxmoe.scaling.fit_programs import What, traced_program
from jaxmoe.scaling.program import Exchange, Operations, count_operations, exchanges
from jaxmoe.scaling.topologies import GIB, Topology
from jaxmoe.sharding import Partitioning, build_mesh

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What compiling a run for a topology showed. Everything but the compile time is a plan, not a measurement.

    Attributes:
      member, topology, mesh, what, remat, gradient_accumulation: what was compiled.
      devices: how many.
      fits: whether each device has the memory.
      limit: bytes of a device that programs may have.
      arguments, outputs, temporaries, peak: bytes of a device; None where a TPU program was refused, of which the
        compiler tells the peak alone. `peak` has those of `held`, too.
      operations: executed on all devices in one step, None where refused; with room in the experts' receive buffers
        taken as full.
      room: rows that an expert device has room for, over those of a balanced routing; 1 without an exchange.
      model_flops: those of the model's matrix products for the step's tokens (recomputation is not counted).
      exchanges: collectives of one device in one step.
      tokens: of one step.
      compile_seconds: tracing, lowering and compiling.
      estimate: of the step's time, see `StepTime`; None where refused.
      grpo: whether the step is one of GRPO.
      held: bytes of a device that lie there while the program runs and are not its own: with GRPO the reference, and
        while responses are sampled the moments.
    """

    member: str
    topology: str
    mesh: MeshConfig
    what: What
    remat: str
    gradient_accumulation: int
    devices: int
    fits: bool
    limit: int
    peak: int
    arguments: int | None
    outputs: int | None
    temporaries: int | None
    operations: Operations | None
    room: float
    model_flops: int
    exchanges: tuple[Exchange, ...]
    tokens: int
    compile_seconds: float
    estimate: StepTime | None
    grpo: bool = False
    held: int = 0

    @property
    def headroom(self) -> int:
        """Bytes of a device that are left; negative where they are missing."""
        return self.limit - self.peak

    @property
    def balanced_operations(self) -> float:
        """`operations` where every expert device receives as many rows."""
        return self.operations.products + self.operations.kernels + self.operations.experts / self.room

    def summary(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = dataclasses.asdict(self)
        values["mesh"] = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        values["headroom"] = self.headroom
        if self.operations is not None:
            values["operations"] = self.operations.total
            values["balanced_operations"] = self.balanced_operations
            values["operations_over_model_flops"] = self.operations.total / self.model_flops
            values["balanced_operations_over_model_flops"] = self.balanced_operations / self.model_flops
            values["unknown_loops"] = self.operations.unknown_loops
            values["unknown_kernels"] = self.operations.unknown_kernels
        if self.estimate is not None:
            values["estimate"] = self.estimate.summary(self)
        return values


@dataclasses.dataclass(frozen=True)
class StepTime:
    r"""A roofline: seconds that each resource of a device needs for one step at its maker's peak.

    $t = \max(F / (n \cdot \text{flops}), (A + O + 2T) / \text{bandwidth}, X / \text{interconnect} + Y /
    \text{network})$ with F operations executed on n devices, A, O, T bytes of arguments, outputs and temporaries (every
    temporary written and read once), X and Y bytes received within a slice and between slices; F and X for a balanced
    routing. It assumes that the three overlap perfectly and that kernels run at peak: a bound that no real step
    reaches.
    """

    compute: float
    memory: float
    exchange: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def bound(self) -> str:
        """What the largest is."""
        return max(("compute", "memory", "exchange"), key=lambda name: getattr(self, name))

    def summary(self, fit: Fit) -> dict[str, Any]:
        """With tokens per second and utilization."""
        return {
            "label": "estimate at peak rates, not a measurement",
            "seconds": self.seconds,
            "bound": self.bound,
            **dataclasses.asdict(self),
            "tokens_per_second": fit.tokens / self.seconds,
            "mfu": fit.model_flops / (fit.balanced_operations / self.compute * self.seconds) if self.compute else 0.0,
        }


def check_fit(
    run: RunConfig, topology: Topology, *, what: What = "train", rows: int | None = None, length: int | None = None
) -> Fit:
    """Compiles a run's step for a topology and reads the result.

    Args:
      run: with the mesh; an axis of -1 is what is left.
      topology: of `describe_topology`.
      what: of `jaxmoe.scaling.fit_programs.traced_program`.
      rows, length: decode: as there.

    Raises:
      ConfigError: a mesh that does not fit the devices or the model.
    """
    started = time.perf_counter()
    config = run.mesh.resolved(len(topology.devices))
    if what == "train":
        check_mesh(config, run.model, run.train, run.grpo)
    partitioning = Partitioning(build_mesh(config, topology.devices))
    with topology.compiling():
        program = traced_program(run, partitioning, what, rows=rows, length=length)
        lowered = program.traced.lower()
    cost = flops_per_token(run.model, run.train.sequence_length)
    limit, held = memory_limit(topology), program.held
    common = {
        "member": run.name, "topology": topology.name, "mesh": config, "what": what, "remat": run.model.remat,
        "gradient_accumulation": run.train.gradient_accumulation, "grpo": run.grpo is not None,
        "devices": len(topology.devices), "tokens": program.tokens, "limit": limit, "held": held,
        "model_flops": (cost.training if what == "train" else cost.forward) * program.tokens,
        "room": _room(run, partitioning),
    }  # fmt: skip
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak, _ = _refused(str(error))
        if peak is None:
            raise
        return Fit(
            **common, fits=False, peak=peak + held, arguments=None, outputs=None, temporaries=None, operations=None,
            exchanges=(), compile_seconds=time.perf_counter() - started, estimate=None,
        )  # fmt: skip
    memory = compiled.memory_analysis()
    # Donated arguments become outputs: they are there once.
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = max(peak + memory.temp_size_in_bytes, getattr(memory, "peak_memory_in_bytes", 0)) + held
    slice_of = [getattr(device, "slice_index", 0) or 0 for device in partitioning.mesh.devices.flat]
    if topology.chip.platform == "cuda":
        slice_of = [device.id // 8 for device in partitioning.mesh.devices.flat]
    fit = Fit(
        **common, fits=peak <= limit, peak=peak, arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes, temporaries=memory.temp_size_in_bytes,
        operations=count_operations(program.traced.jaxpr),
        exchanges=tuple(exchanges(compiled.as_text(), slice_of)), compile_seconds=time.perf_counter() - started,
        estimate=None,
    )  # fmt: skip
    return dataclasses.replace(fit, estimate=_step_time(fit, topology))


def _room(run: RunConfig, partitioning: Partitioning) -> float:
    if not run.model.num_moe_layers:
        return 1.0
    axes = expert_axes(partitioning, run.model.moe.num_experts)
    return receive_room(run.model.moe, partitioning.size(*((axes,) if isinstance(axes, str) else axes)))


def receive_room(moe: MoEConfig, group: int) -> float:
    """Rows of the receive buffer of an expert group's device over those of a balanced routing (docs/distributed.md)."""
    if group == 1:
        return 1.0
    if moe.expert_buffer_factor is not None:
        return moe.expert_buffer_factor
    return group * min(moe.experts_per_token, moe.num_experts // group) / moe.experts_per_token


def _step_time(fit: Fit, topology: Topology) -> StepTime:
    chip = topology.chip
    # Half of the ragged exchanges fill the receive buffer, half bring as many rows home as were sent.
    filled = {"ragged-all-to-all": 2 / (1 + fit.room)}
    received = sum(exchange.bytes * filled.get(exchange.kind, 1.0) for exchange in fit.exchanges)
    between = sum(exchange.between_slices for exchange in fit.exchanges)
    return StepTime(
        compute=fit.balanced_operations / fit.devices / chip.flops,
        memory=(fit.arguments + fit.outputs + 2 * fit.temporaries) / chip.bandwidth,
        exchange=(received - between) / chip.interconnect + between / chip.network,
    )


# ------------------------------------------------------------------------------------------------ memory of a device


def memory_limit(topology: Topology) -> int:
    """Bytes that the compiler gives programs on a device: of a TPU by its own word, of a GPU all that the card has."""
    if topology.chip.platform == "cuda":
        return topology.chip.memory
    limit = _tpu_limit(topology.name)
    if limit is None:
        logger.warning("%s: the compiler tells no limit; all of the memory of the chip is taken for it", topology.name)
        return topology.chip.memory
    return limit


@functools.cache
def _tpu_limit(name: str) -> int | None:
    """What the TPU compiler says when it refuses a program that no device could hold."""
    from jaxmoe.scaling.topologies import describe_topology

    device = describe_topology(name).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    much = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(much).compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(str(error))[1]
    return None


_TOO_LARGE = (
    r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm",
    r"total memory required for HLO temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)",
)
"""How the TPU compiler says that a program needs more memory than there is: at the end, or before it tries."""


def _refused(message: str) -> tuple[int | None, int | None]:
    """Bytes that a refused program would have needed, and those that there are; None if it was refused for another
    reason."""
    for pattern in _TOO_LARGE:
        found = re.search(pattern, message)
        if found is not None:
            return _parsed_bytes(found[1]), _parsed_bytes(found[2])
    return None, None


def _parsed_bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}
    return round(float(text.rstrip("KMGT")) * units.get(text[-1], 1))
