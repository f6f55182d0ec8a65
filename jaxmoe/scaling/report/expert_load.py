"""The expert-load figure: how evenly the router used the experts, layer by layer.

E experts; a load of 1 is an expert's fair share, 1/E of the assignments of its layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxmoe.scaling.report import plots, style
from jaxmoe.scaling.report.comparison import arm_label
from jaxmoe.scaling.report.figures import ReportFigure
from jaxmoe.scaling.report.tables import StudySlice, StudyTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def load_statistics(load: pd.DataFrame) -> pd.DataFrame:
    """Per member: experts, layers, `max_over_mean` (mean and worst layer) and dead experts over all layers."""
    layers = load.groupby(["arm", "member", "seed", "layer"], sort=False).agg(
        experts=("rank", "size"), max_over_mean=("relative", "max"), dead=("share", lambda share: (share == 0).sum())
    )
    return layers.groupby(["arm", "member", "seed"], sort=False).agg(
        experts=("experts", "max"), layers=("experts", "size"), max_over_mean=("max_over_mean", "mean"),
        worst_layer=("max_over_mean", "max"), dead=("dead", "sum"),
    ).reset_index()  # fmt: skip


def load_figure(tables: StudyTables, part: StudySlice, name: str) -> ReportFigure | None:
    """Load of every expert relative to its fair share, sorted, one panel an arm, one line a layer and seed."""
    load = tables.load[tables.load.arm.isin(part.arms)].reset_index(drop=True)
    if load.empty:
        return None
    arms = [arm for arm in part.arms if arm in set(load.arm)]
    statistics = load_statistics(load)
    layers = int(load.layer.max()) + 1
    top = max(2.0, float(load.relative.max()) * 1.08)

    def draw(columns: int) -> Figure:
        colours = _layer_colours(layers)
        with style.figure_style():
            figure, grid = style.new_figure(len(arms), columns, panel_height=2.8)
            for axes, arm in zip(grid, arms):
                for (_, layer), own in load[load.arm == arm].groupby(["member", "layer"], sort=False):
                    experts = len(own)
                    edges = [index / experts for index in range(experts + 1)]
                    axes.stairs(own.relative, edges, baseline=None, color=colours[layer], linewidth=1.5, alpha=0.85)
                axes.axhline(1, color=style.MUTED, linewidth=0.9, linestyle=":", zorder=0.6)
                of_arm = statistics[statistics.arm == arm]
                dead = of_arm.dead.mean()
                plots.titles(
                    axes, arm_label(tables, arm),
                    f"max/mean {of_arm.max_over_mean.mean():.2f} · {style.short(float(dead))} of "
                    f"{of_arm.experts.iloc[0] * of_arm.layers.iloc[0]} dead",
                )  # fmt: skip
                axes.set_xlim(0, 1)
                axes.set_ylim(0, top)
                axes.set_xticks([0, 0.5, 1], ["busiest", "", "idlest"])
                for tick, side in zip(axes.get_xticklabels(), ("left", "center", "right")):
                    tick.set_horizontalalignment(side)
                axes.set_ylabel("load / fair share")
            if layers > 1:
                shown = sorted({0, layers - 1, *range(0, layers, math.ceil(layers / 8))})
                plots.legend_row(figure, [
                    (f"layer {layer + 1}", {"color": colours[layer], "linewidth": 2}) for layer in shown
                ])  # fmt: skip
            return figure

    described = [
        f"{row.member}: busiest expert {row.max_over_mean:.2f} times its fair share, {row.dead} dead of "
        f"{row.experts * row.layers}" for row in statistics.itertuples()
    ]  # fmt: skip
    return ReportFigure(
        name=name,
        title="Expert load",
        caption=(
            "Load of each expert relative to its fair share (1, dotted), sorted from busiest to idlest, at the last "
            "training record; one line a layer and seed. Above each panel: load of the busiest expert over the mean "
            "load (mean over layers and seeds), and experts of all layers that nothing was routed to (mean over seeds)."
        ),
        alt=f"Sorted expert load per member. {'; '.join(described)}.",
        data=load,
        draw=draw,
        columns=min(4, len(arms)) if len(arms) != 6 else 3,
    )


def _layer_colours(layers: int) -> list[str]:
    """Dark to light with depth."""
    import matplotlib
    from matplotlib.colors import to_hex

    colormap = matplotlib.colormaps["cividis"]
    return [to_hex(colormap(0.1 + 0.7 * layer / max(1, layers - 1))) for layer in range(layers)]
