"""What a slice compares: its x axis, the lines drawn over it, and the captions that say how many seeds there are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

from jaxmoe.scaling.report import style
from jaxmoe.scaling.report.tables import SETTINGS, StudySlice, StudyTables

if TYPE_CHECKING:
    import pandas as pd

_SAME_SIZE = 0.10
"""Members whose total parameters differ by less than this share are one line of a figure."""

X_LABELS = {
    "total_parameters": "total parameters",
    "active_parameters": "active parameters",
    "tokens_per_parameter": "tokens per parameter",
    "init_std": "standard deviation of the initialization",
    "corruption": "share of corrupted training solutions",
    "num_experts": "experts",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A slice's final numbers, ready to be drawn.

    Attributes:
      part: the slice.
      rows: `StudyTables.comparison` of it (and of the reference line), with the column `series`.
      series: labels of the lines in order; a single "" when the arms form one line.
      series_colours: by label.
      reference: label of the line that comes from the headline slice, None without one.
      seeds: arm -> seeds that finished.
    """

    part: StudySlice
    rows: pd.DataFrame
    series: tuple[str, ...]
    series_colours: dict[str, str]
    reference: str | None
    seeds: dict[str, tuple[int, ...]]

    @property
    def single(self) -> bool:
        """Whether the arms form one line, so that colour is free to tell sources apart."""
        return self.series == ("",)

    @property
    def arms(self) -> tuple[str, ...]:
        """The slice's own arms that have final numbers, in order of x."""
        return tuple(arm for arm in self.part.arms if arm in self.seeds)


def compare(tables: StudyTables, part: StudySlice) -> Comparison:
    """The comparison that `part` makes; a slice over total parameters gets the headline slice as a reference line."""
    import pandas as pd

    rows = tables.comparison(part).dropna(subset=[part.x])
    names = _series(tables, part)
    rows = rows.assign(series=[names[arm] for arm in rows.arm])
    labels = tuple(dict.fromkeys(names[arm] for arm in part.arms if arm in set(rows.arm)))
    seeds = {arm: tuple(sorted(set(group.seed))) for arm, group in rows.groupby("arm")}
    reference = None
    headline = tables.slices[0]
    if part != headline and labels == ("",) and part.x == headline.x == "total_parameters":
        own, reference = style.words(part.name), style.words(headline.name)
        rows = rows.assign(series=own)
        others = tables.comparison(headline)
        rows = pd.concat([rows, others[~others.arm.isin(part.arms)].assign(series=reference)], ignore_index=True)
        labels = (own, reference)
    rows = _without_repeated_split(rows)
    return Comparison(part, rows, labels or ("",), _series_colours(tables, names, labels, reference), reference, seeds)


def _without_repeated_split(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the corrected training split of sources whose training split needs no correction."""
    keep = rows.split != "train_clean"
    for _, own in rows[~keep].groupby("source"):
        same = rows[(rows.source == own.source.iloc[0]) & (rows.split == "train")]
        values = own.merge(same, on=["member", "metric"], suffixes=("", "_trained"))
        if not (values.value == values.value_trained).all():
            keep |= rows.index.isin(own.index)
    return rows[keep].reset_index(drop=True)


def _series(tables: StudyTables, part: StudySlice) -> dict[str, str]:
    """The line that each arm is on: one line if no two arms share an x, else the setting that tells them apart."""
    members = tables.members[tables.members.arm.isin(part.arms)].drop_duplicates("arm").set_index("arm")
    x = _clusters(members[part.x]) if part.x == "total_parameters" else dict(members[part.x])
    if len(set(x.values())) == len(x):
        return dict.fromkeys(part.arms, "")
    for candidate in ("total_parameters", *SETTINGS):
        if candidate == part.x or members[candidate].isna().any():
            continue
        if candidate == "total_parameters":
            groups = _clusters(members[candidate])
            label = {arm: f"{style.count(group)} parameters" for arm, group in groups.items()}
        else:
            label = {arm: f"{style.words(candidate)} {style.short(value)}"
                     for arm, value in sorted(members[candidate].items(), key=lambda item: item[1])}
        places = {(x[arm], label[arm]) for arm in part.arms}
        if len(set(label.values())) > 1 and len(places) == len(part.arms):
            return label
    return {arm: arm for arm in part.arms}


def _clusters(values: pd.Series) -> dict[str, float]:
    """Each arm's size, with sizes that are nearly equal made equal (to the smallest of them)."""
    clusters: dict[str, float] = {}
    start = None
    for arm, value in values.sort_values().items():
        if start is None or value > start * (1 + _SAME_SIZE):
            start = value
        clusters[arm] = start
    return clusters


def _series_colours(
    tables: StudyTables, names: dict[str, str], labels: tuple[str, ...], reference: str | None
) -> dict[str, str]:
    if reference is not None:
        return {labels[0]: style.SERIES_COLOURS[2], reference: "#8a909a"}
    if labels and all(label.endswith(" parameters") for label in labels):
        sizes = tables.members.drop_duplicates("arm").set_index("arm").total_parameters
        first = [next(arm for arm, name in names.items() if name == label) for label in labels]
        return dict(zip(labels, style.sequential_colours([math.log(sizes[arm]) for arm in first])))
    return {label: style.SERIES_COLOURS[i % len(style.SERIES_COLOURS)] for i, label in enumerate(labels)}


def arm_colours(tables: StudyTables, arms: tuple[str, ...]) -> dict[str, str]:
    """A colour for every arm, dark violet to light green by total parameters; arms of equal size by their order."""
    sizes = tables.members.drop_duplicates("arm").set_index("arm").total_parameters
    ordered = sorted(arms, key=lambda arm: (sizes[arm], arms.index(arm)))
    crowded = any(sizes[after] < sizes[before] * 1.05 for before, after in itertools.pairwise(ordered))
    places = range(len(ordered)) if crowded else [math.log(sizes[arm]) for arm in ordered]
    return dict(zip(ordered, style.sequential_colours(list(places))))


def arm_label(tables: StudyTables, arm: str) -> str:
    """`E8 · 268k`: an arm and its total parameters."""
    size = tables.members.loc[tables.members.arm == arm, "total_parameters"].iloc[0]
    return f"{arm} · {style.count(size)}"


def split_name(split: str) -> str:
    """A split as a reader says it; `train_clean` has the training problems with correct solutions."""
    return {"train_clean": "train, corrected"}.get(split, split)


def x_label(name: str) -> str:
    """An axis label for a column."""
    return X_LABELS.get(name, style.words(name))


def seeds_caption(comparison: Comparison) -> str:
    """How many seeds there are and what is drawn of them."""
    counts = sorted({len(seeds) for seeds in comparison.seeds.values()})
    if not counts:
        return "No member has finished."
    if counts == [1]:
        return "One seed per member (n = 1), so no spread between seeds can be shown."
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Line: mean over n = {n} seeds; band: lowest to highest seed; small points: the seeds."


def status_caption(tables: StudyTables, part: StudySlice) -> str:
    """What is left out because it is not finished; empty if nothing is."""
    if tables.interim is not None:
        return f"No member is finished: everything is compared at step {tables.interim}."
    unfinished = list(tables.unfinished(part).member)
    return f"Not finished, so left out: {', '.join(unfinished)}." if unfinished else ""


def accuracy_caption(tables: StudyTables) -> str:
    """What accuracy counts for each kind of source at hand, and what guessing would give."""
    rows = tables.results[tables.results.metric == "accuracy"]
    sentences = []
    for source, own in rows.groupby("source", sort=False):
        kind = tables.kinds[source]
        counted = {
            "generation": "share of written answers whose result is right",
        }.get(own.kind.iloc[-1], "share of answers right in every token")
        if kind == "knowledge":
            counted = "share of attribute values recalled"
        elif kind == "reasoning":
            counted = "share of worked solutions right in every step"
        chance = own.chance.dropna()
        sentences.append(f"{source}, {counted}" + (f" (chance {style.short(chance.iloc[-1])})" if len(chance) else ""))
    return f"Accuracy: {'; '.join(sentences)}." if sentences else ""


def extrapolation_caption(rows: pd.DataFrame) -> str:
    """Which sources' examples are longer than the rows of training, so that extrapolation is measured; else empty."""
    parts = []
    for (source, split), own in rows[rows.beyond.fillna(0) > 0].groupby(["source", "split"], sort=False):
        worst = own.loc[own.beyond.idxmax()]
        parts.append(f"{worst.beyond:.0f} of {worst.examples:.0f} of {source} ({split_name(split)})")
    return f"Longer than the rows of training, so extrapolated: {', '.join(parts)} examples." if parts else ""
