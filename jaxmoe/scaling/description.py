"""A study in tables for people: what `--dry_run` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxmoe.accounting import COMPONENTS, readable_bytes
from jaxmoe.scaling.quantities import quantity

if TYPE_CHECKING:
    from jaxmoe.scaling.study import Study

_COST = (
    "FLOPs of training, per token as 6 times the active parameters and with every matrix product counted, and of the "
    "run.\nBytes over all devices: parameters and moments in float32; activations, of one sequence, are an estimate."
)

_GRPO = (
    "GRPO, per rollout step (tokens at most). Tokens and FLOPs above are of the updates; sampling and the\n"
    "log-probabilities of the old policy and of the reference come on top."
)


def describe(study: Study) -> str:
    """What is held fixed and what varies; then members in numbers, their cost, and their parameters by component."""
    lines = [study.title, ""]
    for name, tolerance in study.held_fixed.items():
        values = {quantity(name, member.config) for member in study.members}
        span = _number(min(values)) if len(values) == 1 else f"{_number(min(values))} to {_number(max(values))}"
        within = "exactly" if tolerance == 0 else f"within {100 * tolerance:g} %"
        lines.append(f"held fixed: {name} ({within}): {span}")
    for name in study.varies:
        values = [quantity(name, member.config) for member in study.members_of(study.headline)]
        lines.append(f"varies:     {name}: {', '.join(map(_number, dict.fromkeys(values)))}")
    summaries = [member.summary() for member in study.members]
    tables = (
        ("", _members(summaries), 2),
        (_COST, _cost(summaries), 1),
        ("Parameters by component (of the experts, one token uses K of E).", _components(summaries), 1),
    )
    if any("grpo" in numbers for numbers in summaries):
        tables = (*tables, (_GRPO, _rollouts(summaries), 2))
    for title, rows, left in tables:
        lines += ["", *([title] if title else []), *_aligned(rows, left)]
    return "\n".join(lines)


def _members(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    header = (
        "member", "slices", "E", "K", "total", "active", "sparsity", "tokens", "steps", "tokens/param",
        "learning rate", "init std", "seed",
    )  # fmt: skip
    return [header] + [
        (
            numbers["name"], "+".join(numbers["slices"]), str(numbers["num_experts"]),
            str(numbers["experts_per_token"]), _number(numbers["total_parameters"]),
            _number(numbers["active_parameters"]), f"{numbers['sparsity']:.3f}", _number(numbers["tokens"]),
            _number(numbers["steps"]), f"{numbers['tokens_per_parameter']:.1f}", f"{numbers['learning_rate']:g}",
            f"{numbers['init_std']:g}", str(numbers["seed"]),
        )
        for numbers in summaries
    ]  # fmt: skip


def _rollouts(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    header = (
        "member", "starts from", "prompts", "of each", "responses", "updates", "responses/update", "prompt tokens",
        "response tokens", "reward",
    )  # fmt: skip
    counted = (
        "prompts_per_step", "group_size", "responses_per_step", "updates_per_step", "responses_per_update",
        "max_prompt_tokens", "max_response_tokens",
    )  # fmt: skip
    return [header] + [
        (
            numbers["name"], numbers["start_from"], *(_number(numbers["grpo"][name]) for name in counted),
            numbers["grpo"]["reward"],
        )
        for numbers in summaries
        if "grpo" in numbers
    ]  # fmt: skip


def _cost(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    header = ("member", "6·N_active", "exact", "whole run", "parameters", "moments", "activations")
    return [header] + [
        (
            numbers["name"], f"{numbers['flops_per_token']:.4g}",
            f"{numbers['matmul_flops_per_token']:.4g}", f"{numbers['training_flops']:.3g}",
            readable_bytes(numbers["weights_bytes"]), readable_bytes(numbers["optimizer_bytes"]),
            readable_bytes(numbers["activation_bytes_per_sequence"]),
        )
        for numbers in summaries
    ]  # fmt: skip


def _components(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    shown = [name for name in COMPONENTS if any(numbers["components"].get(name) for numbers in summaries)]
    header = ("member", *(name.replace("_", " ") for name in shown), "active experts")
    return [header] + [
        (
            numbers["name"], *(_number(numbers["components"].get(name, 0)) for name in shown),
            _number(numbers["active_components"]["experts"]),
        )
        for numbers in summaries
    ]  # fmt: skip


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows as lines with columns of equal width, the first `left` flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
