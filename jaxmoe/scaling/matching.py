"""Whether the members of a study can be compared: what is held fixed is equal, what varies does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxmoe.config import ConfigError
from jaxmoe.scaling.quantities import quantity

if TYPE_CHECKING:
    from jaxmoe.scaling.study import Member, Study

SAME_IN_A_SLICE = (
    "model.vocab_size",
    "data.tokenizer",
    "train.sequence_length",
    "evaluation.examples",
    "evaluation.validation_rows",
)
"""Losses per token and scores mean the same only if these are equal, so they are, unless `varies` names them."""


def check_study(study: Study) -> None:
    """`Study.check`."""
    if not study.members:
        raise ConfigError(f"study {study.name!r} has no members.")
    _check_names(study)
    for slice_name in study.slices:
        members = study.members_of(slice_name)
        reference = min(members, key=lambda member: quantity("total_parameters", member.config))
        for member in members:
            _check_member(study, slice_name, member, reference)
    _check_varies(study)


def _check_names(study: Study) -> None:
    seen: dict[str, Member] = {}
    for member in study.members:
        other = seen.setdefault(member.name.casefold(), member)
        if other is not member:
            raise ConfigError(
                f"members {other.name!r} (arm {other.arm!r}, seed {other.seed}) and {member.name!r} (arm "
                f"{member.arm!r}, seed {member.seed}) would share a folder; rename one."
            )


def _check_member(study: Study, slice_name: str, member: Member, reference: Member) -> None:
    for name, tolerance in study.held_fixed.items():
        value, expected = (_numeric(name, one) for one in (member, reference))
        difference = relative_difference(value, expected)
        if difference > tolerance:
            allowed = "it must be equal" if tolerance == 0 else f"the tolerance is {100 * tolerance:g} %"
            raise ConfigError(
                f"slice {slice_name!r} holds {name} fixed, but member {member.name!r} has {_show(value)} and the "
                f"slice's smallest member {reference.name!r} has {_show(expected)}: {100 * difference:.3g} % apart, "
                f"{allowed}."
            )
    for name in SAME_IN_A_SLICE:
        value, expected = quantity(name, member.config), quantity(name, reference.config)
        if value != expected and name not in study.varies:
            raise ConfigError(
                f"member {member.name!r} has {name}={value!r} and {reference.name!r} of the same slice "
                f"{slice_name!r} has {expected!r}; their losses cannot be compared. Make them equal, put them into "
                f"different slices, or name {name} in study.varies."
            )
    unlike = sorted(set(member.config.data.sources) ^ set(reference.config.data.sources))
    if unlike:
        raise ConfigError(
            f"members {member.name!r} and {reference.name!r} of slice {slice_name!r} do not have the same sources: "
            f"only one of them has {', '.join(unlike)}. Give a source that is not trained on weight 0."
        )


def _check_varies(study: Study) -> None:
    members = study.members_of(study.headline)
    for name in study.varies:
        values = [quantity(name, member.config) for member in members]
        if len({member.arm for member in members}) > 1 and all(value == values[0] for value in values):
            raise ConfigError(
                f"study.varies names {name}, but it is {_show(values[0])} for every member of slice "
                f"{study.headline!r}: {', '.join(member.name for member in members)}."
            )


def relative_difference(value: float, reference: float) -> float:
    """|value - reference| / |reference|; 0 when both are 0."""
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else float("inf")


def _numeric(name: str, member: Member) -> float:
    value = quantity(name, member.config)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"study.held_fixed names {name}, which is {value!r}; only numbers can be held fixed.")
    return value


def _show(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value!r}"
