"""`python -m experiments.benchmark moe --device`: a layer in bfloat16 against the peak of a TPU or GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.moe_layer import Shape, dense_call, moe_call, say, weights_of
from experiments.benchmarks.timing import interleaved
from pallas_kernels import resolved_backend

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

DEVICE_SHAPES = (
    Shape(16384, 1024, 2048, 8, 2),
    Shape(16384, 1024, 2048, 64, 2),
    Shape(16384, 2048, 4096, 8, 2),
    Shape(16384, 2048, 4096, 64, 2),
    Shape(16384, 2048, 512, 256, 8),
)
"""Layers of studies on accelerators: F = 2D, and fine-grained experts."""


def device_rows(shapes: tuple[Shape, ...], *, rounds: int, steps_per_call: int = 10) -> list[dict[str, Any]]:
    """Layer and dense MLP in bfloat16 with the platform's own backend, against the peak of the device.

    A layer that does not run, for want of memory or of an implementation, is a row with a note and no figures.
    """
    kind, backend, rows = jax.devices()[0].device_kind, resolved_backend(), []
    peak = PEAK_TERAFLOPS.get(kind)
    unknown = None if peak else f"no bfloat16 peak is known for {kind!r}, so there is no utilization"
    for shape in shapes:
        say(f"{shape}: dense, {backend}")
        flops = {"dense": 3 * 2 * shape.rows * 3 * shape.width * shape.hidden, backend: shape.training_flops}
        size = {"E": shape.experts, "K": shape.k, "T": shape.tokens, "D": shape.width, "F": shape.hidden}
        weights = weights_of(shape, jnp.bfloat16)
        try:
            calls = {
                "dense": dense_call(shape, jnp.bfloat16, steps_per_call),
                backend: moe_call(shape, "balanced", backend, weights, steps_per_call)[0],
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


def described(rows: list[dict[str, Any]]) -> list[str]:
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
