"""Test-time compute of the members of a study: samples of each, and their records, from checkpoints that are there."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Literal

from etils import epath

from jaxmoe.config import ConfigError, MeshConfig, RunConfig, from_dict, to_dict
from jaxmoe.data import Source, load_tokenizer, require_vocabulary
from jaxmoe.data.build import build_source
from jaxmoe.evaluation import (
    identity_at,
    make_record,
    problems_of,
    sample_problems,
    samples_file,
    sampling_hash,
    sampling_numbers,
    write_test_time_record,
)
from jaxmoe.processes import alone
from jaxmoe.run_files import CONFIG_FILE
from jaxmoe.scaling.results import read_study
from jaxmoe.scaling.study import Member, Study
from jaxmoe.scaling.study_file import STUDY_FILE
from jaxmoe.sharding import make_partitioning, use_partitioning
from jaxmoe.storage import as_path, read_json
from jaxmoe.training import EvaluationStopped, StopRequest, read_parameters
from jaxmoe.training.workdir import describe_differences

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is sampled, how many of its problems are done, and of how many."""


@dataclasses.dataclass(frozen=True)
class SampledMember:
    """What became of a member.

    Attributes:
      name: of the member.
      status: `done`, `skipped` where its folder has no checkpoint yet, or `resumable` after a signal.
      step: of the checkpoint.
      records: that were written, one for each source and split.
    """

    name: str
    status: Literal["done", "skipped", "resumable"]
    step: int | None = None
    records: tuple[dict, ...] = ()


def sample_study(
    study: Study,
    workdir: epath.PathLike,
    *,
    only: str | None = None,
    mesh: MeshConfig | None = None,
    stop: StopRequest | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[SampledMember]:
    """Samples the members of a study from their newest checkpoints. Called again, it goes on, and skips what is done.

    The members' folders say what was trained; `study` says what is asked of them: the sources, of which only the
    sampled ones are read, and `evaluation.test_time`.

    Args:
      study: with members of the names that the folder has.
      workdir: the folder of the study that trained them, local or gs://.
      only: this member alone.
      mesh: the devices; None spreads the parameters over all there are.
      stop: asks to stop, after the batch in flight; None: SIGTERM and SIGINT do, while this call lasts.
      progress: see `Progress`.

    Raises:
      ConfigError: no member has a checkpoint (or `only` has none), a folder has another model, or a source has no
        problems to sample.
      CheckpointError: a checkpoint that cannot be read.
    """
    if not alone():
        raise ConfigError("test-time compute takes one process, with all of its devices.")
    workdir = as_path(workdir)
    members = study.members if only is None else (study.member(only),)
    trained = [member for member in members if (workdir / member.name / CONFIG_FILE).exists()]
    if not trained:
        names = ", ".join(member.name for member in members[:4]) + (", ..." if len(members) > 4 else "")
        raise ConfigError(
            f"{workdir} has no trained member of {study.name!r} ({names}); give the --workdir that `python -m "
            "experiments.run` wrote to."
        )
    if stop is None:
        with StopRequest() as stop:
            return _sample_members(study, members, workdir, mesh, stop, progress)
    return _sample_members(study, members, workdir, mesh, stop, progress)


def _sample_members(
    study: Study,
    members: Sequence[Member],
    workdir: epath.Path,
    mesh: MeshConfig | None,
    stop: StopRequest,
    progress: Progress,
) -> list[SampledMember]:
    name = str(read_study(workdir).get("name", study.name)) if (workdir / STUDY_FILE).exists() else study.name
    results = []
    for member in members:
        directory = workdir / member.name
        if not (directory / CONFIG_FILE).exists():
            results.append(SampledMember(member.name, "skipped"))
            continue
        labels = {"study": name, "arm": member.arm, "slices": ",".join(member.slices)}
        result = sample_member(member.config, directory, labels=labels, mesh=mesh, stop=stop, progress=progress)
        results.append(dataclasses.replace(result, name=member.name))
        if result.status == "resumable":
            break
    return results


def sample_member(
    asked: RunConfig,
    directory: epath.PathLike,
    *,
    labels: dict[str, str] | None = None,
    mesh: MeshConfig | None = None,
    stop: StopRequest | None = None,
    progress: Progress = lambda what, done, total: None,
) -> SampledMember:
    """Samples one run directory; see `sample_study`.

    Args:
      asked: its sources, tokenizer and `evaluation.test_time` are used; its model must be that of the folder.
      directory: of the run.
      labels: `study`, `arm` and `slices` of the records.
      mesh, stop, progress: as in `sample_study`.
    """
    directory, settings = as_path(directory), asked.evaluation.test_time
    run = from_dict(RunConfig, read_json(directory / CONFIG_FILE))
    if run.model != asked.model:
        differences = describe_differences({"model": to_dict(run.model)}, {"model": to_dict(asked.model)})
        raise ConfigError(f"{directory} is of another model than the configuration:\n{differences}")
    tokenizer = load_tokenizer(asked.data.tokenizer)
    require_vocabulary(tokenizer, run.model.vocab_size)
    asked_for = [
        problems_of(source, split, settings)
        for source, splits in _sources(asked, tokenizer)
        for split in splits
    ]
    step, model = read_parameters(run, directory, mesh)
    if step < run.train.steps:
        logger.warning("%s: sampled at step %d of %d, its newest checkpoint", directory.name, step, run.train.steps)
    records = []

    def check_stop() -> None:
        if stop is not None and stop.requested is not None:
            raise EvaluationStopped

    for problems in asked_for:
        made_by = sampling_hash(run, problems, settings)
        what = f"{directory.name}: {problems.source} ({problems.split})"
        described = {"member": run.name, "trained_steps": step, "sampling_hash": made_by}
        try:
            with use_partitioning(make_partitioning(mesh or MeshConfig())):
                votes = sample_problems(
                    model, tokenizer, problems, settings, samples_file(directory, problems, step, made_by),
                    describes=described, check_stop=check_stop,
                    progress=lambda done, total, what=what: progress(what, done, total),
                )  # fmt: skip
        except EvaluationStopped:
            return SampledMember(run.name, "resumable", step, tuple(records))
        counted = [one for one in votes if one is not None]
        if not counted:
            raise ConfigError(
                f"{what}: no prompt leaves room for an answer of {settings.max_new_tokens} tokens (or half of "
                f"model.max_sequence_length={run.model.max_sequence_length}); take fewer shots, or shorter answers."
            )
        if len(counted) < len(votes):
            left_out = len(votes) - len(counted)
            logger.warning("%s: %d prompts leave no room for an answer and are left out", what, left_out)
        numbers = {
            **sampling_numbers(counted),
            "skipped": len(votes) - len(counted),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_new_tokens": settings.max_new_tokens,
            "shots": settings.shots,
            "sampling_seed": settings.seed,
            "sampling_hash": made_by,
            "dropped_fraction": 0.0,
        }
        identity = {
            **identity_at(run, step, labels),
            "evaluation": "test_time", "source": problems.source, "split": problems.split,
        }  # fmt: skip
        record = make_record(identity, numbers)
        write_test_time_record(directory, record)
        records.append(record)
    return SampledMember(run.name, "done", step, tuple(records))


def _sources(asked: RunConfig, tokenizer) -> list[tuple[Source, tuple[str, ...]]]:
    """The sources that are sampled, and the splits of each that it has; no other is read."""
    settings, names = asked.evaluation.test_time, _names(asked)
    if not names:
        raise ConfigError(
            f"no source of data.sources has problems to answer ({', '.join(asked.data.sources)}); add a "
            "question_answer source."
        )
    chosen = []
    for name in names:
        config = asked.data.sources[name]
        if config.kind in ("text", "tokens"):
            raise ConfigError(
                f"evaluation.test_time.sources: {name!r} is of kind {config.kind!r}, which has no problems to answer; "
                "name question_answer, reasoning or knowledge sources."
            )
        source = build_source(
            name, config, tokenizer, sequence_length=asked.train.sequence_length, run_seed=asked.seed,
            index=list(asked.data.sources).index(name),
        )  # fmt: skip
        splits = tuple(split for split in settings.splits if source.example_count(split))
        if not splits and settings.sources:
            splits = settings.splits  # `problems_of` says what it has
        chosen.append((source, splits))
    if not any(splits for _, splits in chosen):
        raise ConfigError(f"none of {', '.join(names)} has problems in the split {' or '.join(settings.splits)}.")
    return chosen


def _names(asked: RunConfig) -> Sequence[str]:
    """Of the sources that are sampled: those asked for, else all that have problems."""
    sources = asked.data.sources.items()
    return asked.evaluation.test_time.sources or [
        name for name, source in sources if source.kind not in ("text", "tokens")
    ]


def describe_sampling(members: Sequence[Member]) -> list[dict[str, object]]:
    """What sampling each member asks of it, as plain JSON values; needs neither data nor a device.

    Returns:
      For each member the settings, and for one problem at most `tokens_per_problem` written and
      `flops_per_problem`: two for each active parameter and token, attention and the prompt not counted.
    """
    from jaxmoe import accounting

    described = []
    for member in members:
        settings, model = member.config.evaluation.test_time, member.config.model
        tokens = settings.samples * min(settings.max_new_tokens, max(1, model.max_sequence_length // 2))
        described.append({
            "name": member.name,
            **to_dict(settings),
            "sources": list(_names(member.config)),
            "tokens_per_problem": tokens,
            "flops_per_problem": 2 * accounting.parameter_count(model).active * tokens,
        })  # fmt: skip
    return described
