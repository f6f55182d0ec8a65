"""Drawing primitives: a line with its seeds, titles, legend rows, axes for what is compared and measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jaxmoe.scaling.report import style
from jaxmoe.scaling.report.comparison import x_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPTIMAL_TOKENS_PER_PARAMETER = 20.0
"""Where arXiv 2508.18672 sees the best accuracy on reasoning tasks; marked in the figures."""

UNITS = {"training_loss": "nats per token", "validation_loss": "nats per token", "task_loss": "bits per answer token",
         "accuracy": "accuracy", "reward": "reward"}

RANK_STYLES = (
    lambda colour: {"linestyle": "-", "linewidth": 2.0, "marker": "o", "markersize": 6, "markerfacecolor": colour,
                    "markeredgecolor": "white", "markeredgewidth": 0.8},
    lambda colour: {"linestyle": (0, (4, 2)), "linewidth": 1.3, "marker": "o", "markersize": 5,
                    "markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.2},
    lambda colour: {"linestyle": (0, (1, 1.6)), "linewidth": 1.5, "marker": "s", "markersize": 4.5,
                    "markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.2},
)  # fmt: skip
"""How a line is drawn, by the rank of its split: what the source is about, and the others."""

_LINEAR = ("experts_per_token", "corruption", "sparsity")


def over_seeds(rows: pd.DataFrame, x: str) -> pd.DataFrame:
    """Mean, lowest and highest value over the seeds of each arm, in order of x.

    Args:
      rows: a row per member with `arm`, `seed`, `value` and the column `x`.
      x: a column of `rows`.

    Returns:
      arm, x, mean, low, high, n.
    """
    table = rows.groupby("arm", sort=False).agg(
        x=(x, "mean"), mean=("value", "mean"), low=("value", "min"), high=("value", "max"), n=("value", "size")
    )
    return table.sort_values("x", kind="stable").reset_index()


def draw_line(axes: Axes, rows: pd.DataFrame, x: str, colour: str, *, rank: int = 0) -> float:
    """A line through the means over seeds, the band from lowest to highest seed, and the seeds as small points.

    Args:
      axes: where to draw.
      rows: as in `over_seeds`; not empty.
      x: column of the horizontal axis.
      colour: of the line.
      rank: 0 draws a solid line; 1 a thin dashed one with hollow circles, 2 a dotted one with hollow squares.

    Returns:
      The height of the line's right end, for its label.
    """
    table = over_seeds(rows, x)
    if (table.n > 1).any():
        axes.fill_between(table.x, table.low, table.high, color=colour, alpha=0.08 if rank else 0.16, linewidth=0)
        axes.plot(rows[x], rows.value, "o", color=colour, alpha=0.45, markersize=3.2, markeredgewidth=0)
    axes.plot(table.x, table["mean"], color=colour, **RANK_STYLES[min(rank, 2)](colour))
    left, right = axes.get_xlim()
    return float(table["mean"][table.x.idxmin() if left > right else table.x.idxmax()])


def titles(axes: Axes, title: str, subtitle: str = "") -> None:
    """A bold title and, under it, a small grey line."""
    axes.set_title(title, pad=19 if subtitle else None)
    if subtitle:
        axes.annotate(subtitle, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points",
                      fontsize=9, color=style.MUTED, va="bottom", annotation_clip=False)  # fmt: skip


def compared_axis(axes: Axes, x: str, values: Iterable[float]) -> None:
    """The horizontal axis for column `x`: logarithmic unless x is a small count or a share."""
    values = [float(value) for value in values]
    axes.set_xlabel(x_label(x))
    if x == "tokens_per_parameter":
        logarithmic_axis(axes, values, _two_digits, reverse=True)
        _mark_optimum(axes, values)
    elif x in _LINEAR or min(values, default=1.0) <= 0:
        measured_axis(axes, values)
    else:
        logarithmic_axis(axes, values, style.count if max(values, default=1.0) >= 1000 else style.short)


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else style.count(value)


def optimum_in_range(values: Iterable[float]) -> bool:
    """Whether 20 tokens per parameter lies within, or just outside of, what was measured."""
    values = list(values)
    return min(values) / 1.3 <= OPTIMAL_TOKENS_PER_PARAMETER <= max(values) * 1.3


def _mark_optimum(axes: Axes, values: Sequence[float]) -> None:
    if optimum_in_range(values):
        high, low = axes.get_xlim()
        axes.set_xlim(max(high, OPTIMAL_TOKENS_PER_PARAMETER * 1.1), min(low, OPTIMAL_TOKENS_PER_PARAMETER / 1.1))
        axes.axvline(OPTIMAL_TOKENS_PER_PARAMETER, color=style.MUTED, linewidth=1.2, linestyle=":", zorder=0.5)


def value_axis(axes: Axes, metric: str, values: Iterable[float], *, difference: bool = False) -> None:
    """The vertical axis: accuracy from 0, losses from 0 where the smallest is near it, zero marked for differences."""
    values = list(values)
    low, high = min(values, default=0.0), max(values, default=1.0)
    axes.set_ylabel(UNITS[metric])
    if difference:
        least = 0.01 if metric == "accuracy" else 0.0  # a difference of a few examples shall not fill the panel
        low, high = min(low, -least), max(high, least)
        axes.axhline(0, color=style.MUTED, linewidth=0.9, zorder=0.6)
        axes.set_ylabel("difference of accuracy" if metric == "accuracy" else UNITS[metric])
    room = 0.07 * ((high - low) or abs(high) or 1.0)
    if metric in ("accuracy", "reward") and not difference:
        top = 1.03 if high > 0.6 else max(high * 1.15, 0.02)
        axes.set_ylim(-0.02 * top, top)
    elif not difference and 0 <= low < 0.5 * high:
        axes.set_ylim(-0.02 * high, high + room)
    else:
        axes.set_ylim(low - room, high + room)


def logarithmic_axis(axes: Axes, values: Iterable[float], formatter: Any, *, reverse: bool = False) -> None:
    """A log x axis whose ticks are the values that were measured, where they do not collide, written by `formatter`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = sorted({float(value) for value in values if value and value > 0})
    axes.set_xscale("log", base=2)
    if not values:
        return
    low, high = math.log(values[0]), math.log(values[-1])
    margin = 0.06 * (high - low) or 0.35
    limits = (math.exp(low - margin), math.exp(high + margin))
    axes.set_xlim(*(limits[::-1] if reverse else limits))
    positions = [math.log(value) for value in values]
    axes.xaxis.set_major_locator(FixedLocator(_spread(values, positions, _label_share(axes, map(formatter, values)))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formatter(value)))


def measured_axis(axes: Axes, values: Iterable[float], formatter: Any = style.short) -> None:
    """A linear x axis with a tick at every value that was measured, where they do not collide."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    values = sorted({float(value) for value in values}) or [0.0]
    low, high = values[0], values[-1]
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(FixedLocator(_spread(values, values, _label_share(axes, map(formatter, values)))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formatter(value)))


def _label_share(axes: Axes, labels: Iterable[str]) -> float:
    """Share of the axis that the longest tick label needs, a little room included."""
    width = axes.figure.get_size_inches()[0] * axes.get_subplotspec().get_position(axes.figure).width
    return (0.075 * max(map(len, labels)) + 0.09) / (0.85 * width)


def _spread(values: Sequence[float], positions: Sequence[float], gap: float) -> list[float]:
    """The values that stand at least the share `gap` of the axis apart; both ends are always kept."""
    width = (positions[-1] - positions[0]) or 1.0
    places = [(position - positions[0]) / width for position in positions]
    kept = [0]
    for index, place in enumerate(places):
        if place - places[kept[-1]] >= gap:
            kept.append(index)
    last = len(values) - 1
    while kept[-1] != last and len(kept) > 1 and places[last] - places[kept[-1]] < gap:
        kept.pop()
    return [values[index] for index in dict.fromkeys([*kept, last])]


def label_lines(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes each (y, text, colour) to the right of the panel at its line's end, moved apart where they collide."""
    if not labels:
        return
    bottom, top = axes.get_ylim()
    height_points = axes.figure.get_size_inches()[1] * 72 * axes.get_subplotspec().get_position(axes.figure).height
    wanted = sorted(((y - bottom) / (top - bottom), text, colour) for y, text, colour in labels)
    heights = [12.5 * (1 + text.count("\n")) / height_points for _, text, _ in wanted]
    places = [place for place, _, _ in wanted]
    for _ in range(80):
        for index in range(len(places) - 1):
            overlap = (heights[index] + heights[index + 1]) / 2 - (places[index + 1] - places[index])
            if overlap > 1e-9:
                places[index] -= overlap / 2
                places[index + 1] += overlap / 2
    lowest = 0.0  # below it are the labels of the horizontal axis
    for index, height in enumerate(heights):
        places[index] = max(places[index], lowest)
        lowest = places[index] + (height + heights[min(index + 1, len(heights) - 1)]) / 2
    for place, (_, text, colour) in zip(places, wanted):
        axes.annotate(
            text, (1.0, place), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points", color=colour,
            fontsize=9.5, va="center", ha="left", annotation_clip=False,
        )  # fmt: skip


def legend_row(figure: Figure, entries: Sequence[tuple[str, dict]]) -> None:
    """A legend below all panels, one entry for each (label, `Line2D` properties), in rows that fit the width."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **properties) for label, properties in entries]
    longest = max((len(label) for label, _ in entries), default=0)
    per_row = max(1, int(figure.get_size_inches()[0] / (0.42 + 0.075 * longest)))
    rows = max(1, math.ceil(len(handles) / per_row))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / rows), handletextpad=0.4,
        columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def dot(colour: str, *, hollow: bool = False) -> dict:
    """Legend properties of a point."""
    return {"color": colour, "marker": "o", "linestyle": "", "markersize": 7,
            "markerfacecolor": "white" if hollow else colour}  # fmt: skip
