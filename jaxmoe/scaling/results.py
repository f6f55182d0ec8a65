"""What a study's records say, as tables.

Losses are in nats per token unless they are named bits. A column of the results table is named
`QUANTITY/SOURCE/SPLIT`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from jaxmoe.config import ConfigError
from jaxmoe.evaluation.evaluate import MIXTURE
from jaxmoe.evaluation.records import Record, validate_record
from jaxmoe.run_files import RECORDS_DIRECTORY
from jaxmoe.scaling.study_file import STUDY_FILE, read_study_file
from jaxmoe.storage import as_path, read_json

if TYPE_CHECKING:
    import pandas as pd

MEMBER_COLUMNS = (
    "study", "member", "arm", "slices", "seed", "step", "tokens", "total_parameters", "active_parameters",
    "flops_per_token", "tokens_per_parameter", "sparsity", "num_experts", "experts_per_token", "learning_rate",
    "init_std", "config_hash",
)  # fmt: skip

_NUMBERS = {
    "training": {"loss": "training_loss", "dropped_fraction": "dropped_fraction", "skipped_steps": "skipped_steps"},
    "validation": {"loss": "validation_loss"},
    "task": {
        "loss": "task_loss",
        "bits_per_token": "bits_per_token",
        "bits_per_byte": "bits_per_byte",
        "accuracy": "accuracy",
        "accuracy_standard_error": "accuracy_standard_error",
    },
    "generation": {"accuracy": "generation_accuracy"},
    "test_time": {},  # curves, which the report draws
    "reward": {"reward": "reward", "reward_standard_error": "reward_standard_error"},
}


def read_study(study_dir: epath.PathLike) -> dict[str, Any]:
    """The study's description, `study.json`.

    Raises:
      ConfigError: the folder is not a study's, or its study.json is broken.
    """
    path = as_path(study_dir) / STUDY_FILE
    if not path.exists():
        raise ConfigError(f"{study_dir} has no {STUDY_FILE}, so it is not the folder of a study.")
    return read_study_file(path)


def read_records(study_dir: epath.PathLike) -> list[Record]:
    """All records of a study's members, by member in the study's order, then by file name.

    Records of another configuration than `study.json` has for their member are left out. The slices are those that
    `study.json` says now, whatever they were when a record was written.

    Raises:
      ConfigError: the folder is not a study's.
      ValueError: a record breaks the schema; its path is named.
    """
    return sift_records(study_dir)[0]


def sift_records(study_dir: epath.PathLike) -> tuple[list[Record], dict[str, int]]:
    """`read_records`, and how many records of another configuration it left out, by member (none: no entry)."""
    directory = as_path(study_dir)
    records, foreign = [], {}
    for member in read_study(directory)["members"]:
        folder = directory / member["name"] / RECORDS_DIRECTORY
        files = folder.glob("*.json") if folder.exists() else ()
        for path in sorted(files, key=lambda path: path.name):
            if path.name.startswith("."):
                continue
            record = read_json(path)
            try:
                validate_record(record)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if same_configuration(member, record):
                records.append({**record, "slices": ",".join(member["slices"])})
            else:
                foreign[member["name"]] = foreign.get(member["name"], 0) + 1
    return records, foreign


def same_configuration(member: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Whether a record or a `DONE` file is of the configuration that `study.json` has for the member."""
    return "config_hash" not in member or written.get("config_hash") == member["config_hash"]


def records_table(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a table, a row each."""
    import pandas as pd

    return pd.DataFrame(list(records))


def results_table(study_dir: epath.PathLike) -> pd.DataFrame:
    """One row for each member and step at which it was evaluated; what was not measured is NaN.

    Columns, besides those that name the member, its size and its settings:

    * `training_loss`, `training_loss/SOURCE`: as training saw it just before the step.
    * `validation_loss/SOURCE/SPLIT`: weighted as in training.
    * `task_loss/SOURCE/SPLIT`: answer tokens only, pooled; `bits_per_token/...`, `bits_per_byte/...`: macro means.
    * `accuracy/SOURCE/SPLIT` with `accuracy_standard_error/...`; `generation_accuracy/...`.
    * `reward/SOURCE/SPLIT` with `reward_standard_error/...`: of greedy responses, of members with GRPO.
    * `generalization_gap/SOURCE`: bits per answer token on the test split minus those on the training split; where
      there are training problems with corrected solutions (`train_clean`), minus those on these.
    * `task_minus_training_loss/SOURCE`: task loss of the test split minus the training loss (arXiv 2508.18672 reads
      the gap between pre-training and downstream loss; of what the two are the mean differs, so read it as a trend).
    * `accuracy_gap/SOURCE`: accuracy on the same training split minus that on the test split.
    * `loss_accuracy_gap/SOURCE`: accuracy on the test split minus what the best non-increasing function of its bits
      per token gives, over all rows of all members: negative where a member turns its loss into less accuracy than
      the others do.
    * `last`: whether it is the member's last row.

    Raises:
      ConfigError, ValueError: as `read_records`.
    """
    import pandas as pd

    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for record in read_records(study_dir):
        row = rows.setdefault((record["member"], record["step"]), {name: record[name] for name in MEMBER_COLUMNS})
        row.update(_columns_of(record))
    table = pd.DataFrame(list(rows.values()))
    if table.empty:
        return pd.DataFrame(columns=[*MEMBER_COLUMNS, "last"])
    place = table["member"].map({member: number for number, member in enumerate(table["member"].unique())})
    table = table.assign(place=place).sort_values(["place", "step"]).drop(columns="place").reset_index(drop=True)
    table["last"] = table["step"] == table.groupby("member")["step"].transform("max")
    return _with_gaps(table)


def _columns_of(record: Record) -> dict[str, Any]:
    """The numbers of a record under their names in the results table."""
    evaluation, source = record["evaluation"], record["source"]
    if evaluation == "training":
        suffix = "" if source == MIXTURE else f"/{source}"
    else:
        suffix = f"/{source}/{record['split']}"
    numbers = _NUMBERS[evaluation].items()
    if evaluation == "training" and suffix:
        numbers = [("loss", "training_loss")]
    return {f"{column}{suffix}": record.get(name) for name, column in numbers}


def _with_gaps(table: pd.DataFrame) -> pd.DataFrame:
    columns = _generalization_columns(table)
    for source in _task_sources(table):
        test_loss = table[f"task_loss/{source}/test"].astype(float)
        if "training_loss" in table:
            columns[f"task_minus_training_loss/{source}"] = test_loss - table["training_loss"].astype(float)
        columns[f"loss_accuracy_gap/{source}"] = loss_accuracy_gap(
            table[f"bits_per_token/{source}/test"].astype(float),
            table[f"accuracy/{source}/test"].astype(float),
        )
    return table.assign(**columns)


def _generalization_columns(table: pd.DataFrame) -> dict[str, pd.Series]:
    import pandas as pd

    names = {"bits_per_token": "generalization_gap", "accuracy": "accuracy_gap"}
    measured = []
    for column in table.columns:
        metric, _, place = column.partition("/")
        source, _, split = place.rpartition("/")
        if metric in names and source:
            values = table[column].astype(float).rename("value").rename_axis("row").dropna().reset_index()
            measured.append(values.assign(metric=metric, source=source, split=split, standard_error=np.nan))
    if not measured:
        return {}
    gaps = generalization_gaps(pd.concat(measured, ignore_index=True), keys=("row", "source", "metric"))
    return {
        f"{names[metric]}/{source}": own.set_index("row").value.reindex(table.index)
        for (source, metric), own in gaps[gaps["rank"] == 0].groupby(["source", "metric"], sort=False)
    }


def generalization_gaps(rows: pd.DataFrame, keys: Sequence[str] = ("member", "source", "metric")) -> pd.DataFrame:
    """How much worse the test split is than each training split, a row per (*keys, training split).

    Args:
      rows: one number each: `keys`, `metric`, `split`, `value`, `standard_error`; other columns are kept.
      keys: what tells measurements apart, besides the split.

    Returns:
      `train` and `test`; `value`, which is test minus train for losses (in their unit) and train minus test for
      accuracy; `standard_error` of it, over examples; `rank`: where there are training problems with corrected
      solutions (`train_clean`), the gap against them has rank 0 and that against `train` rank 1.
    """
    import pandas as pd

    keys = list(keys)
    test = rows.loc[rows.split == "test", [*keys, "value", "standard_error"]]
    test = test.rename(columns={"value": "test", "standard_error": "test_error"})
    trained = [rows[rows.split == split].merge(test, on=keys) for split in ("train_clean", "train")]
    table = pd.concat(trained, ignore_index=True).rename(columns={"value": "train"})
    table["standard_error"] = (table.standard_error**2 + table.test_error**2) ** 0.5
    table["value"] = (table.test - table.train).where(table.metric != "accuracy", table.train - table.test)
    table["rank"] = table.duplicated(keys).astype(int)  # the corrected split comes first
    return table


def _task_sources(table: pd.DataFrame) -> list[str]:
    """Sources whose test split has a task loss."""
    names = [column.removeprefix("task_loss/") for column in table.columns if column.startswith("task_loss/")]
    return [name.removesuffix("/test") for name in names if name.endswith("/test")]


def loss_accuracy_gap(loss: pd.Series, accuracy: pd.Series) -> pd.Series:
    """Accuracy minus its best (least-squares) non-increasing function of the loss; NaN where either is NaN.

    Points of equal loss get the mean of their accuracies. With fewer than three points there is nothing to compare.
    """
    import pandas as pd
    from scipy.optimize import isotonic_regression

    known = loss.notna() & accuracy.notna()
    gap = pd.Series(np.nan, index=loss.index)
    if known.sum() < 3:
        return gap
    grouped = accuracy[known].groupby(loss[known])
    means, counts = grouped.mean(), grouped.size()
    fitted = isotonic_regression(means.to_numpy(), weights=counts.to_numpy(), increasing=False).x
    gap[known] = accuracy[known] - loss[known].map(dict(zip(means.index, fitted)))
    return gap
