"""Figures over the course of training: loss against tokens, task loss against training loss, accuracy against loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.scaling.report import plots, style
from jaxmoe.scaling.report.comparison import arm_colours, arm_label, split_name
from jaxmoe.scaling.report.figures import TITLES, ReportFigure, enumerate_words, metric_rows
from jaxmoe.scaling.report.panels import columns_for
from jaxmoe.scaling.report.tables import StudySlice, StudyTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_figure(tables: StudyTables, part: StudySlice, name: str) -> ReportFigure | None:
    """Task loss against training loss at every evaluation; the bar to the hollow point is the train-test gap."""
    data = _paired(tables, part, ("task_loss", "validation_loss"), "training_loss")
    if data.empty:
        return None
    losses = enumerate_words([TITLES[metric].lower() for metric in sorted(set(data.metric))]).capitalize()
    caption = (
        f"{losses} against the training loss of the mixture, one panel a source. Faint lines: the course of "
        "training, one a member and seed, from right to left; filled points: the last step, on the split that the "
        "source is about; hollow points: the other split, so the bar between them is the generalization gap. "
        "Points at equal training loss and different height generalize differently."
    )
    return _figure(tables, part, name, f"{losses} against training loss", caption, data, "training_loss", bars=True)


def accuracy_figure(tables: StudyTables, part: StudySlice, name: str) -> ReportFigure | None:
    """Accuracy against task loss, both on the split that the source is about."""
    data = _paired(tables, part, ("accuracy",), "task_loss")
    if data.empty:
        return None
    data = data[data["rank"] == 0]
    caption = (
        "Accuracy against task loss on the same split, one panel a source. Faint lines: the course of training, one a "
        "member and seed; filled points: the last step. Members at equal loss and different height convert loss into "
        "accuracy differently: the loss–accuracy gap, which the next figure and the members table show."
    )
    return _figure(tables, part, name, "Accuracy against task loss", caption, data, "task_loss", bars=False)


def _paired(tables: StudyTables, part: StudySlice, metrics: tuple[str, ...], against: str) -> pd.DataFrame:
    """A row per (member, step, source, split): `value` of one of `metrics`, and `x`, that of `against`."""
    rows = tables.results[tables.results.arm.isin(part.arms)]
    shown = metric_rows(rows)
    values = shown[shown.metric.isin(metrics)]
    if against == "training_loss":
        keys = ["member", "step"]
        other = rows[(rows.metric == against) & (rows.source == "")]
    else:
        keys = ["member", "step", "source", "split"]
        other = rows[rows.metric == against]
    paired = values.merge(other[[*keys, "value"]].rename(columns={"value": "x"}), on=keys)
    return paired[paired.split != "train_clean"].reset_index(drop=True)


def _figure(
    tables: StudyTables, part: StudySlice, name: str, title: str, caption: str, data: pd.DataFrame, against: str, *,
    bars: bool,
) -> ReportFigure:
    sources = [source for source in tables.kinds if source in set(data.source)]
    arms = tuple(arm for arm in part.arms if arm in set(data.arm))
    unfinished = sorted(set(data.member) - set(data[data.final].member))
    if unfinished:
        caption += f" Without a point at the end, since not finished: {', '.join(unfinished)}."
    ends = data[data.final & (data["rank"] == 0)]
    described = [
        f"{row.source}, {row.member}: {style.short(row.value)} at {style.short(row.x)}" for row in ends.itertuples()
    ]

    def draw(columns: int) -> Figure:
        colours = arm_colours(tables, arms)
        with style.figure_style():
            figure, grid = style.new_figure(len(sources), columns, panel_height=3.7)
            for axes, source in zip(grid, sources):
                own = data[data.source == source]
                _draw_source(axes, own, colours, bars)
                metric = own.metric.iloc[0]
                split = f"{split_name(own.sort_values('rank').split.iloc[0])} split" + (", bar to the other" * bars)
                plots.titles(axes, f"{source}: {TITLES[metric].lower()}", split)
                axes.set_xlabel(f"{TITLES[against].lower()} ({plots.UNITS[against]})")
                axes.set_ylabel(plots.UNITS[metric])
                plots.value_axis(axes, metric, own.value)
            plots.legend_row(figure, [(arm_label(tables, arm), plots.dot(colour)) for arm, colour in colours.items()])
            return figure

    columns = ["source", "split", "metric", "arm", "seed", "member", "step", "tokens", "x", "value", "final"]
    return ReportFigure(
        name=name,
        title=title,
        caption=caption,
        alt=f"Scatter plots of {title[0].lower()}{title[1:]} at the last step. {'; '.join(described)}.",
        data=data[columns].rename(columns={"x": against}),
        draw=draw,
        columns=2 if len(sources) == 2 else min(3, len(sources)),
    )


def _draw_source(axes: Axes, rows: pd.DataFrame, colours: dict[str, str], bars: bool) -> None:
    for (arm, _), own in rows.groupby(["arm", "member"], sort=False):
        colour = colours[arm]
        course = own[own["rank"] == 0].sort_values("step")
        axes.plot(course.x, course.value, color=colour, alpha=0.35, linewidth=1.2, marker=".", markersize=4)
        for end in course[course.final].itertuples():
            others = own[own.final & (own["rank"] > 0)] if bars else own.iloc[:0]
            for other in others.itertuples():
                axes.plot([end.x, end.x], [end.value, other.value], color=colour, linewidth=1.0, alpha=0.7, zorder=2)
                axes.plot(other.x, other.value, "o", markerfacecolor="white", markeredgecolor=colour, markersize=5.5)
            axes.plot(end.x, end.value, "o", color=colour, markeredgecolor="white", markersize=8, zorder=4)


def training_figure(tables: StudyTables, part: StudySlice, name: str) -> ReportFigure | None:
    """Training loss against tokens, of the mixture and of each source, a line a member."""
    data = tables.curves[tables.curves.arm.isin(part.arms)].reset_index(drop=True)
    if data.empty:
        return None
    sources = [source for source in ("", *tables.kinds) if source in set(data.source)]
    sources = sources[:1] if len(sources) == 2 else sources  # one source is the mixture
    arms = tuple(arm for arm in part.arms if arm in set(data.arm))
    last = data[data.source == ""].groupby("member", sort=False).last()
    seeds = data.groupby("arm").seed.nunique().max()

    described = [
        f"{member}: {style.short(row.loss)} after {style.count(row.tokens)} tokens" for member, row in last.iterrows()
    ]

    def draw(columns: int) -> Figure:
        colours = arm_colours(tables, arms)
        with style.figure_style():
            figure, grid = style.new_figure(len(sources), columns)
            for axes, source in zip(grid, sources):
                own = data[data.source == source]
                for (arm, _), curve in own.groupby(["arm", "member"], sort=False):
                    window = max(1, len(curve) // 50)
                    smooth = curve.loss.rolling(window, min_periods=1).mean()
                    axes.plot(curve.tokens, smooth, color=colours[arm], linewidth=1.4, alpha=1 if seeds == 1 else 0.7)
                plots.titles(axes, source or "Whole mixture")
                axes.set_xlabel("tokens")
                axes.set_ylabel("training loss (nats per token)")
                axes.set_xlim(0, data.tokens.max() * 1.01)
                plots.value_axis(axes, "training_loss", own.loss)
                axes.xaxis.set_major_formatter(lambda value, _: style.count(value) if value else "0")
                axes.xaxis.set_major_locator(_few_ticks())
            plots.legend_row(figure, [(arm_label(tables, arm), plots.dot(colour)) for arm, colour in colours.items()])
            return figure

    each = "One line a member" if seeds == 1 else f"One line a member and seed (up to {seeds} seeds)"
    return ReportFigure(
        name=name,
        title="Training curves",
        caption=f"Training loss against tokens seen, padding included. {each}; running mean over 2 % of the logged "
        "steps.",
        alt=f"Training curves. {'; '.join(described)}.",
        data=data,
        draw=draw,
        columns=columns_for(len(sources)),
    )


def _few_ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)
