"""What the numbers say, in words that follow from the numbers alone.

A trend is called one only where it is larger than the spread between seeds and than twice the standard error over
examples; whether it holds at every step is counted over adjacent pairs of members, seed by seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxmoe.scaling.report import style
from jaxmoe.scaling.report.comparison import Comparison, split_name, x_label
from jaxmoe.scaling.report.figures import gaps, metric_rows
from jaxmoe.scaling.report.tables import StudyTables

if TYPE_CHECKING:
    import pandas as pd

_MOST_VALUES = 8
_WEAK = 0.5  # rank correlations below it are not called a relation


@dataclasses.dataclass(frozen=True)
class Trend:
    """How a quantity goes over the arms of a line, in order of x.

    Attributes:
      arms, means: the arms and their means over seeds.
      seeds, fewest_seeds: of the arm that has most, and of the one that has fewest.
      up, down, pairs: adjacent pairs of arms in which it rises, falls, and all of them, counted seed by seed.
      spearman: rank correlation of the means with x.
      spread, largest_spread: highest minus lowest seed, mean and largest over arms with several; NaN without any.
      error: standard error over examples of the difference between both ends; 0 where it is not known.
    """

    arms: tuple[str, ...]
    means: tuple[float, ...]
    seeds: int
    fewest_seeds: int
    up: int
    down: int
    pairs: int
    spearman: float
    spread: float
    largest_spread: float
    error: float

    @property
    def change(self) -> float:
        """Last mean minus first."""
        return self.means[-1] - self.means[0]

    @property
    def noise(self) -> float:
        """What a difference must exceed to mean something: the spread between seeds, two errors over examples."""
        return max(0.0 if math.isnan(self.spread) else self.spread, 2 * self.error)

    @property
    def range(self) -> float:
        """Largest mean minus smallest."""
        return max(self.means) - min(self.means)

    @property
    def monotone(self) -> bool:
        """Whether it goes one way in every adjacent pair of every seed."""
        return self.pairs > 0 and self.pairs in (self.up, self.down)

    def verdict(self, along: str = "") -> str:
        """`rises`, `falls`, either `overall, though not at every step`, `does not go one way`, or within the noise.

        Args:
          along: ` with total parameters`, put behind the verb.
        """
        way = "rises" if self.change > 0 else "falls"
        if self.range <= max(self.noise, 1e-9):
            return f"does not change beyond its noise{along}"
        if self.monotone:
            return f"{way}{along}"
        if abs(self.change) > max(self.noise, 0.5 * self.range):
            return f"{way}{along} overall, though not at every step"
        return f"does not go one way{along}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence about the numbers: who or what, what of it, and the evidence (may be empty)."""

    subject: str
    statement: str
    evidence: str = ""

    def __str__(self) -> str:
        evidence = f" ({self.evidence})" if self.evidence else ""
        return f"{self.subject} {self.statement}{evidence}."


def trend(rows: pd.DataFrame, x: str) -> Trend | None:
    """The trend of `value` over `x`; None with fewer than two arms.

    Args:
      rows: a row per member with `arm`, `seed`, `value`, `x` and perhaps `standard_error` (over examples).
      x: a column of `rows`.
    """
    places = rows.groupby("arm", sort=False)[x].mean().sort_values(kind="stable")
    if len(places) < 2:
        return None
    arms = tuple(places.index)
    table = rows.pivot_table(index="arm", columns="seed", values="value").loc[list(arms)]
    means = table.mean(axis=1)
    steps = [after - before for seed in table.columns for before, after in zip(table[seed], table[seed][1:])]
    steps = [step for step in steps if not math.isnan(step)]
    spreads = (table.max(axis=1) - table.min(axis=1))[table.notna().sum(axis=1) > 1]
    return Trend(
        arms=arms,
        means=tuple(map(float, means)),
        seeds=int(table.notna().sum(axis=1).max()),
        fewest_seeds=int(table.notna().sum(axis=1).min()),
        up=sum(step > 0 for step in steps),
        down=sum(step < 0 for step in steps),
        pairs=len(steps),
        spearman=_spearman(list(places), list(means)),
        spread=float(spreads.mean()) if len(spreads) else math.nan,
        largest_spread=float(spreads.max()) if len(spreads) else math.nan,
        error=_end_error(rows, arms),
    )


def _end_error(rows: pd.DataFrame, arms: tuple[str, ...]) -> float:
    if "standard_error" not in rows:
        return 0.0
    total = 0.0
    for arm in (arms[0], arms[-1]):
        errors = rows.loc[rows.arm == arm, "standard_error"].dropna()
        total += float((errors**2).sum()) / max(1, len(errors)) ** 2
    return math.sqrt(total)


def _spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; NaN if either side is constant."""
    import pandas as pd

    ranks = pd.DataFrame({"first": first, "second": second}).rank()
    return float(ranks["first"].corr(ranks["second"])) if (ranks.nunique() > 1).all() else math.nan


def describe(name: str, found: Trend, x: str) -> Finding:
    """A trend in words.

    Example: `Knowledge accuracy (train) rises with total parameters: 0.099 → 0.206 → 0.649 (3 members, 1 seed; up in
    2 of 2 adjacent pairs).`
    """
    return Finding(name, f"{found.verdict(f' with {x_label(x)}')}: {_sequence(found.means)}", _evidence(found))


def _evidence(found: Trend) -> str:
    seeds = f"{found.seeds}" if found.seeds == found.fewest_seeds else f"{found.fewest_seeds} to {found.seeds}"
    parts = [f"{len(found.arms)} members, {seeds} seed{'s' if found.seeds > 1 else ''}"]
    if found.monotone:
        parts.append(f"{'up' if found.up else 'down'} in {found.pairs} of {found.pairs} adjacent pairs")
    else:
        parts.append(f"up in {found.up} and down in {found.down} of {found.pairs} adjacent pairs")
    if found.seeds > 1:
        spread, largest = style.fixed(found.spread), style.fixed(found.largest_spread)
        parts.append(f"seeds differ by {spread}" + (f" on average, {largest} at most" if spread != largest else ""))
    if found.error > 0 and 2 * found.error >= found.range:
        parts.append(f"two standard errors over examples: {style.fixed(2 * found.error)}")
    return "; ".join(parts)


def _sequence(values: tuple[float, ...]) -> str:
    shown = [style.fixed(value) for value in values]
    if len(shown) > _MOST_VALUES:
        shown = [*shown[:3], "…", *shown[-3:]]
    return " → ".join(shown)


def slice_findings(tables: StudyTables, comparison: Comparison) -> list[Finding]:
    """What one slice shows: every quantity's trend and, for the headline, what goes together with reasoning."""
    x = comparison.part.x
    found = []
    for name, rows in _quantities(tables, comparison.rows).items():
        trends = {series: trend(rows[rows.series == series], x) for series in comparison.series}
        own = {series: one for series, one in trends.items() if one is not None and series != comparison.reference}
        reference = trends.get(comparison.reference)
        if not own:
            continue
        if len(own) > 1:
            lines = "; ".join(f"{series}: {one.verdict()}, {_sequence(one.means)}" for series, one in own.items())
            seeds = max(one.seeds for one in own.values())
            count = f"{seeds} seeds at most" if seeds > 1 else "1 seed"
            found.append(Finding(name, f"against {x_label(x)} – {lines}", count))
            continue
        one = describe(name, next(iter(own.values())), x)
        if reference is not None:
            beside = f"“{comparison.reference}” {reference.verdict()}: {_sequence(reference.means)}"
            one = dataclasses.replace(one, evidence=f"{one.evidence}. By comparison {beside}")
        found.append(one)
    if comparison.part == tables.slices[0] and comparison.single:
        found += [*_best(tables, comparison), *_together(tables, comparison)]
    return found


def _quantities(tables: StudyTables, rows: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """Named quantities with a row per member: training loss; each source's accuracy, loss and generalization gap."""
    shown = metric_rows(rows)
    quantities = {"Training loss": shown[shown.metric == "training_loss"]}
    gap = gaps(rows)
    names = {"accuracy": "accuracy", "task_loss": "task loss", "validation_loss": "validation loss"}
    for source in tables.kinds:
        for metric, name in names.items():
            own = shown[(shown.source == source) & (shown.metric == metric) & (shown["rank"] == 0)]
            if not own.empty and (tables.kinds[source] != "knowledge" or metric == "accuracy"):
                quantities[f"{_title(source)} {name} ({split_name(own.split.iloc[0])})"] = own
        own = gap[(gap.source == source) & gap.metric.isin(["task_loss", "validation_loss"]) & (gap["rank"] == 0)]
        if not own.empty and tables.kinds[source] != "knowledge":
            against = split_name(own.split.iloc[0])
            metric = names[own.metric.iloc[0]]
            quantities[f"{_title(source)} generalization gap ({metric}, test − {against})"] = own
    return {name: own for name, own in quantities.items() if not own.empty}


def _best(tables: StudyTables, comparison: Comparison) -> list[Finding]:
    """Where accuracy on what is new is best: inside the family or at its edge."""
    rows = comparison.rows
    sentences = []
    for source, kind in tables.kinds.items():
        own = rows[(rows.source == source) & (rows.metric == "accuracy") & (rows["rank"] == 0)]
        found = trend(own, comparison.part.x)
        if kind == "knowledge" or found is None or len(found.arms) < 3 or found.range <= found.noise:
            continue
        place = max(range(len(found.means)), key=lambda index: found.means[index])
        member = tables.members[tables.members.arm == found.arms[place]].iloc[0]
        size = f"{style.count(member.total_parameters)} parameters, TPP {member.tokens_per_parameter:.2g}"
        where = f"is highest at {found.arms[place]} ({size}), "
        if place in (0, len(found.means) - 1):
            statement = f"{where}an edge of the family: it shows no optimum inside"
            evidence = ""
        else:
            margin = style.fixed(found.means[place] - max(found.means[0], found.means[-1]))
            statement = f"{where}inside the family, by {margin} over the better edge"
            evidence = f"seeds differ by {style.fixed(found.spread)}" if found.seeds > 1 else "one seed: may be chance"
        sentences.append(Finding(f"{_title(source)} accuracy ({split_name(own.split.iloc[0])})", statement, evidence))
    return sentences


def _together(tables: StudyTables, comparison: Comparison) -> list[Finding]:
    """Rank correlations over members: accuracy on what is new with training loss, and with task loss."""
    rows = comparison.rows
    training = rows[(rows.metric == "training_loss") & (rows.source == "")].set_index("member").value
    sentences = []
    for source, kind in tables.kinds.items():
        own = rows[(rows.source == source) & (rows["rank"] == 0)].set_index("member")
        accuracy = own[own.metric == "accuracy"].value
        if kind == "knowledge" or len(accuracy) < 4:
            continue
        for name, loss in (("training loss", training), ("task loss", own[own.metric == "task_loss"].value)):
            both = accuracy.index.intersection(loss.index)
            value = _spearman(list(loss[both]), list(accuracy[both])) if len(both) > 3 else math.nan
            if math.isnan(value):
                continue
            goes = "lower" if value > 0 else "higher"
            statement = f"tend to have a {goes} {source} accuracy ({split_name(own.split.iloc[0])})"
            if abs(value) < _WEAK:
                statement = f"have neither clearly lower nor higher {source} accuracy ({split_name(own.split.iloc[0])})"
            evidence = f"Spearman {style.fixed(value, 2)} over {len(both)} runs"
            sentences.append(Finding(f"Members with a lower {name}", statement, evidence))
    return sentences


def study_checks(tables: StudyTables) -> list[Finding]:
    """Sentences about what was held fixed, and about what might make the numbers wrong."""
    members = tables.members
    sentences = []
    headline = members[members.arm.isin(tables.slices[0].arms)]
    for name, tolerance in tables.held_fixed.items():
        if name not in headline or headline[name].isna().any():
            continue
        low, high = headline[name].min(), headline[name].max()
        what = f"{style.words(name).capitalize()}"
        if low == high:
            sentences.append(Finding(what, f"are {low:,.0f} for every member of the headline"))
        else:
            apart = f"{100 * (high - low) / low:.1f} % apart, {100 * tolerance:g} % allowed"
            sentences.append(Finding(what, f"are held at {low:,.0f} to {high:,.0f}", apart))
    dropped = members.evaluation_dropped_fraction.dropna()
    if len(dropped):
        worst = float(dropped.max())
        sentences.append(Finding("Evaluation", "dropped no expert assignment" if worst == 0 else
                                 f"dropped up to {worst:.2%} of the expert assignments"))  # fmt: skip
    trained = members.dropped_fraction.dropna()
    if len(trained) and trained.max() > 0:
        worst = members.loc[trained.idxmax()]
        sentences.append(Finding("Training", f"dropped up to {worst.dropped_fraction:.2%} of the expert assignments",
                                 worst.member))  # fmt: skip
    for column, subject, statement in (
        ("skipped_steps", "Some steps", "were skipped because a number was not finite"),
        ("dead_experts", "Some experts", "received nothing at the end of training"),
    ):
        some = members[members[column].fillna(0) > 0]
        if len(some):
            counts = ", ".join(f"{member} {value:.0f}" for member, value in zip(some.member, some[column]))
            sentences.append(Finding(subject, statement, counts))
    return sentences


def _title(source: str) -> str:
    return source[:1].upper() + source[1:]
