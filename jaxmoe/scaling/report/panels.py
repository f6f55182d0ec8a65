"""Panels over a compared variable: one line a source, or one line a series where the arms need several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxmoe.scaling.report import plots, style
from jaxmoe.scaling.report.comparison import Comparison, split_name, x_label

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
      title: bold, above it.
      metric: what `rows.value` is; decides the vertical axis.
      rows: a row per (member, source, split), with the horizontal column and `series`.
      subtitle: small, under the title; may be empty.
      difference: the values are differences, so zero is marked and nothing is hollow.
    """

    title: str
    metric: str
    rows: pd.DataFrame
    subtitle: str = ""
    difference: bool = False


def columns_for(panels: int) -> int:
    """Panels in a row on a wide page: four stand two by two."""
    return 2 if panels in (2, 4) else 3


def split_key(rows: pd.DataFrame) -> str:
    """`solid: test · dashed: train`, empty for a single split."""
    splits = rows.drop_duplicates("rank").sort_values("rank")
    manners = ("solid", "dashed", "dotted")
    names = [split_name(split).removeprefix("train, ") for split in splits.split]
    named = [f"{manners[rank]}: {name}" for name, rank in zip(names, splits["rank"])]
    return " · ".join(named) if len(named) > 1 else ""


def draw_panels(
    kinds: Mapping[str, str], comparison: Comparison, panels: Sequence[Panel], x: str, columns: int
) -> Figure:
    """Draws the panels against column `x`, at most `columns` in a row.

    With a single line per source, colour is the source's and its name stands at the line's end; with several series,
    colour is the series' and a legend names them.
    """
    with style.figure_style():
        figure, grid = style.new_figure(len(panels), columns)
        level = " " if any(panel.subtitle for panel in panels) else ""  # keeps the titles of a row at one height
        for axes, panel in zip(grid, panels):
            plots.compared_axis(axes, x, panel.rows[x])
            plots.titles(axes, panel.title, panel.subtitle or level)
            plots.value_axis(axes, panel.metric, panel.rows.value, difference=panel.difference)
            if comparison.single:
                _draw_sources(axes, kinds, panel, x)
            else:
                _draw_series(axes, comparison, panel, x)
        if not comparison.single:
            plots.legend_row(figure, [(name, plots.dot(comparison.series_colours[name])) for name in comparison.series])
        return figure


def _draw_sources(axes: Axes, kinds: Mapping[str, str], panel: Panel, x: str) -> None:
    colours = style.source_colours(kinds)
    alone = panel.rows.source.nunique() == 1
    labels = []
    for (source, split, rank), rows in panel.rows.groupby(["source", "split", "rank"], sort=False):
        colour = colours[source] if source else style.INK
        end = plots.draw_line(axes, rows, x, colour, rank=rank)
        name = split_name(split).replace(", ", ",\n")
        labels.append((end, name if alone else source, colour))
    plots.label_lines(axes, labels if len(labels) > 1 else [])


def _draw_series(axes: Axes, comparison: Comparison, panel: Panel, x: str) -> None:
    for (_, rank), rows in panel.rows.groupby(["source", "rank"], sort=False):
        for name in reversed(comparison.series):  # the first on top, a reference line at the bottom
            own = rows[rows.series == name]
            if not own.empty:
                plots.draw_line(axes, own, x, comparison.series_colours[name], rank=rank)


def alternative_text(panels: Sequence[Panel], x: str) -> str:
    """The panels in words: each line's value at both ends."""
    sentences = []
    for panel in panels:
        for (source, split, series), rows in panel.rows.groupby(["source", "split", "series"], sort=False):
            table = plots.over_seeds(rows, x)
            first, last = table.iloc[0], table.iloc[-1]
            name = ", ".join(filter(None, [panel.title, "" if source in panel.title else source,
                                           split_name(split) if source else "", series]))
            start = f"{style.short(first['mean'])} at {style.short(first.x)}"
            end = f"{style.short(last['mean'])} at {style.short(last.x)}"
            sentences.append(f"{name}: {start}" if len(table) == 1 else f"{name}: from {start} to {end}")
    return f"Line charts against {x_label(x)}. {'. '.join(sentences)}."
