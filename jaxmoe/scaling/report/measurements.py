"""The numbers in the members' folders: records, training logs, throughput; read, checked and put in long form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from jaxmoe.evaluation.evaluate import MIXTURE
from jaxmoe.evaluation.records import Record
from jaxmoe.evaluation.test_time import budgets
from jaxmoe.scaling.report.errors import ReportError

if TYPE_CHECKING:
    import pandas as pd


def read_json_lines(path: epath.Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that may be being written: a last line without its end is left out.

    Raises:
      ReportError: any other line is not JSON.
    """
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}, line {number} is not JSON: {error}.") from error


NO_LOGS: dict[str, list[dict[str, Any]]] = {"metrics": [], "throughput": []}


def read_logs(folder: epath.Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a member's `metrics` and `throughput` logs; empty lists where there are none."""
    return {name: list(read_json_lines(folder / f"{name}.jsonl")) for name in ("metrics", "throughput")}


def lookup(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value at a dotted path of nested mappings; the default if it is missing or None."""
    value: Any = values
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return default if value is None else value


def source_of(record: Record) -> str:
    """The record's source; "" for the whole mixture."""
    return "" if record["evaluation"] == "training" and record["source"] == MIXTURE else record["source"]


def _measured(record: Record) -> dict[str, tuple[Any, Any]]:
    """What the report shows of a record: metric -> (value, standard error over examples)."""
    if record["evaluation"] == "training":
        return {"training_loss": (record.get("loss"), None)}
    if record["evaluation"] == "validation":
        return {"validation_loss": (record.get("loss"), record.get("standard_error"))}
    if record["evaluation"] == "task":
        return {
            "task_loss": (record.get("bits_per_token"), record.get("bits_per_token_standard_error")),
            "task_loss_per_byte": (record.get("bits_per_byte"), None),
            "accuracy": (record.get("accuracy"), record.get("accuracy_standard_error")),
        }
    if record["evaluation"] == "reward":
        return {"reward": (record.get("reward"), record.get("reward_standard_error"))}
    return {}  # generated answers are the `accuracy` of the task record


def results(members: pd.DataFrame, records: Mapping[str, list[Record]]) -> pd.DataFrame:
    """Every measured number; see `StudyTables.results`. `kind` says what an accuracy counts."""
    import pandas as pd

    rows = []
    for member in members.itertuples():
        for record in records[member.member]:
            for metric, (value, error) in _measured(record).items():
                if value is None:
                    continue
                rows.append((
                    member.member, member.arm, member.seed, record["step"], record["tokens"], record["evaluation"],
                    source_of(record), record["split"], metric, float(value),
                    math.nan if error is None else float(error),
                    record.get("chance_accuracy") if metric == "accuracy" else None,
                    record.get("accuracy_kind") if metric == "accuracy" else None,
                    record.get("examples"), record.get("examples_beyond_training_length"),
                ))  # fmt: skip
    columns = ["member", "arm", "seed", "step", "tokens", "evaluation", "source", "split", "metric", "value",
               "standard_error", "chance", "kind", "examples", "beyond"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"beyond": float})


def rewards(members: pd.DataFrame, logs: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> pd.DataFrame:
    """Mean reward of the sampled responses of each logged rollout step; empty without GRPO."""
    import pandas as pd

    rows = [
        (member.member, member.arm, member.seed, line["step"], float(line["reward"]))
        for member in members.itertuples()
        for line in logs[member.member]["metrics"]
        if line.get("reward") is not None
    ]
    return pd.DataFrame(rows, columns=["member", "arm", "seed", "step", "reward"])


def sampling(members: pd.DataFrame, records: Mapping[str, list[Record]]) -> pd.DataFrame:
    """What n samples of a problem are worth, by the newest `test_time` record of each member, source and split.

    Returns:
      A row per (member, source, split, n, measure `coverage` or `majority`): the expected `value`, and `tokens`, those
      of n samples; empty where nothing was sampled.
    """
    import pandas as pd

    rows = []
    for member in members.itertuples():
        own = [record for record in records[member.member] if record["evaluation"] == "test_time"]
        newest = {(record["source"], record["split"]): record for record in sorted(own, key=lambda one: one["step"])}
        for (source, split), record in newest.items():
            for measure in ("coverage", "majority"):
                for n in budgets(record["samples"]):
                    name = f"expected_{measure}_{n}"
                    rows.append((
                        member.member, member.arm, member.seed, record["step"], source, split, record["problems"],
                        record["temperature"], n, n * (record.get("tokens_per_sample") or math.nan), measure,
                        record[name], record[f"{name}_standard_error"],
                    ))  # fmt: skip
    columns = ["member", "arm", "seed", "step", "source", "split", "problems", "temperature", "n", "tokens", "measure",
               "value", "standard_error"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def curves(
    members: pd.DataFrame, logs: Mapping[str, Mapping[str, list[dict[str, Any]]]], sources: Sequence[str]
) -> pd.DataFrame:
    """Training loss against tokens (padding included), of the mixture and of each source that the run logged."""
    import pandas as pd

    rows = []
    for member in members.itertuples():
        per_step = member.tokens / member.steps if member.tokens and member.steps else math.nan
        for line in logs[member.member]["metrics"]:
            if "reward" in line:
                continue  # its loss is GRPO's
            for source in ("", *sources):
                loss = line.get(f"loss/{source}" if source else "loss")
                if loss is not None:
                    rows.append((member.member, member.arm, member.seed, line["step"], line["step"] * per_step, source,
                                 float(loss)))  # fmt: skip
    return pd.DataFrame(rows, columns=["member", "arm", "seed", "step", "tokens", "source", "loss"])


def load(members: pd.DataFrame, records: Mapping[str, list[Record]]) -> pd.DataFrame:
    """Share of the assignments that each expert received, per layer, largest first, at the last training record."""
    import pandas as pd

    rows = []
    for member in members.itertuples():
        with_load = [record for record in records[member.member] if record.get("expert_load")]
        shares = max(with_load, key=lambda record: record["step"])["expert_load"] if with_load else []
        for layer, of_layer in enumerate(shares):
            whole = math.fsum(of_layer) or 1.0
            for rank, share in enumerate(sorted(of_layer, reverse=True)):
                rows.append((member.member, member.arm, member.seed, layer, rank, share / whole,
                             share / whole * len(of_layer)))  # fmt: skip
    return pd.DataFrame(rows, columns=["member", "arm", "seed", "layer", "rank", "share", "relative"])


def run_summary(logs: Mapping[str, list[dict[str, Any]]], records: list[Record]) -> dict[str, Any]:
    """What went wrong while training, and how fast it was.

    Returns:
      dropped_fraction: of assignments, largest over the training records (or, without those, the log).
      evaluation_dropped_fraction: the same over all other records.
      skipped_steps: steps skipped because a number was not finite.
      dead_experts: experts that no token of the last training record chose, over all layers.
      load_max_over_mean: load of the busiest expert over the mean, mean over layers, at the last training record.
      tokens_per_second: median of the log, padding not counted.
      minutes: in training steps; compilation, evaluation and checkpoints are not counted.
    """
    mixture = [record for record in records if record["evaluation"] == "training" and not source_of(record)]
    training = sorted(mixture, key=lambda record: record["step"])
    metrics, speed = logs["metrics"], logs["throughput"]
    rates = sorted(line["tokens_per_second"] for line in speed if line.get("tokens_per_second"))
    seconds, previous = 0.0, 0
    for line in speed:
        seconds += max(0, line["step"] - previous) * (line.get("step_seconds") or 0.0)
        previous = line["step"]
    last = training[-1] if training else {}
    return {
        "dropped_fraction": _largest(training or metrics, "dropped_fraction"),
        "evaluation_dropped_fraction": _largest(
            [record for record in records if record["evaluation"] != "training"], "dropped_fraction"
        ),
        "skipped_steps": _largest([*metrics, *training], "skipped", "skipped_steps"),
        "dead_experts": last.get("dead_experts"),
        "load_max_over_mean": last.get("load_max_over_mean"),
        "tokens_per_second": rates[len(rates) // 2] if rates else None,
        "minutes": seconds / 60 if seconds else None,
    }


def _largest(lines: Sequence[Mapping[str, Any]], *names: str) -> float | None:
    values = [line[name] for line in lines for name in names if line.get(name) is not None]
    return max(values, default=None)
