"""The figure of GRPO: reward and accuracy before and after it, and the reward of sampled responses on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.scaling.report import plots, style
from jaxmoe.scaling.report.comparison import (
    Comparison,
    arm_colours,
    arm_label,
    seeds_caption,
    split_name,
    status_caption,
    x_label,
)
from jaxmoe.scaling.report.figures import ReportFigure
from jaxmoe.scaling.report.panels import columns_for
from jaxmoe.scaling.report.tables import StudyTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {"reward": "greedy reward", "accuracy": "accuracy"}


def reward_figure(tables: StudyTables, comparison: Comparison, name: str) -> ReportFigure | None:
    """Before against after, a panel for each source and number, and the course; None where no member has had GRPO."""
    part = comparison.part
    rows = _before_and_after(tables, comparison)
    course = tables.rewards[tables.rewards.arm.isin(part.arms)]
    if rows.empty or course.empty:
        return None
    shown = [
        (source, metric)
        for source in tables.kinds
        for metric in _TITLES
        if ((rows.source == source) & (rows.metric == metric)).any()
    ]
    colours = style.source_colours(tables.kinds)
    arms = tuple(arm for arm in part.arms if arm in set(course.arm))

    def draw(columns: int) -> Figure:
        with style.figure_style():
            figure, grid = style.new_figure(len(shown) + 1, columns)
            for axes, (source, metric) in zip(grid, shown):
                own = rows[(rows.source == source) & (rows.metric == metric)]
                plots.compared_axis(axes, part.x, own[part.x])
                split = split_name(own.split.iloc[0])
                plots.titles(axes, f"{source}: {_TITLES[metric]}", f"{split} split · solid: after · dashed: before")
                plots.value_axis(axes, metric, own.value)
                for when, rank in (("before", 1), ("after", 0)):
                    plots.draw_line(axes, own[own.when == when], part.x, colours[source], rank=rank)
            _draw_course(grid[len(shown)], course, arm_colours(tables, arms))
            labels = [(arm_label(tables, arm), plots.dot(colour)) for arm, colour in arm_colours(tables, arms).items()]
            plots.legend_row(figure, labels)
            return figure

    ends = rows.pivot_table(index=["source", "metric", "member"], columns="when", values="value", sort=False)
    described = [
        f"{source} {metric}, {member}: from {style.short(row.before)} to {style.short(row.after)}"
        for (source, metric, member), row in ends.iterrows()
    ]
    columns = ["source", "split", "metric", "arm", "seed", "member", part.x, "when", "step", "value", "standard_error"]
    return ReportFigure(
        name=name,
        title="Before and after GRPO",
        caption=f"Against {x_label(part.x)}: the model that GRPO started from, and the same after its last rollout "
        "step, on problems that it was not trained on; greedy reward is the mean reward of greedy responses. Last "
        "panel: mean reward of the sampled responses of each rollout step, running mean over 5 % of the steps. "
        f"{seeds_caption(comparison)} {status_caption(tables, part)}".strip(),
        alt=f"Before and after GRPO. {'; '.join(described)}.",
        data=rows[list(dict.fromkeys(columns))],
        draw=draw,
        columns=columns_for(len(shown) + 1),
    )


def _before_and_after(tables: StudyTables, comparison: Comparison) -> pd.DataFrame:
    """Numbers at step 0 and at the last step of members that have both, a row each, told apart by `when`."""
    import pandas as pd

    x = comparison.part.x
    results = tables.results
    results = results[results.metric.isin(list(_TITLES)) & (results["rank"] == 0)]
    results = results[results.arm.isin(comparison.part.arms)]
    results = results[results.member.isin(results.member[(results.metric == "reward") & (results.step == 0)])]
    last = results[results.final]
    first = results[(results.step == 0) & results.member.isin(last.member)]
    rows = pd.concat([first.assign(when="before"), last.assign(when="after")], ignore_index=True)
    if x not in rows:
        rows = rows.merge(tables.members[["member", x]], on="member", how="left")
    return rows.dropna(subset=[x])


def _draw_course(axes: Axes, course: pd.DataFrame, colours: dict[str, str]) -> None:
    seeds = course.groupby("arm").seed.nunique().max()
    for (arm, _), own in course.groupby(["arm", "member"], sort=False):
        smooth = own.reward.rolling(max(1, len(own) // 20), min_periods=1).mean()
        axes.plot(own.step, smooth, color=colours[arm], linewidth=1.4, alpha=1 if seeds == 1 else 0.7)
    plots.titles(axes, "Reward of sampled responses", "while training")
    axes.set_xlabel("rollout step")
    plots.value_axis(axes, "reward", course.reward)
