"""A fit check in words."""

from __future__ import annotations

from jaxmoe.scaling.fit import Fit
from jaxmoe.scaling.topologies import CHIPS, GIB

_STEPS = {
    ("train", False): "train step",
    ("train", True): "updates of a GRPO step (without sampling and scoring)",
    ("decode", False): "decode step",
    ("decode", True): "decode step of GRPO's rollout",
}


def describe_fit(fit: Fit, *, brief: bool = False) -> str:
    """The result for people; `brief` is one line."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in fit.mesh.shape.items() if size > 1) or "one device"
    verdict = f"fits, {_gib(fit.headroom)} to spare" if fit.fits else f"does not fit, {_gib(-fit.headroom)} too much"
    how = f"mesh {mesh}; remat {fit.remat}; gradient_accumulation {fit.gradient_accumulation}"
    if brief:
        estimate = fit.estimate
        seconds = "" if estimate is None else f"; at least {estimate.seconds:.3g} s a step ({estimate.bound})"
        return f"{how}: {verdict}{seconds}"
    where = f"{fit.mesh.slices} slices of {fit.topology}" if fit.mesh.slices > 1 else fit.topology
    lines = [
        f"{fit.member}, {_STEPS[fit.what, fit.grpo]} on {where} ({fit.devices} devices): {verdict}",
        how,
        f"memory of a device: {_gib(fit.peak)} of {_gib(fit.limit)}" + _parts(fit),
    ]
    if fit.operations is not None and fit.estimate is not None:
        kernels = (fit.operations.kernels + fit.operations.experts) / fit.operations.total
        full = f"; {fit.operations.total / fit.model_flops:.2f} times with full receive buffers" if fit.room > 1 else ""
        unknown = f", {fit.operations.unknown_loops} loops counted once" if fit.operations.unknown_loops else ""
        if fit.operations.unknown_kernels:
            unknown += f"; {fit.operations.unknown_kernels} kernels without an estimate, not counted"
        lines.append(
            f"operations: {fit.balanced_operations:.4g} executed, {fit.model_flops:.4g} of the model "
            f"({fit.balanced_operations / fit.model_flops:.2f} times{full}; {kernels:.0%} in Pallas kernels{unknown})"
        )
        parts = "slices" if CHIPS[fit.topology.partition(":")[0]].platform == "tpu" else "nodes"
        for exchange in fit.exchanges:
            between = f", {_gib(exchange.between_slices)} of it between {parts}" if exchange.between_slices else ""
            lines.append(f"exchange: {exchange.kind} x {exchange.count}, {_gib(exchange.bytes)} a device{between}")
        estimate = fit.estimate.summary(fit)
        lines.append(
            f"estimate at peak rates (no measurement): {fit.estimate.seconds:.3g} s a step, bound by "
            f"{fit.estimate.bound} (compute {fit.estimate.compute:.3g}, memory {fit.estimate.memory:.3g}, exchange "
            f"{fit.estimate.exchange:.3g} s); {estimate['tokens_per_second']:,.0f} tokens/s, MFU {estimate['mfu']:.0%}"
        )
    lines.append(f"compiled in {fit.compile_seconds:.0f} s")
    return "\n".join(lines)


def _parts(fit: Fit) -> str:
    held = f", held beside the program {_gib(fit.held)}" if fit.held else ""
    if fit.arguments is None or fit.temporaries is None:
        return f" (refused by the compiler{held})"
    return f" (arguments {_gib(fit.arguments)}, temporaries {_gib(fit.temporaries)}{held})"


def _gib(count: int) -> str:
    return f"{count / GIB:.3g} GiB" if count >= 1 << 20 else f"{count / 1024:.4g} KiB"
