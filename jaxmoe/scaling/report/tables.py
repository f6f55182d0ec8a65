"""A study's folder as tidy tables: one row per member, per measured number, per point of a training curve.

Every number is read from a record (`records/*.json`), except training curves (`metrics.jsonl`), throughput
(`throughput.jsonl`) and the members' sizes (`study.json`). E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from jaxmoe.evaluation.records import Record
from jaxmoe.scaling.report import measurements
from jaxmoe.scaling.report.errors import ReportError
from jaxmoe.scaling.report.measurements import lookup
from jaxmoe.scaling.results import read_study, same_configuration, sift_records
from jaxmoe.scaling.status import read_done
from jaxmoe.scaling.study_file import STUDY_FILE
from jaxmoe.storage import read_json
from jaxmoe.training import CONFIG_FILE

if TYPE_CHECKING:
    import pandas as pd

SIZES = (
    "total_parameters", "active_parameters", "flops_per_token", "tokens", "tokens_per_parameter", "sparsity",
    "num_experts", "experts_per_token", "expert_hidden", "width", "num_layers",
)  # fmt: skip
"""What a member is, as `study.json` says it."""

SETTINGS = ("learning_rate", "init_std", "corruption", "experts_per_token", "num_experts")
"""Settings that tell the arms of a slice apart, besides total parameters."""


@dataclasses.dataclass(frozen=True)
class StudySlice:
    """A named comparison inside a study.

    Attributes:
      name: as the experiment file calls it.
      title: heading of its section.
      x: the column that varies in it, `total_parameters` unless the experiment file says otherwise.
      note: printed beside its figures; may be empty.
      arms: names of the arms compared, in order of x.
    """

    name: str
    title: str
    x: str
    note: str
    arms: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StudyTables:
    """Everything the report prints or draws.

    Attributes:
      name, title, held_fixed, varies, notes: as `study.json` states them.
      command: what was run, if `study.json` says it; else None.
      slices: the headline first.
      kinds: source name -> knowledge, reasoning, question_answer or text.
      foreign: member -> how many of its records are of another configuration, and so left out.
      members: a row per member: name, arm, seed, slices, sizes, settings, status, step, tokens_seen, ...
      results: long: member, arm, seed, step, tokens, evaluation, source, split, metric, value, standard_error (over
        examples), chance, examples, beyond (of them, those longer than a row of training), kind (of
        accuracy), rank (0 for the split that its source is about: what was seen for knowledge, what is new for
        everything else), final.
      curves: long: member, arm, seed, step, tokens, source ("" for the mixture), loss.
      rewards: long: member, arm, seed, step, reward of the sampled responses; of members with GRPO.
      sampling: long: member, arm, seed, step, source, split, problems, temperature, n, tokens, measure (coverage or
        majority), value, standard_error; of members that were sampled.
      load: member, arm, seed, layer, rank, share of the assignments, relative (1 = balanced); at the last evaluation.
      interim: None if the comparisons use finished members, else the step at which unfinished ones are compared.
    """

    name: str
    title: str
    held_fixed: Mapping[str, float]
    varies: tuple[str, ...]
    notes: tuple[str, ...]
    command: str | None
    slices: tuple[StudySlice, ...]
    kinds: Mapping[str, str]
    foreign: Mapping[str, int]
    members: pd.DataFrame
    results: pd.DataFrame
    curves: pd.DataFrame
    rewards: pd.DataFrame
    sampling: pd.DataFrame
    load: pd.DataFrame
    interim: int | None

    def comparison(self, part: StudySlice) -> pd.DataFrame:
        """The numbers that `part` compares, a row per (member, source, split, metric), with sizes and settings."""
        rows = self.results[self.results.final & self.results.arm.isin(part.arms)]
        columns = dict.fromkeys(("member", "total_parameters", "active_parameters", *SETTINGS, part.x))
        columns.pop("tokens_per_parameter", None)
        rows = rows.merge(self.members[list(columns)], on="member", how="left")
        return rows.assign(tokens_per_parameter=rows.tokens / rows.total_parameters)

    def unfinished(self, part: StudySlice | None = None) -> pd.DataFrame:
        """The members (of `part`) that have not reached their last step."""
        rows = self.members[self.members.status != "finished"]
        return rows if part is None else rows[rows.arm.isin(part.arms)]


def load_study(study_dir: epath.PathLike) -> StudyTables:
    """Reads a study's folder, finished or not.

    Raises:
      ReportError: no such folder, no `study.json` in it, or not one record in any member's folder.
    """
    import pandas as pd

    directory = epath.Path(study_dir)
    if not directory.exists():
        raise ReportError(f"{directory}: no such folder; give the --workdir that `python -m experiments.run` wrote to.")
    try:
        study = read_study(directory)
        records: dict[str, list[Record]] = {entry["name"]: [] for entry in study["members"]}
        kept, foreign = sift_records(directory)
        for record in kept:
            records[record["member"]].append(record)
        configs = {name: _config(directory / name / CONFIG_FILE) for name in records}
    except ValueError as error:
        raise ReportError(str(error)) from error
    replaced = {name for name in foreign if not records[name]}  # nothing there is of today's configuration
    configs |= {name: {} for name in replaced}
    logs = {name: measurements.NO_LOGS if name in replaced else measurements.read_logs(directory / name)
            for name in records}  # fmt: skip
    if not any(records.values()):
        raise ReportError(
            f"{directory} has no records yet ({len(records)} members, none evaluated"
            + (f"; records of another configuration than {STUDY_FILE} states: {', '.join(foreign)}" * bool(foreign))
            + "); train at least one member with `python -m experiments.run` first."
        )
    described = _described_slices(study)
    wanted = dict.fromkeys((*SIZES, *SETTINGS, *sorted(entry["x"] for entry in described.values() if entry.get("x"))))
    members = pd.DataFrame([
        {**_identity(directory, entry, configs[entry["name"]], records[entry["name"]], tuple(wanted)),
         **measurements.run_summary(logs[entry["name"]], records[entry["name"]])}
        for entry in study["members"]
    ])  # fmt: skip
    kinds = _source_kinds(configs, records)
    results, interim = _mark_final(_rank_splits(measurements.results(members, records), kinds), members)
    return StudyTables(
        name=str(study.get("name", directory.name)),
        title=str(study.get("title") or study.get("name") or directory.name),
        held_fixed=dict(study.get("held_fixed") or {}),
        varies=tuple(study.get("varies") or ()),
        notes=tuple(study.get("notes") or ()),
        command=study.get("command"),
        slices=_slices(described, members),
        kinds=kinds,
        foreign=foreign,
        members=members,
        results=results,
        curves=measurements.curves(members, logs, tuple(kinds)),
        rewards=measurements.rewards(members, logs),
        sampling=measurements.sampling(members, records),
        load=measurements.load(members, records),
        interim=interim,
    )


def _config(path: epath.Path) -> dict[str, Any]:
    """A member's configuration; empty if it has not been started."""
    return read_json(path) if path.exists() else {}


def _described_slices(study: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the study says of its slices (title, x, note; all optional), the headline first."""
    described = dict(study.get("slices") or {})
    headline = study.get("headline")
    return {headline: described.get(headline, {}), **described} if headline else described


def _slices(described: Mapping[str, Any], members: pd.DataFrame) -> tuple[StudySlice, ...]:
    """The comparisons that the members at hand make."""
    names = [*described, *(name for slices in members.slices for name in slices)]
    slices = []
    for name in dict.fromkeys(names):
        rows = members[[name in slices for slices in members.slices]]
        if rows.empty:
            continue
        entry = described.get(name) or {}
        x = entry.get("x") or "total_parameters"
        if rows[x].isna().all():
            raise ReportError(f"slice {name!r} is to be drawn against {x!r}, which its members' configurations do not "
                              "have (or have several different values of; give a dotted key).")  # fmt: skip
        if not all(isinstance(value, int | float) for value in rows[x].dropna()):
            raise ReportError(f"slice {name!r} is to be drawn against {x!r}, which is not a number.")
        if slices and x != slices[0].x and rows[x].nunique() < 2:
            continue  # members that another slice lends to this one, of which nothing else was run
        ordered = rows.assign(_x=rows[x].astype(float)).sort_values(["_x", "total_parameters"], kind="stable")
        title = entry.get("title") or ("The family" if name == "main" else name.replace("_", " ").capitalize())
        slices.append(StudySlice(name, title, x, entry.get("note") or "", tuple(dict.fromkeys(ordered.arm))))
    return tuple(slices)


def _source_kinds(configs: Mapping[str, Any], records: Mapping[str, list[Record]]) -> dict[str, str]:
    """Kind of every source, from the members' configurations; the source's own name where they do not say."""
    kinds: dict[str, str] = {}
    for config in configs.values():
        for name, source in lookup(config, "data.sources", {}).items():
            kinds.setdefault(name, source.get("kind", name))
    for record in (record for own in records.values() for record in own):
        if measurements.source_of(record):
            kinds.setdefault(measurements.source_of(record), measurements.source_of(record))
    return kinds


def _identity(
    directory: epath.Path,
    entry: Mapping[str, Any],
    config: Mapping[str, Any],
    records: list[Record],
    wanted: tuple[str, ...],
) -> dict[str, Any]:
    """A member's name, size, settings and how far it has come."""
    last = max(records, key=lambda record: record["step"], default={})
    row = {"member": entry["name"], "arm": entry["arm"], "seed": entry["seed"],
           "slices": tuple(entry["slices"])}  # fmt: skip
    for name in wanted:
        values = (entry.get(name), _setting(config, name), last.get(name))
        row[name] = next((value for value in values if value is not None), None)
    started = bool(config) or bool(records)
    done = read_done(directory / entry["name"])
    finished = done is not None and same_configuration(entry, done)
    return {
        **row,
        "status": "finished" if finished else "unfinished" if started else "not started",
        "steps": lookup(config, "train.steps", entry.get("steps")),
        "step": last.get("step", 0),
        "tokens_seen": last.get("tokens", 0),
        "config_hash": last.get("config_hash", entry.get("config_hash")),
        "device": last.get("device"),
        "versions": ", ".join(f"{name.removeprefix('version_')} {value}" for name, value in last.items()
                              if name.startswith("version_")),
    }  # fmt: skip


def _setting(config: Mapping[str, Any], name: str) -> Any:
    """The value of a key, by dotted path or by its last part where that is unambiguous in the configuration."""
    if "." in name:
        return lookup(config, name, None)
    found: list[Any] = []

    def walk(section: Any) -> None:
        for key, value in section.items() if isinstance(section, Mapping) else ():
            if key == name and not isinstance(value, Mapping):
                found.append(value)
            walk(value)

    walk(config)
    return found[0] if found and all(value == found[0] for value in found) else None


def _rank_splits(results: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Adds the column `rank`."""
    ranks = {}
    for source, own in results.groupby("source"):
        primary = "train" if kinds.get(source) == "knowledge" else "test"
        splits = sorted(set(own.split), key=lambda split, primary=primary: (split != primary, split))
        ranks.update({(source, split): rank for rank, split in enumerate(splits)})
    return results.assign(rank=[ranks[place] for place in zip(results.source, results.split)])


def _mark_final(results: pd.DataFrame, members: pd.DataFrame) -> tuple[pd.DataFrame, int | None]:
    """Adds the column `final`: the rows that members are compared by.

    These are the last evaluations of finished members. While no member is finished they are those of the latest
    step that every evaluated member has reached, and that step is returned.
    """
    finished = set(members.loc[members.status == "finished", "member"]) & set(results.member)
    if finished:
        last = results.groupby("member").step.transform("max")
        return results.assign(final=results.member.isin(finished) & (results.step == last)), None
    shared = set.intersection(*(set(rows.step) for _, rows in results.groupby("member")))
    step = max(shared, default=-1)
    return results.assign(final=results.step == step), step
