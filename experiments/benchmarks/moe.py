"""The MoE layer's training step beside a dense MLP of the same active FLOPs, and against its roofline.

Measured is the whole SwiGLU layer: router in float32, top-k, softmax gate, plan, dispatch, products, combine; forward
and backward with respect to tokens, router and experts. A step gets the previous step's outputs donated and writes
over them, as a training step does: fresh pages would otherwise be most of the time at large E. The dense MLP takes
its T·K rows the same way. All contenders of one shape take turns in one process; medians of wall seconds are quoted.

The roofline is the larger of the dense MLP's time and the time to read every touched weight twice and write its
gradient once; touched are the experts, not the router, that have at least one row. Its bandwidth is that of
`a + 2 b` on arrays of `Sizes.stream_bytes` into a donated third, which takes its turns among the contenders.

Contenders: the platform's backend of `pallas_kernels`, and `cpu_native` where it was built; `capacity_einsum`, the
layer of one-hot products with a capacity for each 1,024 tokens; `capacity_einsum_ungrouped`, the same with one capacity
for all tokens.
Routings: `balanced` is a random router on random tokens; `zipf` draws the experts of a token without replacement with
probability proportional to rank^-1.2; `hot` has expert 0 among every token's choices.

T tokens, D width, F expert hidden width, E experts, K experts per token, N = T·K rows; G groups of S tokens and
C rows of one expert's capacity, of the capacity layer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import train_step
from experiments.benchmarks.timing import Timing, interleaved, machine
from jaxmoe.config import ConfigError
from jaxmoe.layers.router import scores_of, top_experts
from jaxmoe.training import reuse_freed_memory
from pallas_kernels import moe_mlp, native, resolved_backend

ROUTINGS = ("balanced", "zipf", "hot")
ZIPF_EXPONENT = 1.2
TARGETS = {4096: {8: 1.5, 32: 2.0, 128: 3.0, 256: 4.5}, 16384: {8: 1.5, 32: 1.8, 128: 2.2, 256: 2.8}}
"""Aims for ratio_to_dense by N and E, of the backend of the CPU under balanced routing at D=256, F=512."""

PEAK_TERAFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU7x": 2307 / 2,  # a chip is two devices
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
}
"""Dense bfloat16 peak of one JAX device, by `device_kind`, as the vendors state it."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer: T, D, F, E, K."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    @property
    def rows(self) -> int:
        """N."""
        return self.tokens * self.k

    @property
    def training_flops(self) -> int:
        """Of the router's and the experts' products, forward and backward."""
        return 3 * 2 * (self.rows * 3 * self.width * self.hidden + self.tokens * self.width * self.experts)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a run without `--device` measures.

    Attributes:
      width, hidden: D and F.
      rows, choices: every N with every K.
      experts: E under balanced routing.
      skewed_experts: E under the other routings, at the first K.
      einsum_experts: E of the capacity layers, of which the ungrouped one runs at the first N alone: its one-hot
        arrays grow with T².
      ragged_dot_experts: E of the `ragged_dot` backend, at the first N and K. Its time grows with E.
      linear_tokens: T of the linearity rows, at each E of `linear_experts` and the first K.
      train_step_experts: E of the whole training steps.
      stream_bytes: of each of the three arrays of the bandwidth measurement.
    """

    width: int = 256
    hidden: int = 512
    rows: tuple[int, ...] = (4096, 16384)
    choices: tuple[int, ...] = (2, 8)
    experts: tuple[int, ...] = (8, 32, 128, 256)
    skewed_experts: tuple[int, ...] = (32, 128)
    einsum_experts: tuple[int, ...] = (32,)
    ragged_dot_experts: tuple[int, ...] = (8, 32, 128)
    linear_tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    linear_experts: tuple[int, ...] = (8, 32)
    train_step_experts: tuple[int, ...] = (8, 32, 128)
    stream_bytes: int = 2**28


DEVICE_SHAPES = (
    Shape(16384, 1024, 2048, 8, 2),
    Shape(16384, 1024, 2048, 64, 2),
    Shape(16384, 2048, 4096, 8, 2),
    Shape(16384, 2048, 4096, 64, 2),
    Shape(16384, 2048, 512, 256, 8),
)
"""Layers of studies on accelerators: F = 2D, and fine-grained experts."""


def run(*, rounds: int, device: bool = False, sizes: Sizes | None = None) -> dict[str, Any]:
    """Everything, as plain JSON values.

    Args:
      rounds: timed rounds; the slow contenders take fewer.
      device: measure the accelerator instead, at `DEVICE_SHAPES` in bfloat16.
      sizes: None for those of `Sizes`; not for `device`.

    Raises:
      ConfigError: `device` where there is no accelerator.
    """
    if device:
        if jax.default_backend() == "cpu":
            raise ConfigError(
                "--device measures a TPU or GPU, but JAX finds only the CPU here; leave --device out to measure the "
                "CPU, or install JAX for the accelerator (pip install 'jaxmoe[tpu]' or 'jaxmoe[cuda13]')."
            )
        return {"machine": machine(), "device": device_rows(DEVICE_SHAPES, rounds=rounds)}
    sizes = sizes or Sizes()
    with reuse_freed_memory():  # as `train` does
        rows = layer_rows(sizes, rounds=rounds)
        linear = linear_in_tokens(sizes, rounds=min(rounds, 5))
        steps = training_steps(sizes.train_step_experts, rounds=min(rounds, 3))
    return {"machine": machine(), "rows": rows, "train_step": steps, "linear_in_tokens": linear}


def measured_backends() -> tuple[str, ...]:
    """The platform's own backend, and the compiled one where it was built."""
    own = resolved_backend()
    return (own, "cpu_native") if own == "cpu" and native.is_built() else (own,)


def routing_bias(routing: str, key: jax.Array, tokens: int, experts: int) -> jax.Array:
    """What is added to the logits before the choice, so that a fresh router chooses as `routing` says: (T or 1, E)."""
    if routing == "balanced":
        return jnp.zeros((1, experts), jnp.float32)
    if routing == "hot":
        return jnp.zeros((1, experts), jnp.float32).at[0, 0].set(1e6)
    if routing == "zipf":
        log_popularity = -ZIPF_EXPONENT * jnp.log(jnp.arange(1, experts + 1, dtype=jnp.float32))
        return log_popularity + jax.random.gumbel(key, (tokens, experts), jnp.float32)
    raise ValueError(f"routing={routing!r}; choose one of {', '.join(map(repr, ROUTINGS))}.")


def route(router: jax.Array, x: jax.Array, bias: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Chosen experts and gates, (T, K) each; the bias moves the choice only."""
    logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    expert_index = top_experts(jax.lax.stop_gradient(logits) + bias, k)
    return expert_index, jax.nn.softmax(scores_of(logits, expert_index), axis=-1)


def capacity_einsum(
    x: jax.Array,
    expert_index: jax.Array,
    gate: jax.Array,
    w_gate_up: jax.Array,
    w_down: jax.Array,
    *,
    capacity_factor: float = 1.5,
    group: int | None = 1024,
) -> jax.Array:
    """The routed SwiGLU MLP as products with one-hot (G, S, E, C) tensors (GShard), arguments as of `moe_mlp`.

    Args:
      capacity_factor: C = ceil(capacity_factor · S · K / E); an expert's later tokens are dropped.
      group: the most tokens that share a capacity, S; it must divide T where T is larger. None: all of them.
    """
    tokens, k = expert_index.shape
    experts, size = w_gate_up.shape[0], min(tokens, group or tokens)
    capacity = math.ceil(capacity_factor * size * k / experts)
    grouped = x.reshape(-1, size, x.shape[1])
    chosen = jax.nn.one_hot(expert_index.reshape(-1, size, k), experts, dtype=jnp.int32)
    earlier = jnp.cumsum(chosen.reshape(-1, size * k, experts), axis=1).reshape(chosen.shape) - chosen
    slot = jax.nn.one_hot(jnp.sum(earlier * chosen, axis=-1), capacity, dtype=x.dtype)  # zeros beyond the capacity
    chosen = chosen.astype(x.dtype)
    dispatch = jnp.einsum("gske,gskc->gsec", chosen, slot)
    combine = jnp.einsum("gske,gskc->gsec", chosen, slot * gate.reshape(-1, size, k, 1).astype(x.dtype))
    received = jnp.einsum("gsec,gsd->egcd", dispatch, grouped)
    gated, up = jnp.split(jnp.einsum("egcd,edf->egcf", received, w_gate_up), 2, axis=-1)
    returned = jnp.einsum("egcf,efd->egcd", jax.nn.silu(gated) * up, w_down)
    return jnp.einsum("gsec,egcd->gsd", combine, returned).reshape(x.shape)


EINSUMS = {
    "capacity_einsum": capacity_einsum,
    "capacity_einsum_ungrouped": functools.partial(capacity_einsum, group=None),
}


def layer_rows(sizes: Sizes, *, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a step of every contender, and their ratios to the dense MLP and to the roofline."""
    rows, backends = [], measured_backends()
    for k in sizes.choices:
        for n in sizes.rows:
            shape = functools.partial(Shape, n // k, sizes.width, sizes.hidden, k=k)
            contenders = [(shape(experts=e), "balanced", backend) for e in sizes.experts for backend in backends]
            einsums = [name for name in EINSUMS if n == sizes.rows[0] or name != "capacity_einsum_ungrouped"]
            contenders += [(shape(experts=e), "balanced", name) for e in sizes.einsum_experts for name in einsums]
            if k == sizes.choices[0]:
                skewed = [(e, routing) for e in sizes.skewed_experts for routing in ROUTINGS[1:]]
                contenders += [(shape(experts=e), routing, backend) for e, routing in skewed for backend in backends]
            rows += _compared(contenders, sizes.stream_bytes, rounds=rounds)
    shape = functools.partial(Shape, sizes.rows[0] // sizes.choices[0], sizes.width, sizes.hidden, k=sizes.choices[0])
    if "ragged_dot" not in backends and sizes.ragged_dot_experts:
        slow = [(shape(experts=e), "balanced", "ragged_dot") for e in sizes.ragged_dot_experts]
        rows += _compared(slow, sizes.stream_bytes, rounds=min(rounds, 2))
    return rows


def _compared(contenders: list[tuple[Shape, str, str]], stream_bytes: int, *, rounds: int) -> list[dict[str, Any]]:
    """Rows of (shape, routing, contender)s that share T, K, D and F."""
    shape = contenders[0][0]
    _say(f"N={shape.rows} K={shape.k}: dense, {', '.join(f'{c[2]} E={c[0].experts} {c[1]}' for c in contenders)}")
    calls = {"stream": _stream_call(stream_bytes), "dense": _dense_call(shape)}
    weights, touched = {}, {}
    for case in contenders:
        if case[0].experts not in weights:  # shared, so that large E fit beside each other
            weights[case[0].experts] = _weights(case[0], jnp.float32)
        calls[case], touched[case] = _moe_call(*case, weights[case[0].experts])
    timings = interleaved(calls, rounds=rounds)
    bytes_per_second = 3 * stream_bytes / timings["stream"].wall
    dense = timings["dense"].wall
    _say(f"  dense {1000 * dense:.1f} ms, {bytes_per_second / 1e9:.1f} GB/s")
    return [_row(case, timings[case], dense, touched[case], bytes_per_second) for case in contenders]


def _row(
    case: tuple[Shape, str, str], timing: Timing, dense: float, touched: int, bytes_per_second: float
) -> dict[str, Any]:
    shape, routing, contender = case
    weight_bytes = 4 * 3 * shape.width * shape.hidden * touched
    roofline = max(dense, 3 * weight_bytes / bytes_per_second)
    return {
        "E": shape.experts,
        "K": shape.k,
        "T": shape.tokens,
        "D": shape.width,
        "F": shape.hidden,
        "routing": routing,
        "contender": contender,
        "milliseconds": round(1000 * timing.wall, 3),
        "ratio_to_dense": round(timing.wall / dense, 3),
        "ratio_to_roofline": round(timing.wall / roofline, 3),
        "dense_milliseconds": round(1000 * dense, 3),
        "roofline_milliseconds": round(1000 * roofline, 3),
        "experts_with_rows": touched,
        "tokens_per_second": round(shape.tokens / timing.wall),
    }


def linear_in_tokens(sizes: Sizes, *, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds per token by T, relative to the middle T of the same E."""
    k, rows = sizes.choices[0], []
    for experts, backend in itertools.product(sizes.linear_experts, measured_backends()):
        shapes = [Shape(t, sizes.width, sizes.hidden, experts, k) for t in sizes.linear_tokens]
        _say(f"T={', '.join(map(str, sizes.linear_tokens))}: {backend} E={experts} K={k}")
        weights = _weights(shapes[0], jnp.float32)
        calls = {shape.tokens: _moe_call(shape, "balanced", backend, weights)[0] for shape in shapes}
        timings = interleaved(calls, rounds=rounds)
        per_token = {tokens: timing.wall / tokens for tokens, timing in timings.items()}
        middle = per_token[sizes.linear_tokens[len(sizes.linear_tokens) // 2]]
        rows += [
            {
                "E": experts,
                "K": k,
                "T": tokens,
                "contender": backend,
                "milliseconds": round(1000 * timings[tokens].wall, 3),
                "milliseconds_per_token": round(1000 * per_token[tokens], 6),
                "ratio_to_middle": round(per_token[tokens] / middle, 3),
            }
            for tokens in sizes.linear_tokens
        ]
    return rows


def training_steps(experts: tuple[int, ...], *, rounds: int) -> list[dict[str, Any]]:
    """Whole training steps, and those of transformers' Mixtral where it is installed, as in the benchmark `train_step`.

    Without it the ratio is None.
    """
    own = measured_backends()[0]
    if experts and not train_step.peer_is_installed():
        _say("transformers is not measured: it is not installed here (pip install 'jaxmoe[hf]')")
    rows = []
    for num_experts, backend in itertools.product(experts, measured_backends()):
        _say(f"training step E={num_experts}: {backend}")
        # Warm until what is freed between the steps serves the next ones.
        timings = train_step.mixtral_steps(num_experts, rounds=rounds, backend=backend, warmup=3)
        peer = timings["transformers"].wall if "transformers" in timings else None
        if backend != own:
            timings = {f"jaxmoe {backend}": timings["jaxmoe"]}
        rows += [
            {
                "E": num_experts,
                "contender": name,
                "tokens_per_second": round(train_step.PEER_BATCH * train_step.PEER_SEQUENCE / timing.wall),
                "speed_ratio_to_transformers": round(peer / timing.wall, 3) if peer else None,
            }
            for name, timing in timings.items()
        ]
    return rows


def device_rows(shapes: tuple[Shape, ...], *, rounds: int, steps_per_call: int = 10) -> list[dict[str, Any]]:
    """Layer and dense MLP in bfloat16 with the platform's own backend, against the peak of the device.

    A layer that does not run, for want of memory or of an implementation, is a row with a note and no figures.
    """
    kind, backend, rows = jax.devices()[0].device_kind, resolved_backend(), []
    peak = PEAK_TERAFLOPS.get(kind)
    unknown = None if peak else f"no bfloat16 peak is known for {kind!r}, so there is no utilization"
    for shape in shapes:
        _say(f"{shape}: dense, {backend}")
        flops = {"dense": 3 * 2 * shape.rows * 3 * shape.width * shape.hidden, backend: shape.training_flops}
        size = {"E": shape.experts, "K": shape.k, "T": shape.tokens, "D": shape.width, "F": shape.hidden}
        weights = _weights(shape, jnp.bfloat16)
        try:
            calls = {
                "dense": _dense_call(shape, jnp.bfloat16, steps_per_call),
                backend: _moe_call(shape, "balanced", backend, weights, steps_per_call)[0],
            }
            timings = interleaved(calls, rounds=rounds, warmup=2)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            empty = dict.fromkeys(("milliseconds", "model_teraflops_per_second", "utilization", "ratio_to_dense"))
            rows.append({**size, "contender": backend, **empty, "note": f"does not run here: {reason}"})
            continue
        for name, timing in timings.items():
            seconds = timing.wall / steps_per_call
            teraflops = flops[name] / seconds / 1e12
            rows.append(
                {
                    **size,
                    "contender": name,
                    "milliseconds": round(1000 * seconds, 3),
                    "model_teraflops_per_second": round(teraflops, 3),
                    "utilization": round(teraflops / peak, 4) if peak else None,
                    "ratio_to_dense": round(timing.wall / timings["dense"].wall, 3),
                    "note": unknown,
                }
            )
    return rows


def _dense_call(shape: Shape, dtype: Any = jnp.float32, steps: int = 1) -> Callable[[], None]:
    """Steps of one SwiGLU MLP on the N rows of `shape`."""
    stacked = _weights(dataclasses.replace(shape, experts=1), dtype)
    weights = {name: stacked[name][0] for name in ("gate_up", "down")}
    x = jax.random.normal(jax.random.key(1), (shape.rows, shape.width), dtype)
    return _call(_training_step("dense", 1), weights, x, None, steps)


def _moe_call(
    shape: Shape, routing: str, contender: str, weights: Mapping[str, jax.Array], steps: int = 1
) -> tuple[Callable[[], None], int]:
    """Steps of a contender's layer, and how many experts have at least one row."""
    x = jax.random.normal(jax.random.key(1), (shape.tokens, shape.width), weights["gate_up"].dtype)
    bias = routing_bias(routing, jax.random.key(3), shape.tokens, shape.experts)
    touched = np.unique(route(weights["router"], x, bias, shape.k)[0]).size
    return _call(_training_step(contender, shape.k), weights, x, bias, steps), touched


def _call(
    step: Callable[..., Any], weights: Any, x: jax.Array, bias: jax.Array | None, steps: int
) -> Callable[[], None]:
    """A call that takes `steps` steps, each given the outputs of the one before to write over, and waits."""
    cotangent = jax.random.normal(jax.random.key(2), x.shape, x.dtype)
    outputs = jax.tree.map(jnp.zeros_like, (x, (weights, x)))

    def call() -> None:
        nonlocal outputs
        for _ in range(steps):
            outputs = step(weights, x, bias, cotangent, outputs)
        jax.block_until_ready(outputs)

    return call


@functools.cache
def _training_step(contender: str, k: int) -> Callable[..., Any]:
    """Forward and backward of `contender`: outputs, and the gradients of weights and tokens."""
    mlp = EINSUMS.get(contender) or functools.partial(moe_mlp, backend=contender)

    def layer(weights, x, bias):
        if contender == "dense":
            gated, up = jnp.split(x @ weights["gate_up"], 2, axis=1)
            return (jax.nn.silu(gated) * up) @ weights["down"]
        expert_index, gate = route(weights["router"], x, bias, k)
        return mlp(x, expert_index, gate, weights["gate_up"], weights["down"])

    # The output is returned too: unused, its products would not be computed.
    @functools.partial(jax.jit, donate_argnums=4, keep_unused=True)
    def step(weights, x, bias, cotangent, previous):
        y, pull_back = jax.vjp(lambda weights, x: layer(weights, x, bias), weights, x)
        return y, pull_back(cotangent)

    return step


def _weights(shape: Shape, dtype: Any) -> dict[str, jax.Array]:
    """A fresh layer's weights, the router in float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    e, d, f = shape.experts, shape.width, shape.hidden
    sizes = {"router": (d, e), "gate_up": (e, d, 2 * f), "down": (e, f, d)}
    dtypes = {"router": jnp.float32, "gate_up": dtype, "down": dtype}
    return {name: 0.02 * jax.random.normal(key, sizes[name], dtypes[name]) for name, key in zip(sizes, keys)}


def _stream_call(array_bytes: int) -> Callable[[], None]:
    """A call that reads two arrays of that size and writes a third."""

    @functools.partial(jax.jit, donate_argnums=2, keep_unused=True)
    def stream(a, b, previous):
        return a + 2 * b

    a, b, output = (jnp.full(array_bytes // 4, value, jnp.float32) for value in (1, 2, 3))

    def call() -> None:
        nonlocal output
        output = jax.block_until_ready(stream(a, b, output))

    return call


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def describe(result: dict[str, Any]) -> str:
    """The result as text for people."""
    lines = ["  ".join(f"{key}: {value}" for key, value in result["machine"].items())]
    if "device" in result:
        return "\n".join([*lines, *_described_device(result["device"])])
    shape, measured = None, measured_backends()
    for row in result["rows"]:
        n = row["T"] * row["K"]
        title = (
            f"N={n} K={row['K']} T={row['T']} D={row['D']} F={row['F']} float32, forward and backward; "
            f"dense MLP {row['dense_milliseconds']:.0f} ms"
        )
        if title != shape:
            shape = title
            lines += ["", title]
            lines += [f"  {'E':<4} {'routing':<9} {'contender':<25} {'ms':>9} {'of dense':>9} {'of roof':>8}"]
        aim = TARGETS.get(n, {}).get(row["E"])
        asked = row["routing"] == "balanced" and row["contender"] in measured and (row["D"], row["F"]) == (256, 512)
        lines.append(
            f"  {row['E']:<4} {row['routing']:<9} {row['contender']:<25} {row['milliseconds']:>9.1f} "
            f"{row['ratio_to_dense']:>9.2f} {row['ratio_to_roofline']:>8.2f}"
            + (f"   target {aim:.1f} of dense" if aim and asked else "")
        )
    lines += ["", "training step against transformers (D=256, 4 layers, F=512, K=2, 8 x 512 tokens, float32, AdamW)"]
    for row in result["train_step"]:
        ratio = row["speed_ratio_to_transformers"]
        lines.append(
            f"  E={row['E']:<4} {row['contender']:<17} {row['tokens_per_second']:>8,} tokens/s"
            + ("" if ratio is None else f"   {ratio:.2f} x transformers")
        )
    lines += ["", "linear in tokens"]
    for row in result["linear_in_tokens"]:
        lines.append(
            f"  T={row['T']:<6} E={row['E']} K={row['K']} {row['contender']:<10} {row['milliseconds']:>9.1f} ms   "
            f"{1000 * row['milliseconds_per_token']:.1f} us a token   {row['ratio_to_middle']:.2f} of the middle"
        )
    return "\n".join(lines)


def _described_device(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", "one layer in bfloat16, forward and backward, balanced routing"]
    for row in rows:
        name = f"  T={row['T']} D={row['D']} F={row['F']} E={row['E']} K={row['K']} {row['contender']}"
        if row["milliseconds"] is None:
            lines.append(f"{name:<58} {row['note']}")
            continue
        share = "utilization unknown" if row["utilization"] is None else f"{100 * row['utilization']:.1f} % of peak"
        lines.append(
            f"{name:<58} {row['milliseconds']:>9.2f} ms   {row['model_teraflops_per_second']:>7.1f} TFLOP/s   "
            f"{share}   {row['ratio_to_dense']:.2f} of dense"
        )
    notes = {row["note"] for row in rows if row["note"] and row["milliseconds"] is not None}
    return [*lines, *(f"  note: {note}" for note in sorted(notes))]
