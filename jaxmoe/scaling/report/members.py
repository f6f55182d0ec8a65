"""The member table, one row an arm with its spread over seeds, or one row a run: numbers, and text for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxmoe.scaling.report import style
from jaxmoe.scaling.report.comparison import split_name
from jaxmoe.scaling.report.figures import gaps, loss_accuracy_gaps, metric_rows
from jaxmoe.scaling.report.tables import StudyTables

if TYPE_CHECKING:
    import pandas as pd

_SIZES = {
    "num_experts": ("experts E", style.short),
    "experts_per_token": ("per token K", style.short),
    "total_parameters": ("total", style.count),
    "active_parameters": ("active", style.count),
    "flops_per_token": ("FLOPs/token", style.count),
    "tokens": ("tokens", style.count),
    "tokens_per_parameter": ("TPP", lambda value: "–" if style.missing(value) else f"{value:.3g}"),
    "sparsity": ("sparsity 1−K/E", lambda value: style.fixed(value, 3)),
}
_SETTINGS = {
    "learning_rate": ("learning rate", style.short),
    "init_std": ("init std", style.short),
    "corruption": ("corruption", style.short),
}
_RUN = {
    "dropped_fraction": ("dropped", lambda value: "–" if style.missing(value) else f"{100 * value:.2g} %"),
    "dead_experts": ("dead experts", style.short),
    "load_max_over_mean": ("load max/mean", lambda value: style.fixed(value, 2)),
    "skipped_steps": ("skipped steps", style.short),
    "tokens_per_second": ("tokens/s", style.count),
    "minutes": ("minutes in steps", lambda value: style.fixed(value, 1)),
}


def member_numbers(tables: StudyTables) -> pd.DataFrame:
    """One row a run: sizes, settings, final losses and accuracies, gaps, health and speed. Unrounded."""
    import pandas as pd

    final = tables.results[tables.results.final]
    shown = metric_rows(final)
    columns: dict[str, dict[str, float]] = {}
    for row in shown.itertuples():
        place = "/".join(filter(None, [row.metric, row.source, row.split if row.source else ""]))
        columns.setdefault(place, {})[row.member] = row.value
    for row in gaps(final).itertuples():
        if row.metric != "accuracy":
            columns.setdefault(f"generalization_gap/{row.source}/{row.split}", {})[row.member] = row.value
    for (source, split), own in loss_accuracy_gaps(tables).groupby(["source", "split"], sort=False):
        columns[f"loss_accuracy_gap/{source}/{split}"] = dict(zip(own.member, own.value))
    measured = pd.DataFrame({name: tables.members.member.map(values) for name, values in columns.items()})
    ordered = sorted(measured.columns, key=lambda name: (name != "training_loss", name))
    identity = tables.members[["member", "arm", "seed", "slices", "status", "step", *_SIZES, *_SETTINGS]]
    identity = identity.assign(slices=[" ".join(slices) for slices in identity.slices])
    return pd.concat([identity, measured[ordered], tables.members[[*_RUN, "device", "config_hash"]]], axis=1)


def run_table(numbers: pd.DataFrame) -> pd.DataFrame:
    """`member_numbers` as text, a row each run."""
    import pandas as pd

    formats = _formats(numbers)
    rows = []
    for record in numbers.to_dict("records"):
        row: dict[str, Any] = {"run": record["member"], "status": record["status"], "seed": record["seed"]}
        row.update({heading: write(record[name]) for name, (heading, write) in formats.items()})
        rows.append(row)
    return pd.DataFrame(rows)


def arm_table(numbers: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: means over its finished seeds, and lowest to highest seed as a second line."""
    import pandas as pd

    formats = _formats(numbers)
    rows = []
    for arm, runs in numbers.groupby("arm", sort=False):
        finished = runs[runs.status == "finished"]
        used = runs if finished.empty else finished
        row: dict[str, Any] = {"member": arm, "finished seeds": f"{len(finished)} of {len(runs)}"}
        row.update({heading: _over_seeds(used[name], write) for name, (heading, write) in formats.items()})
        rows.append({**row, "slices": runs.slices.iloc[0]})
    return pd.DataFrame(rows)


def _over_seeds(values: pd.Series, write: Any) -> str:
    values = values.dropna()
    if values.empty:
        return "–"
    mean, low, high = write(float(values.mean())), write(float(values.min())), write(float(values.max()))
    return mean if low == high else f"{mean}\n{low} to {high}"


def _formats(numbers: pd.DataFrame) -> dict[str, tuple[str, Any]]:
    """Column -> (heading, writer), in the order of the table: no empty column, no setting equal for all."""
    formats = dict(_SIZES)
    for name in numbers.columns:
        metric, _, place = name.partition("/")
        source, _, split = place.rpartition("/")
        unit = "bits per token" if f"task_loss/{place}" in numbers.columns else "nats per token"
        heading = {
            "training_loss": "training loss",
            "validation_loss": f"{source} validation loss ({split_name(split)})",
            "task_loss": f"{source} task loss ({split_name(split)})",
            "accuracy": f"{source} accuracy ({split_name(split)})",
            "generalization_gap": f"{source} gap (test − {split_name(split)}, {unit})",
            "loss_accuracy_gap": f"{source} loss–accuracy gap ({split_name(split)})",
        }.get(metric)
        if heading and (place or metric == "training_loss"):
            formats[name] = (heading, style.fixed)
    formats.update({name: entry for name, entry in _SETTINGS.items() if numbers[name].nunique() > 1})
    formats.update(_RUN)
    return {name: entry for name, entry in formats.items() if numbers[name].notna().any()}
