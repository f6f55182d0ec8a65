"""What a traced and a compiled program do: floating-point operations, and what devices exchange.

XLA's own `cost_analysis` counts the body of a loop once and a custom kernel not at all, so operations are counted in
the traced program, and exchanges in the compiled one, loops times their trips in both.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast", "recv",
)  # fmt: skip
"""Kinds of exchange; `recv` is what XLA:TPU makes of the part of a collective that goes between slices."""


# ------------------------------------------------------------------------------- operations, in the traced program


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating-point operations of one execution on all devices, a multiply-add counted as two.

    Attributes:
      products: of matrix products.
      kernels: of Pallas kernels other than the experts', by their own estimates or, of attention's, by their shapes.
      experts: of the Pallas kernels of `pallas_kernels`, by their own estimates, which count all rows that there is
        room for and the most tiles that a routing can touch.
      unknown_loops: loops whose trips the program does not say; each body is counted once.
      unknown_kernels: calls of Pallas kernels that give no estimate, and count nothing.
    """

    products: int = 0
    kernels: int = 0
    experts: int = 0
    unknown_loops: int = 0
    unknown_kernels: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.products + self.kernels + self.experts

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: int) -> Operations:
        """Of `count` executions."""
        return Operations(
            self.products * count, self.kernels * count, self.experts * count, self.unknown_loops, self.unknown_kernels
        )


def count_operations(jaxpr: Any) -> Operations:
    """The operations of a traced function.

    Recomputation under `jax.checkpoint` counts as often as it is done. Inside `shard_map`, where a program is that of
    one device, it counts for each.

    Args:
      jaxpr: `jit(f).trace(...).jaxpr` or any jaxpr in it.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = Operations()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += Operations(products=_product(equation))
        elif name == "ragged_dot_general":
            total += Operations(products=_ragged_product(equation))
        elif name == "pallas_call":
            total += _kernel(equation)
        elif name == "cond":
            branches = [count_operations(branch) for branch in equation.params["branches"]]
            total += max(branches, key=lambda each: each.total)
        elif name == "while":
            body = count_operations(equation.params["body_jaxpr"])
            total += body + Operations(unknown_loops=1 if body.total else 0)
        else:
            inner = sum((count_operations(each) for each in _inner(equation.params)), Operations())
            total += inner.times(_repetitions(equation))
    return total


def _repetitions(equation: Any) -> int:
    """How often what is inside an equation runs."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        mesh = equation.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in equation.params["newly_manual_axes"])
    return 1


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(each, "eqns") or hasattr(getattr(each, "jaxpr", None), "eqns"):
                yield each


_ATTENTION = {
    "splash_mha_fwd": (2, -2, -1), "splash_mha_dkv": (4, -2, -1), "splash_mha_dq": (3, -2, -1),
    "mha_forward": (2, -3, 0), "mha_preprocess_backward": (0, -3, 0), "mha_backward": (7, -3, -1),
}  # fmt: skip
"""Of JAX's causal attention kernels, which give no estimate, by how their names begin: products of each pair of a query
and a key; the axis of the keys' positions; the axis of the grid that counts blocks of a row."""


def _kernel(equation: Any) -> Operations:
    estimate = equation.params.get("cost_estimate")
    name = getattr(equation.params.get("name_and_src_info"), "name", None) or equation.params.get("name") or ""
    if estimate is None:
        kind = next((kind for kind in _ATTENTION if name.startswith(kind)), None)
        return Operations(unknown_kernels=1) if kind is None else Operations(kernels=_attention(equation, kind))
    flops = int(estimate.flops)
    return Operations(experts=flops) if name.endswith(("_tpu", "_gpu")) else Operations(kernels=flops)


def _attention(equation: Any, kind: str) -> int:
    """Of the blocks that a causal mask leaves: of n x n blocks of pairs (n + 1) n / 2."""
    products, positions, rows = _ATTENTION[kind]
    arrays = (each.aval for each in equation.invars if each.aval.ndim >= 3)  # a batch of one has no axis
    query, key, *_ = (array for array in arrays if np.dtype(array.dtype).kind not in "iu")
    blocks = equation.params["grid_mapping"].grid[rows]
    return products * math.prod(query.shape) * key.shape[positions] * (blocks + 1) // blocks


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged_product(equation: Any) -> int:
    """Of rows that are multiplied with one group each; XLA may do more."""
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    return 2 * math.prod(left) * right[-1]


# --------------------------------------------------------------------------------- exchanges, in the compiled program


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One kind of collective in a program, over one execution, on one device.

    Attributes:
      kind: one of `COLLECTIVES`.
      count: how many are executed.
      bytes: that the device receives; of `ragged-all-to-all` the room for what it may receive.
      between_slices: of `bytes`, those of groups of devices that lie in more than one slice.
    """

    kind: str
    count: int
    bytes: int
    between_slices: int


def exchanges(text: str, slice_of: Sequence[int]) -> list[Exchange]:
    """The collectives of a compiled program, by kind.

    Args:
      text: `compiled.as_text()`.
      slice_of: slice of each device, in the order of the mesh.
    """
    computations, entry = _computations(text)
    found: dict[str, list[int]] = {kind: [0, 0, 0] for kind in COLLECTIVES}
    chains: set[tuple[str, str]] = set()
    for name, count in _executions(computations, entry).items():
        for line in computations[name]:
            match = _COLLECTIVE.search(line)
            if match is None or (match["kind"] == "recv" and "megascale" not in line):
                continue
            chain = _CHAIN.search(line)  # one collective, in parts beside the products that hide it
            if chain is not None:
                if chain.groups() in chains:
                    continue
                chains.add(chain.groups())
            groups = _groups(line, len(slice_of))
            received = _received(match["kind"], match["shape"], bool(match["start"]), groups)
            crosses = match["kind"] == "recv" or any(
                len({slice_of[device] for device in group}) > 1 for group in groups
            )
            entry_of = found[match["kind"]]
            entry_of[0] += count
            entry_of[1] += count * received
            entry_of[2] += count * received if crosses else 0
    return [Exchange(kind, *numbers) for kind, numbers in found.items() if numbers[0]]


_COLLECTIVE = re.compile(
    rf"= (?P<shape>.*?) (?P<kind>{'|'.join(sorted(COLLECTIVES, key=len, reverse=True))})(?P<start>-start)?\("
)
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=\{?([^,}]*(?:, ?%[\w.\-]+)*)\}?")
_WHILE = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+).*body=%?([\w.\-]+)")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        header = _HEADER.match(line) if line[:1] not in (" ", "}") and "->" in line else None
        if header is not None:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _executions(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs; a branch counts as taken."""
    counts: collections.Counter[str] = collections.Counter()

    def visit(name: str, count: int) -> None:
        counts[name] += count
        for line in computations.get(name, ()):
            loop = _WHILE.search(line)
            if loop is not None:
                visit(loop[2], count * _trips(line, loop[1], computations))
                continue
            for called in _CALLED.finditer(line):
                for each in re.findall(r"[\w.\-]+", called[1]):
                    if each in computations:
                        visit(each, count)

    visit(entry, 1)
    return {name: count for name, count in counts.items() if name in computations}


def _trips(line: str, condition: str, computations: dict[str, list[str]]) -> int:
    """Trips of a loop: as the compiler notes them, else the bound that its condition compares with."""
    noted = re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', line)
    if noted is not None:
        return int(noted[1])
    lines = computations.get(condition, ())
    bounds = [int(bound) for each in lines for bound in re.findall(r"constant\((\d+)\)", each)]
    return max(bounds, default=1)


def _bytes(shape: str) -> int:
    return sum(
        _BYTES[kind] * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in _SHAPE.findall(shape)
    )


def _received(kind: str, shape: str, starts: bool, groups: list[list[int]]) -> int:
    """Bytes that a device receives of the others, by the usual algorithms, from the shape of the result.

    The result of a start is a pair, of the operands and of what the collective will give.
    """
    size = max(map(len, groups), default=1)
    others = (size - 1) / size
    whole = _bytes(shape)
    if starts and kind == "all-gather":
        whole = whole * size // (size + 1)  # the operands are a part of the result each
    elif starts and kind in ("collective-permute", "all-to-all", "ragged-all-to-all"):
        whole //= 2
    elif starts and kind == "reduce-scatter":
        whole //= size + 1
    if kind == "all-reduce":
        return round(2 * whole * others)
    if kind == "reduce-scatter":
        return round(whole * (size - 1))
    if kind in ("collective-permute", "collective-broadcast", "recv"):
        return whole
    return round(whole * others)


def _groups(line: str, devices: int) -> list[list[int]]:
    """The groups of devices that a collective runs in."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs is not None:
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0])]
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    if listed is not None:
        return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", line)
    if iota is not None:
        return _iota(*iota.groups()[1:]).reshape(_sizes(iota[1])).tolist()
    named = re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*?)\}}", line)
    if named is None:
        return [list(range(devices))]
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    chosen = re.findall(r"'(\w+)'", named[4])
    numbers = np.arange(math.prod(axes.values())) if named[2] is None else _iota(named[2], named[3])
    others = [name for name in axes if name not in chosen]
    order = [list(axes).index(name) for name in (*others, *chosen)]
    numbers = numbers.reshape(list(axes.values())).transpose(order)
    return numbers.reshape(-1, math.prod(axes[name] for name in chosen)).tolist()


_IOTA = r"\(?\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _iota(sizes: str, transposed: str | None) -> np.ndarray:
    """Numbers 0, 1, ... in an array of `sizes`, its axes reordered, flat."""
    numbers = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return (numbers if transposed is None else numbers.transpose(_sizes(transposed))).reshape(-1)
