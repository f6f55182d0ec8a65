"""What the benchmark `moe` measures on a CPU: layers, their cost against tokens, whole training steps.

All contenders of one shape take turns in one process; medians of wall seconds are quoted. The roofline is the larger of
the dense MLP's time and the time to read every touched weight twice and write its gradient once; touched are the
experts, not the router, that have at least one row. Its bandwidth is that of `a + 2 b` on arrays of
`Sizes.stream_bytes` into a donated third, which takes its turns among the contenders.

Letters as in `moe_layer`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp

from experiments.benchmarks import train_step
from experiments.benchmarks.moe_layer import (
    EINSUMS,
    ROUTINGS,
    Shape,
    dense_call,
    measured_backends,
    moe_call,
    say,
    stream_call,
    weights_of,
)
from experiments.benchmarks.timing import Timing, interleaved


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
    say(f"N={shape.rows} K={shape.k}: dense, {', '.join(f'{c[2]} E={c[0].experts} {c[1]}' for c in contenders)}")
    calls = {"stream": stream_call(stream_bytes), "dense": dense_call(shape)}
    weights, touched = {}, {}
    for case in contenders:
        if case[0].experts not in weights:  # shared, so that large E fit beside each other
            weights[case[0].experts] = weights_of(case[0], jnp.float32)
        calls[case], touched[case] = moe_call(*case, weights[case[0].experts])
    timings = interleaved(calls, rounds=rounds)
    bytes_per_second = 3 * stream_bytes / timings["stream"].wall
    dense = timings["dense"].wall
    say(f"  dense {1000 * dense:.1f} ms, {bytes_per_second / 1e9:.1f} GB/s")
    return [_row(case, timings[case], dense, touched[case], bytes_per_second) for case in contenders]


def weight_traffic(shape: Shape, touched: int) -> int:
    """Bytes to read the float32 weights of so many experts twice and to write their gradients once."""
    return 3 * 4 * 3 * shape.width * shape.hidden * touched


def _row(
    case: tuple[Shape, str, str], timing: Timing, dense: float, touched: int, bytes_per_second: float
) -> dict[str, Any]:
    shape, routing, contender = case
    roofline = max(dense, weight_traffic(shape, touched) / bytes_per_second)
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
    """Milliseconds per token by T, relative to the middle T of the same E, and what moving the weights takes of them.

    `weight_traffic_milliseconds`: to read every touched weight twice and write its gradient once, at the bandwidth that
    is measured beside; the same for every T whose tokens touch all experts.
    """
    k, rows = sizes.choices[0], []
    for experts, backend in itertools.product(sizes.linear_experts, measured_backends()):
        shapes = [Shape(t, sizes.width, sizes.hidden, experts, k) for t in sizes.linear_tokens]
        say(f"T={', '.join(map(str, sizes.linear_tokens))}: {backend} E={experts} K={k}")
        weights = weights_of(shapes[0], jnp.float32)
        steps = {shape.tokens: moe_call(shape, "balanced", backend, weights) for shape in shapes}
        calls = {"stream": stream_call(sizes.stream_bytes), **{tokens: call for tokens, (call, _) in steps.items()}}
        timings = interleaved(calls, rounds=rounds)
        bytes_per_second = 3 * sizes.stream_bytes / timings["stream"].wall
        per_token = {tokens: timings[tokens].wall / tokens for tokens in steps}
        middle = per_token[sizes.linear_tokens[len(sizes.linear_tokens) // 2]]
        rows += [
            {
                "E": experts,
                "K": k,
                "T": shape.tokens,
                "contender": backend,
                "milliseconds": round(1000 * timings[shape.tokens].wall, 3),
                "milliseconds_per_token": round(1000 * per_token[shape.tokens], 6),
                "ratio_to_middle": round(per_token[shape.tokens] / middle, 3),
                "weight_traffic_milliseconds": round(
                    1000 * weight_traffic(shape, steps[shape.tokens][1]) / bytes_per_second, 3
                ),
            }
            for shape in shapes
        ]
    return rows


def training_steps(experts: tuple[int, ...], *, rounds: int) -> list[dict[str, Any]]:
    """Whole training steps, and those of transformers' Mixtral where it is installed, as in the benchmark `train_step`.

    Without it the ratio is None.
    """
    own = measured_backends()[0]
    if experts and not train_step.peer_is_installed():
        say("transformers is not measured: it is not installed here (pip install 'jaxmoe[hf]')")
    rows = []
    for num_experts, backend in itertools.product(experts, measured_backends()):
        say(f"training step E={num_experts}: {backend}")
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
