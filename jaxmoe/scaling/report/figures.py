"""The figures over what a slice compares: losses and accuracy, the generalization gap, the summary.

A figure carries the very table it is drawn from, which becomes its CSV.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxmoe.scaling.report import style
from jaxmoe.scaling.report.comparison import (
    Comparison,
    accuracy_caption,
    extrapolation_caption,
    seeds_caption,
    split_name,
    status_caption,
    x_label,
)
from jaxmoe.scaling.report.panels import Panel, alternative_text, columns_for, draw_panels, split_key
from jaxmoe.scaling.report.plots import OPTIMAL_TOKENS_PER_PARAMETER, optimum_in_range
from jaxmoe.scaling.report.tables import StudyTables
from jaxmoe.scaling.results import generalization_gaps, loss_accuracy_gap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TITLES = {
    "training_loss": "Training loss",
    "validation_loss": "Validation loss",
    "task_loss": "Task loss",
    "accuracy": "Accuracy",
}

_SUMMARY_ORDER = {"knowledge": 0, "reasoning": 1, "question_answer": 2, "text": 3}
"""Which kinds of source come first where there is not room for all."""

_CORRECTED = "Corrected: the training problems with their corrupted solutions put right."


@dataclasses.dataclass(frozen=True)
class ReportFigure:
    """One figure of the report.

    Attributes:
      name: stem of its files.
      title: what it shows, in a few words.
      caption: what is plotted, how many seeds, what the band is, what is left out.
      alt: the same for who cannot see it, with numbers.
      data: the table it is drawn from.
      draw: draws it with at most that many panels in a row.
      columns: panels in a row on a wide page.
    """

    name: str
    title: str
    caption: str
    alt: str
    data: pd.DataFrame
    draw: Callable[[int], Figure]
    columns: int = 3


def metric_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The numbers that figures show: the mixture's training loss, and for every source its loss and accuracy.

    A source's loss is its task loss; a text source has none and its validation loss stands in.
    """
    with_task = set(rows.loc[rows.metric == "task_loss", "source"])
    shown = (
        ((rows.metric == "training_loss") & (rows.source == ""))
        | rows.metric.isin(["task_loss", "accuracy"])
        | ((rows.metric == "validation_loss") & ~rows.source.isin(with_task) & (rows.source != ""))
    )
    return rows[shown]


def effect_figure(tables: StudyTables, comparison: Comparison, x: str, name: str) -> ReportFigure:
    """Training loss, task loss and accuracy against `x`."""
    rows = metric_rows(comparison.rows)
    panels = _panels(comparison, rows)
    drawn = [title.lower() for metric, title in TITLES.items() if (rows.metric == metric).any()]
    caption = [f"{enumerate_words(drawn).capitalize()} against {x_label(x)}.", _metric_caption(tables, rows)]
    caption.append(seeds_caption(comparison))
    if x == "tokens_per_parameter":
        optimum = f"{OPTIMAL_TOKENS_PER_PARAMETER:.0f}"
        if optimum_in_range(rows[x]):
            caption.append(f"Dotted: {optimum} tokens per parameter, where the paper sees the best reasoning accuracy.")
            marked = f"dotted: TPP {optimum}, the paper's reasoning optimum"
            panels[0] = dataclasses.replace(panels[0], subtitle=marked)
        else:
            caption.append(f"{optimum} tokens per parameter, where the paper sees the best reasoning accuracy, lies "
                           "outside of what was measured.")  # fmt: skip
    if comparison.reference:
        caption.append(f"Grey, for comparison: the slice “{comparison.reference}”.")
    caption.append(status_caption(tables, comparison.part))
    return ReportFigure(
        name=name,
        title=f"{'Losses and accuracy' if 'accuracy' in drawn else 'Losses'} against {x_label(x)}",
        caption=" ".join(filter(None, caption)),
        alt=alternative_text(panels, x),
        data=tidy(rows, x),
        draw=lambda columns: draw_panels(tables.kinds, comparison, panels, x, columns),
        columns=columns_for(len(panels)),
    )


def gap_figure(tables: StudyTables, comparison: Comparison, name: str) -> ReportFigure | None:
    """How much worse the test split is than the train split, per source; None if no source has both."""
    wide = gaps(comparison.rows)
    if not comparison.single:
        wide = wide[wide["rank"] == 0]
    if wide.empty:
        return None
    x = comparison.part.x
    panels = []
    for metric in ("validation_loss", "task_loss", "accuracy"):
        of_metric = wide[wide.metric == metric]
        for source in (source for source in tables.kinds if source in set(of_metric.source)):
            own = of_metric[of_metric.source == source]
            against = [split_name(split) for split in dict.fromkeys(own.split)]
            named = against[0] if len(against) == 1 else "training split"
            signs = f"{named} − test" if metric == "accuracy" else f"test − {named}"
            panels.append(Panel(f"{source}: gap in {TITLES[metric].lower()}", metric, own, signs, difference=True))
    kinds = {tables.kinds[source] for source in wide.source}
    caption = [
        f"How much worse the test split is than the training split, against {x_label(x)}: test minus train for losses "
        "(task losses in bits per answer token, validation losses in nats per token), train minus test for accuracy.",
        _CORRECTED if "train_clean" in set(wide.split) else "",
        "The test split of knowledge was never seen, so its gap is what memorizing is worth."
        if "knowledge" in kinds else "",
        seeds_caption(comparison),
        status_caption(tables, comparison.part),
    ]
    columns = _unique("metric", "source", "series", "arm", "seed", "member", "split", x, "total_parameters", "train",
                      "test", "value")  # fmt: skip
    return ReportFigure(
        name=name,
        title="Train–test generalization gap",
        caption=" ".join(filter(None, caption)),
        alt=alternative_text(panels, x),
        data=wide[columns].rename(columns={"value": "gap", "split": "against"}).sort_values(
            ["metric", "source", "against", x, "arm", "seed"], kind="stable"
        ),
        draw=lambda columns: draw_panels(tables.kinds, comparison, panels, x, columns),
        columns=columns_for(len(panels)),
    )


def loss_accuracy_figure(tables: StudyTables, comparison: Comparison, name: str) -> ReportFigure | None:
    """Accuracy beyond what the task loss explains, per source; None if no source has members enough to tell."""
    residuals = loss_accuracy_gaps(tables).dropna(subset=["value"])
    rows = comparison.rows[(comparison.rows.metric == "accuracy") & (comparison.rows["rank"] == 0)]
    rows = rows.drop(columns=["value", "standard_error"]).merge(residuals, on=["member", "source", "split"])
    if rows.empty:
        return None
    x = comparison.part.x
    panels = [
        Panel(f"{source}: loss–accuracy gap", "accuracy", own, f"{split_name(own.split.iloc[0])} split",
              difference=True)
        for source, own in ((source, rows[rows.source == source]) for source in tables.kinds)
        if not own.empty
    ]  # fmt: skip
    caption = [
        f"Accuracy at the last step minus what the task loss explains of it, against {x_label(x)}. Explained is the "
        "best non-increasing function of the task loss over all evaluations of all members of the study, early ones "
        "included: zero where a member is on the common curve, negative where it turns its loss into less accuracy "
        "than the others do at theirs. A member whose losses no other reaches is its own curve there.",
        seeds_caption(comparison),
        status_caption(tables, comparison.part),
    ]
    columns = _unique("source", "split", "series", "arm", "seed", "member", x, "total_parameters", "task_loss",
                      "accuracy", "value")  # fmt: skip
    return ReportFigure(
        name=name,
        title="Loss–accuracy gap",
        caption=" ".join(filter(None, caption)),
        alt=alternative_text(panels, x),
        data=rows[columns].rename(columns={"value": "gap"}).sort_values(
            ["source", x, "arm", "seed"], kind="stable"
        ),
        draw=lambda columns: draw_panels(tables.kinds, comparison, panels, x, columns),
        columns=columns_for(len(panels)),
    )


def loss_accuracy_gaps(tables: StudyTables) -> pd.DataFrame:
    """`loss_accuracy_gap` over all evaluations of all members, on the split that each source is about.

    Returns:
      A row per (source, member) that has final numbers: `split`, `task_loss`, `accuracy`, and the gap as `value`.
    """
    import pandas as pd

    measured = tables.results[tables.results["rank"] == 0]
    parts = []
    for source, own in measured[measured.metric.isin(["task_loss", "accuracy"])].groupby("source", sort=False):
        wide = own.pivot(index=["member", "final", "step"], columns="metric", values="value")
        if {"task_loss", "accuracy"} <= set(wide):
            gap = loss_accuracy_gap(wide.task_loss, wide.accuracy)
            gap = gap.mask(gap.abs() < 1e-9, 0.0)  # rounding, which would get an axis of its own
            wide = wide.assign(source=source, split=own.split.iloc[0], value=gap).reset_index()
            parts.append(wide[wide.final])
    columns = ["source", "split", "member", "task_loss", "accuracy", "value"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def gaps(rows: pd.DataFrame) -> pd.DataFrame:
    """`generalization_gaps` of the numbers that figures show."""
    shown = metric_rows(rows)
    return generalization_gaps(shown[shown.metric != "training_loss"])


def summary_figure(tables: StudyTables, comparison: Comparison) -> ReportFigure:
    """The report's first figure: training loss beside memorization and reasoning, against what the study varies."""
    import pandas as pd

    rows = metric_rows(comparison.rows)
    x = comparison.part.x
    panels = [Panel("Training loss", "training_loss", rows[rows.metric == "training_loss"], "whole mixture")]
    for source, kind in sorted(tables.kinds.items(), key=lambda entry: _SUMMARY_ORDER.get(entry[1], 4)):
        panel = _summary_panel(rows[rows.source == source], source, kind)
        if panel is not None and len(panels) < 4:
            panels.append(panel)
    panels = [panel for panel in panels if not panel.rows.empty]
    drawn = pd.concat([panel.rows for panel in panels], ignore_index=True)
    fixed = enumerate_words([style.words(name) for name in tables.held_fixed])
    caption = [
        f"{tables.title}." if not fixed else f"{tables.title}; {fixed} held fixed.",
        "" if comparison.part == tables.slices[0] else f"The slice shown is “{comparison.part.name}”.",
        _metric_caption(tables, drawn),
        seeds_caption(comparison),
        status_caption(tables, comparison.part),
    ]
    return ReportFigure(
        name="summary",
        title="Summary",
        caption=" ".join(filter(None, caption)),
        alt=alternative_text(panels, x),
        data=tidy(drawn, x),
        draw=lambda columns: draw_panels(tables.kinds, comparison, panels, x, columns),
        columns=len(panels),
    )


def _summary_panel(rows: pd.DataFrame, source: str, kind: str) -> Panel | None:
    """What a source is about: recall of what was seen, accuracy on what is new, else its loss."""
    wanted = {
        "knowledge": ("accuracy", "Memorization", "share of facts recalled"),
        "reasoning": ("accuracy", "Reasoning", "share of problems solved"),
        "text": ("validation_loss", f"{source}: validation loss", ""),
    }
    metric, title, subtitle = wanted.get(kind, ("task_loss", f"{source}: task loss", "answers only"))
    rows = rows[(rows.metric == metric) & (rows["rank"] < (1 if kind == "knowledge" else 2))]
    return None if rows.empty else Panel(title, metric, rows, subtitle)


# ------------------------------------------------------------------------------------------------- pieces


def _panels(comparison: Comparison, rows: pd.DataFrame) -> list[Panel]:
    """Training loss and every source's loss; then the accuracies together, where they can be, and one by one."""
    losses = [Panel(TITLES["training_loss"], "training_loss", rows[rows.metric == "training_loss"], "whole mixture")]
    accuracies = []
    for metric in ("validation_loss", "task_loss", "accuracy"):
        of_metric = rows[rows.metric == metric]
        for source in dict.fromkeys(of_metric.source):
            own = of_metric[of_metric.source == source]
            if not comparison.single:
                own = own[own["rank"] < 2]
            panel = Panel(f"{source}: {TITLES[metric].lower()}", metric, own, split_key(own))
            (accuracies if metric == "accuracy" else losses).append(panel)
    if comparison.single and len(accuracies) > 1:
        together = rows[(rows.metric == "accuracy") & (rows["rank"] == 0)]
        about = " · ".join(dict.fromkeys(f"{source} {split}" for source, split in zip(together.source, together.split)))
        accuracies.insert(0, Panel(TITLES["accuracy"], "accuracy", together, about))
    return [panel for panel in [*losses, *accuracies] if not panel.rows.empty]


def _metric_caption(tables: StudyTables, rows: pd.DataFrame) -> str:
    """What the drawn metrics mean."""
    drawn = set(rows.metric)
    task = "Task loss: bits per token of the answers alone, mean over examples." if "task_loss" in drawn else ""
    beyond = extrapolation_caption(rows[rows.metric == "task_loss"])
    return " ".join(filter(None, [task, beyond, accuracy_caption(tables) if "accuracy" in drawn else ""]))


def enumerate_words(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def _unique(*names: str) -> list[str]:
    return list(dict.fromkeys(names))


def tidy(rows: pd.DataFrame, x: str) -> pd.DataFrame:
    """The rows in a fixed order, with the columns that a reader of the CSV needs."""
    columns = _unique("metric", "source", "split", "series", "arm", "seed", "member", "step", x, "total_parameters",
                      "tokens_per_parameter", "value", "standard_error", "examples")  # fmt: skip
    ordered = rows.sort_values(["metric", "source", "split", "series", x, "arm", "seed"], kind="stable")
    return ordered[[column for column in columns if column in ordered]]
