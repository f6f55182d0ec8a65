"""The MoE layer's training step beside a dense MLP of the same active FLOPs, and against its roofline.

What a step is and who contends: `moe_layer`. What is measured: on a CPU `moe_rows`, with `--device` `moe_device`.
"""

from __future__ import annotations

from typing import Any

import jax

from experiments.benchmarks.moe_device import DEVICE_SHAPES, described, device_rows
from experiments.benchmarks.moe_layer import measured_backends
from experiments.benchmarks.moe_rows import Sizes, layer_rows, linear_in_tokens, training_steps
from experiments.benchmarks.timing import machine
from jaxmoe.config import ConfigError
from jaxmoe.training import reuse_freed_memory
from pallas_kernels import BACKENDS

TARGETS = {4096: {8: 1.5, 32: 2.0, 128: 3.0, 256: 4.5}, 16384: {8: 1.5, 32: 1.8, 128: 2.2, 256: 2.8}}
"""Aims for ratio_to_dense by N and E, of the backend of the CPU under balanced routing at D=256, F=512."""


def run(*, rounds: int, device: bool = False, sizes: Sizes | None = None) -> dict[str, Any]:
    """Everything, as plain JSON values; `rows` are those of backends, `one_hot_rows` those of the one-hot layers.

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
    of_backends = [row for row in rows if row["contender"] in BACKENDS]
    others = [row for row in rows if row["contender"] not in BACKENDS]
    return {
        "machine": machine(),
        "rows": of_backends,
        "one_hot_rows": others,
        "train_step": steps,
        "linear_in_tokens": linear,
    }


def describe(result: dict[str, Any]) -> str:
    """The result as text for people."""
    lines = ["  ".join(f"{key}: {value}" for key, value in result["machine"].items())]
    if "device" in result:
        return "\n".join([*lines, *described(result["device"])])
    shape, measured = None, measured_backends()
    for row in sorted(result["rows"] + result["one_hot_rows"], key=lambda row: (row["K"], row["T"])):
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
            f"{1000 * row['milliseconds_per_token']:.1f} us a token   {row['ratio_to_middle']:.2f} of the middle   "
            f"(weights alone {row['weight_traffic_milliseconds']:.1f} ms)"
        )
    return "\n".join(lines)
