"""Bytes that the exchange of expert parallelism moves per token and routed layer, read from the compiled program.

One MoE layer is compiled, forward and with its gradient, for devices that need not be there: TPUs with libtpu, or
where that is missing the CPU's devices. Nothing runs, and no figure is a measurement.

What counts is what leaves a device. A ragged exchange's operands are buffers, larger than what is sent; it sends the
rows that there are, so under balanced routing T·K/P to each of the others. Their size is that of the operand's rows, as
laid out: TPUs pad a row to a multiple of 512 bytes. Where several rows travel as one, the last to each device counts as
if all but one of them were missing. Of every other collective the buffer is what is sent. The least is
2·K·D·bytes·(1 - 1/P) for a forward pass, the same again for the gradient.

T tokens of one device, D width, F expert hidden width, E experts, K experts per token, P devices of an expert group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
from jaxmoe.config import MESH_AXES, ConfigError, MeshConfig, to_dict
from jaxmoe.layers import MoE
from jaxmoe.layers.exchange import BLOCK, rows_together
from jaxmoe.layers.expert_parallel import compiler_options
from jaxmoe.sharding import Partitioning, build_mesh, use_partitioning
from pallas_kernels import targets

AIM = 1.25
"""The most that the ragged exchange may move, over the least."""

_GATE = 4
"""Bytes of a gate: it travels in float32."""

_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_KINDS = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer on one mesh.

    Attributes:
      chip: one of `pallas_kernels.execution.CHIPS`, or `cpu`.
      topology: as `targets.devices_of` takes it.
      mesh: of the topology's devices.
      batch, sequence: of all devices.
      width, hidden, experts, k: D, F, E, K.
      buffer_factor, overlap: `expert_buffer_factor` and `expert_overlap` of `jaxmoe.config.MoEConfig`.
    """

    chip: str
    topology: str
    mesh: MeshConfig
    batch: int
    sequence: int
    width: int
    hidden: int
    experts: int
    k: int
    buffer_factor: float | None = 1.5
    overlap: bool = False
    dtype: str = "bfloat16"

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.mesh.shape.values())

    @property
    def group(self) -> int:
        """P."""
        return self.mesh.expert * self.mesh.tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.sequence // self.devices

    @property
    def rows(self) -> float:
        """That one ragged exchange is given: T·K, or half of them."""
        return self.tokens * self.k / (2 if self.overlap else 1)

    @property
    def least(self) -> float:
        """Bytes that a token's forward pass has to send."""
        return 2 * self.k * self.width * jnp.dtype(self.dtype).itemsize * (1 - 1 / self.group)


CASES = (
    Case("v5p", "v5p:2x2x1", MeshConfig(fsdp=1, expert=4), 8, 2048, 1024, 2048, 16, 2),
    Case("v5p", "v5p:2x2x1", MeshConfig(fsdp=1, expert=4), 8, 2048, 1024, 2048, 16, 2, overlap=True),
    Case("v5p", "v5p:4x4x4", MeshConfig(fsdp=8, expert=8), 64, 4096, 2048, 1024, 64, 8),
    Case("v5p", "v5p:4x4x4", MeshConfig(fsdp=8, expert=4, tensor=2), 32, 4096, 2048, 512, 256, 8),
    Case("v5p", "v5p:2x2x2", MeshConfig(fsdp=1, expert=8), 16, 2048, 256, 512, 16, 8),
    Case("v5p", "v5p:2x2x1", MeshConfig(fsdp=1, expert=4), 8, 2048, 64, 128, 16, 2),
)
CPU_CASE = Case("cpu", "8 host devices", MeshConfig(fsdp=2, expert=4), 16, 128, 64, 32, 16, 2, None, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: one of `_KINDS`.
      part: of the exchange, `sizes`, `rows` or `gates`; `other` for what is none of it.
      buffer: bytes of its result on one device.
      row: bytes of a row of it.
      group: devices that take part together.
      together: rows of the exchange that are one of its rows.
    """

    kind: str
    part: str
    buffer: int
    row: int
    group: int
    together: int = 1

    def sent(self, rows: float) -> float:
        """Bytes that leave a device, `rows` those that a ragged exchange is given."""
        if self.kind == "ragged-all-to-all":
            return (self.group - 1) * (rows / self.group + self.together - 1) / self.together * self.row
        if self.kind == "reduce-scatter":
            return self.buffer * (self.group - 1)
        if self.kind == "collective-permute":
            return self.buffer
        return self.buffer * (1 - 1 / self.group) * (2 if self.kind == "all-reduce" else 1)


def collectives(program: str, row: int) -> list[Collective]:
    """The collectives of a compiled program's text, asynchronous ones once.

    Args:
      program: optimized HLO.
      row: bytes of a token.
    """
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
        if match is None:
            continue
        shapes = [
            (name, [int(size) for size in sizes.split(",") if size])
            for name, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])
            if name in _BYTES
        ]
        if match[3] and match[2] != "all-reduce":  # operands, result, and on some platforms counters
            shapes = [max(shapes, key=lambda shape: (_BYTES[shape[0]] * math.prod(shape[1][1:]), math.prod(shape[1])))]
        buffers = [_BYTES[name] * math.prod(sizes) for name, sizes in shapes]
        name, sizes = shapes[0]
        scope = re.search(r'op_name="([^"]*)"', line)  # XLA:GPU forgets it of ragged exchanges
        scope = scope[1] if scope else ""
        own_row = buffers[0] // (sizes[0] if sizes else 1)
        if name in ("s32", "u32"):
            part = "sizes"
        elif "/gates/" in scope or (match[2] == "ragged-all-to-all" and own_row == BLOCK * _GATE):
            part = "gates"
        elif match[2] == "ragged-all-to-all" or re.search("/(send|return)/", scope):
            part = "rows"
        else:
            part = "other"
        together = rows_together(_GATE if part == "gates" else row) if match[2] == "ragged-all-to-all" else 1
        found.append(Collective(match[2], part, sum(buffers), own_row, _group(line), together))
    return found


def beside_kernels(program: str) -> tuple[int, int]:
    """Ragged exchanges of a scheduled program, and those between whose start and end a kernel is called."""
    lines, exchanges, beside = program.splitlines(), 0, 0
    for number, line in enumerate(lines):
        started = re.search(r"%(\S+) = .*? ragged-all-to-all(-start)?\(", line)
        exchanges += started is not None
        if started is None or not started[2]:
            continue
        for later in lines[number + 1 :]:
            if f"ragged-all-to-all-done(%{started[1]})" in later:
                break
            if " custom-call(" in later and "tpu_custom_call" in later:
                beside += 1
                break
    return exchanges, beside


def _group(line: str) -> int:
    """Devices of one replica group: `{{0,1},{2,3}}`, `[groups,devices]<=[...]`, or `mesh['a'=4,'b'=2] {'b'}`."""
    if "collective-permute" in line:
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if shaped := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shaped[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(axis.split("=") for axis in named[1].split(","))
        return math.prod(int(sizes[axis]) for axis in named[2].split(","))
    raise ValueError(f"the replica groups of {line.strip()[:200]!r} are in no form that is known.")


def compiled(case: Case, *, gradient: bool) -> jax.stages.Compiled:
    """The layer on the case's mesh: outputs and statistics, or their sum's gradient."""
    devices = jax.devices() if case.chip == "cpu" else targets.devices_of(case.chip, case.topology)
    partitioning = Partitioning(build_mesh(case.mesh, devices[: case.devices]))
    definition, params = nnx.split(
        nnx.eval_shape(
            lambda: MoE(
                case.width,
                num_experts=case.experts,
                experts_per_token=case.k,
                expert_hidden=case.hidden,
                expert_buffer_factor=case.buffer_factor,
                expert_overlap=case.overlap,
                compute_dtype=case.dtype,
                rngs=nnx.Rngs(0),
            )
        )
    )

    def spread(shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioning.sharding(axes, shape))

    x = spread((case.batch, case.sequence, case.width), jnp.dtype(case.dtype), ("batch", "sequence", None))
    params = jax.tree.map(
        lambda variable: variable.replace(
            spread(variable.shape, variable.dtype, variable.get_metadata().get("logical_axes", ()))
        ),
        params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )

    def layer(params, x):
        return nnx.merge(definition, params)(x)

    def differentiated(params, x, cotangent):
        outputs, pull_back = jax.vjp(layer, params, x)
        return outputs, pull_back((cotangent, jax.tree.map(jnp.ones_like, outputs[1])))

    for_chip = pallas_kernels.compiling_for(case.chip) if case.chip != "cpu" else contextlib.nullcontext()
    with for_chip, use_partitioning(partitioning):
        call = jax.jit(differentiated).lower(params, x, x) if gradient else jax.jit(layer).lower(params, x)
        return call.compile(compiler_options=compiler_options(partitioning) if case.overlap else None)


def rows_of(case: Case) -> list[dict[str, Any]]:
    """Forward, and forward with gradient: bytes sent per token by part and kind, their sum over the least."""
    rows = []
    for gradient in (False, True):
        row = case.width * jnp.dtype(case.dtype).itemsize
        program = compiled(case, gradient=gradient).as_text()
        found, (exchanges, beside) = collectives(program, row), beside_kernels(program)
        sent: dict[str, float] = {}
        buffers: dict[str, float] = {}
        for collective in found:
            name = f"{collective.part}: {collective.kind}"
            sent[name] = sent.get(name, 0.0) + collective.sent(case.rows) / case.tokens
            buffers[name] = buffers.get(name, 0.0) + collective.buffer / case.tokens
        exchanged = sum(size for name, size in sent.items() if not name.startswith("other"))
        least = case.least * (2 if gradient else 1)
        rows.append(
            {
                **to_dict(case),
                "P": case.group,
                "T": case.tokens,
                "passes": "forward and backward" if gradient else "forward",
                "sent_bytes_per_token": {name: round(size, 1) for name, size in sorted(sent.items())},
                "buffer_bytes_per_token": {name: round(size, 1) for name, size in sorted(buffers.items())},
                "exchanged_bytes_per_token": round(exchanged, 1),
                "least_bytes_per_token": round(least, 1),
                "ratio_to_least": round(exchanged / least, 4),
                "ragged_exchanges": exchanges,
                "exchanges_beside_kernels": beside,
            }
        )
    return rows


def run(*, rounds: int = 1) -> dict[str, Any]:
    """Everything, as plain JSON values. Nothing is timed, so `rounds` is of no consequence.

    Raises:
      ConfigError: neither a TPU's compiler nor eight devices of the CPU are there.
    """
    del rounds
    try:
        return {"compiler": "XLA:TPU, compiled and not run", "rows": [row for case in CASES for row in rows_of(case)]}
    except targets.CompilerMissing as error:
        if jax.device_count() < CPU_CASE.devices:
            raise ConfigError(
                f"{error} Or set XLA_FLAGS=--xla_force_host_platform_device_count={CPU_CASE.devices} for the exchange "
                "of the CPU, which is padded."
            ) from error
        return {"compiler": f"XLA:CPU, for {error}", "rows": rows_of(CPU_CASE)}


def describe(result: dict[str, Any]) -> str:
    """The result as text for people."""
    lines = [f"bytes sent by a device per token and routed layer; {result['compiler']}"]
    for row in result["rows"]:
        axes = " x ".join(f"{size} {axis}" for axis, size in row["mesh"].items() if axis in MESH_AXES and size != 1)
        lines += [
            "",
            f"{row['topology']}, {axes}: T={row['T']} D={row['width']} F={row['hidden']} E={row['experts']} "
            f"K={row['k']} P={row['P']} {row['dtype']}, {row['passes']}",
        ]
        for name, size in row["sent_bytes_per_token"].items():
            lines.append(f"  {name:<32} {size:>12,.1f} sent {row['buffer_bytes_per_token'][name]:>12,.1f} in buffers")
        aim = f"   aim {AIM}" if row["ragged_exchanges"] else "   (the CPU's exchange is padded: no aim)"
        lines.append(
            f"  {'exchange':<32} {row['exchanged_bytes_per_token']:>12,.1f} of at least "
            f"{row['least_bytes_per_token']:,.1f}: {row['ratio_to_least']:.3f}{aim}"
        )
        if row["overlap"]:
            lines.append(
                f"  with expert_overlap, {row['exchanges_beside_kernels']} of {row['ragged_exchanges']} ragged "
                "exchanges are scheduled beside a kernel"
            )
    return "\n".join(lines)
