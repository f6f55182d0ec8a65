"""The figure of test-time compute: what several samples of an answer are worth, against their number and by member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxmoe.scaling.report import plots, style
from jaxmoe.scaling.report.comparison import Comparison, arm_colours, arm_label, seeds_caption, split_name, x_label
from jaxmoe.scaling.report.figures import ReportFigure
from jaxmoe.scaling.report.panels import columns_for
from jaxmoe.scaling.report.tables import StudyTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {"coverage": "pass@n", "majority": "majority of n"}


def sampling_figure(tables: StudyTables, comparison: Comparison, name: str) -> ReportFigure | None:
    """Coverage and majority vote over n, a line an arm, and the vote by member; None where no member was sampled."""
    part = comparison.part
    rows = tables.sampling[tables.sampling.arm.isin(part.arms)]
    if rows.empty:
        return None
    if part.x not in rows:
        rows = rows.merge(tables.members[["member", part.x]], on="member", how="left")
    arms = tuple(arm for arm in part.arms if arm in set(rows.arm))
    colours = arm_colours(tables, arms)
    problems = list(dict.fromkeys(zip(rows.source, rows.split)))
    by_member = rows[part.x].nunique() > 1
    count = len(problems) * (2 + by_member)

    def draw(columns: int) -> Figure:
        with style.figure_style():
            figure, grid = style.new_figure(count, columns)
            panels = iter(grid)
            for source, split in problems:
                own = rows[(rows.source == source) & (rows.split == split)]
                for measure, title in _TITLES.items():
                    axes = next(panels)
                    plots.titles(axes, f"{source}: {title}", f"{split_name(split)} split")
                    _draw_curves(axes, own[own.measure == measure], own.value, colours)
                if by_member:
                    _draw_by_member(next(panels), own[own.measure == "majority"].dropna(subset=[part.x]), part.x,
                                    f"{source}: {_TITLES['majority']}", own.value)  # fmt: skip
            plots.legend_row(figure, [(arm_label(tables, arm), plots.dot(colour)) for arm, colour in colours.items()])
            return figure

    columns = ["source", "split", "measure", "arm", "seed", "member", part.x, "step", "problems", "temperature", "n",
               "tokens", "value", "standard_error"]  # fmt: skip
    return ReportFigure(
        name=name,
        title="Test-time compute",
        caption=_caption(rows, comparison, by_member),
        alt=_alternative_text(rows),
        data=rows[list(dict.fromkeys(columns))],
        draw=draw,
        columns=columns_for(count),
    )


def _draw_curves(axes: Axes, rows: pd.DataFrame, values: Sequence[float], colours: dict[str, str]) -> None:
    """Over the number of samples."""
    plots.logarithmic_axis(axes, rows.n, style.short)
    axes.set_xlabel("samples of a problem, n")
    plots.value_axis(axes, "accuracy", values)
    for arm, own in rows.groupby("arm", sort=False):
        over = own.groupby("n").value.agg(["mean", "min", "max", "size"]).reset_index()
        if (over["size"] > 1).any():
            axes.fill_between(over.n, over["min"], over["max"], color=colours[arm], alpha=0.16, linewidth=0)
        axes.plot(over.n, over["mean"], color=colours[arm], **plots.RANK_STYLES[0](colours[arm]))


def _draw_by_member(axes: Axes, rows: pd.DataFrame, x: str, title: str, values: Sequence[float]) -> None:
    """One sample, and the vote of the most that all members have, over what the slice compares."""
    most = rows.groupby("member").n.max().min()
    plots.compared_axis(axes, x, rows[x])
    plots.titles(axes, title, f"solid: n = {most} · dashed: n = 1")
    plots.value_axis(axes, "accuracy", values)
    for n, rank in ((1, 1), (most, 0)):
        plots.draw_line(axes, rows[rows.n == n], x, style.INK, rank=rank)


def _caption(rows: pd.DataFrame, comparison: Comparison, by_member: bool) -> str:
    told = rows.drop_duplicates(["member", "source", "split"])
    temperatures = ", ".join(style.short(value) for value in sorted(set(told.temperature)))
    tokens = rows[rows.n == 1].tokens.dropna()
    sentences = [
        "Answers sampled from the newest checkpoint of each member: the share of problems of which any of n samples is "
        "right (pass@n), and of which the most common answer is (majority), means over all subsets of n of the samples "
        f"(docs/test_time_compute.md); temperature {temperatures}.",
        f"A sample takes {style.short(tokens.min())} to {style.short(tokens.max())} tokens on average, by member; the "
        "CSV has the tokens of n of them." if len(tokens) else "",
        f"By member: the vote against {x_label(comparison.part.x)}." if by_member else "",
        seeds_caption(comparison),
    ]  # fmt: skip
    return " ".join(filter(None, sentences))


def _alternative_text(rows: pd.DataFrame) -> str:
    sentences = []
    for (source, split, measure, member), own in rows.groupby(["source", "split", "measure", "member"], sort=False):
        first, last = own.loc[own.n.idxmin()], own.loc[own.n.idxmax()]
        sentences.append(
            f"{source}, {split_name(split)}, {_TITLES[measure]}, {member}: from {style.short(first.value)} at n = 1 to "
            f"{style.short(last.value)} at {last.n}"
        )
    return f"Line charts against the number of samples. {'. '.join(sentences)}."
