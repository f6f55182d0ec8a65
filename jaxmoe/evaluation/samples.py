"""Sampling a source's problems into a file that can be gone on with, and the record of what the samples are worth.

    MEMBER/samples/SOURCE-SPLIT-STEP-HASH.jsonl

The first line says how the samples are made; each other line is one problem with all of its samples, and its place in
the file as `step`. The hash is of the settings, of the training, and of the problems: other settings make another file,
and none is ever replaced.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from jaxmoe.config import ConfigError, QuestionAnswerSource, RunConfig, TestTimeConfig, config_hash, to_dict
from jaxmoe.data import Example, Source, Tokenizer
from jaxmoe.data.answers import AnswerFormat, extract_answer
from jaxmoe.data.seeding import generator
from jaxmoe.evaluation.generation import Generated, sample_answers, true_answer
from jaxmoe.evaluation.records import EARLIER_RECORDS_DIRECTORY, RECORDS_DIRECTORY, Record, record_file, write_record
from jaxmoe.evaluation.test_time import Votes
from jaxmoe.exclusive import exclusive
from jaxmoe.models import Decoder
from jaxmoe.storage import read_json
from jaxmoe.training.metrics import JsonLines
from jaxmoe.training.workdir import training_hash

logger = logging.getLogger(__name__)

SAMPLES_DIRECTORY = "samples"

SAMPLES_FORMAT = 2
"""Of the files' lines: since 2 they have `tokens`."""

_SECONDS_BETWEEN_UPLOADS = 60.0
"""An object store takes whole files only, so that it gets one now and then."""


@dataclasses.dataclass(frozen=True)
class Problems:
    """What is sampled of a source.

    Attributes:
      source, split: where the problems are from.
      prompts: as the model reads them, worked examples included.
      truths: what a right answer equals.
      answer_format: how an answer is read: that of a question_answer source; everywhere else the whole text.
      stops: texts before which an answer is cut.
    """

    source: str
    split: str
    prompts: tuple[str, ...]
    truths: tuple[str | None, ...]
    answer_format: AnswerFormat
    stops: tuple[str, ...]


def problems_of(source: Source, split: str, settings: TestTimeConfig) -> Problems:
    """The problems of a split with their worked examples.

    Args:
      source: with examples.
      split: of it.
      settings: how many problems and worked examples, and the seed.

    Raises:
      ConfigError: the split has no problems, or worked examples are asked for where there are none.
    """
    examples = source.examples(split, settings.problems, settings.seed)
    if not examples:
        raise ConfigError(
            f"source {source.name!r} has no problems in its {split} split; it has "
            f"{', '.join(name for name in settings.SPLITS if source.example_count(name)) or 'none at all'}."
        )
    questions = isinstance(source.config, QuestionAnswerSource)
    answer_format: AnswerFormat = source.config.answer_format if questions else "exact"
    before = [""] * len(examples)
    if settings.shots:
        before = _worked_examples(source, split, examples, settings)
    return Problems(
        source=source.name,
        split=split,
        prompts=tuple(shots + example.prompt for shots, example in zip(before, examples, strict=True)),
        truths=tuple(true_answer(example, answer_format) for example in examples),
        answer_format=answer_format,
        stops=settings.stops if questions else (),
    )


def _worked_examples(
    source: Source, split: str, examples: Sequence[Example], settings: TestTimeConfig
) -> list[str]:
    """For each problem `shots` training examples and a blank line after each; never the problem itself."""
    if not isinstance(source.config, QuestionAnswerSource):
        raise ConfigError(
            f"evaluation.test_time.shots={settings.shots}, but source {source.name!r} is of kind "
            f"{source.config.kind!r}; only question_answer prompts take worked examples."
        )
    training = source.examples("train")
    if len(training) <= settings.shots:
        raise ConfigError(
            f"evaluation.test_time.shots={settings.shots}, but source {source.name!r} has {len(training)} training "
            "examples to draw them from; give train_paths with more, or shots=0."
        )
    texts = []
    for number, example in enumerate(examples):
        drawn = generator(settings.seed, "shots", split, number).permutation(len(training))[: settings.shots + 1]
        shots = [training[i] for i in drawn if training[i].prompt != example.prompt][: settings.shots]
        texts.append("".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots))
    return texts


def sampling_hash(run: RunConfig, problems: Problems, settings: TestTimeConfig) -> str:
    """Hash of what the samples of a checkpoint's step depend on.

    Args:
      run: whose checkpoint is sampled.
      problems: that are sampled.
      settings: how.
    """
    drawn = ("samples", "temperature", "top_p", "max_new_tokens", "seed")
    return config_hash({
        "format": SAMPLES_FORMAT,
        "training": training_hash(run),
        "problems": {field.name: getattr(problems, field.name) for field in dataclasses.fields(problems)},
        "settings": {name: getattr(settings, name) for name in drawn},
    })  # fmt: skip


def samples_file(directory: epath.PathLike, problems: Problems, step: int, made_by: str) -> epath.Path:
    """The file of a run's samples; `made_by` is of `sampling_hash`."""
    name = f"{urllib.parse.quote(problems.source, safe='')}-{problems.split}-{step:08d}-{made_by}.jsonl"
    return epath.Path(directory) / SAMPLES_DIRECTORY / name


def sample_problems(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Problems,
    settings: TestTimeConfig,
    path: epath.PathLike,
    *,
    describes: Mapping[str, Any] | None = None,
    check_stop: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Votes | None]:
    """Samples every problem that the file does not have, and returns what all samples say.

    A file that was stopped at any time and gone on with has the bytes of one that was not. One process samples, with
    all of its devices.

    Args:
      model: decodes without capacity limits; under `use_partitioning` it is spread over the mesh.
      tokenizer: the model's.
      problems: of `problems_of`.
      settings: how to sample.
      path: of the file, local or gs://, of these settings.
      describes: put into its first line.
      check_stop: called before each batch; may raise, and nothing is lost but the problems in flight.
      progress: called with problems done and their number.

    Returns:
      For each problem its votes; None where the prompt left no room for an answer.

    Raises:
      ConfigError: the file is of other settings or broken, or another process writes there.
      OSError: the file cannot be written.
    """
    path = epath.Path(path)
    total = len(problems.prompts)
    header = {"step": -1, "settings": to_dict(settings), **(describes or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent, "sampling"):
        lines = JsonLines(path, keep_until=total)  # cuts what a kill left unfinished
        try:
            found = _read(path, total)
            if not path.exists() or not path.stat().length:
                lines.write(header)
            return _sample(model, tokenizer, problems, settings, found, lines, check_stop, progress)
        finally:
            lines.close()


def _sample(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Problems,
    settings: TestTimeConfig,
    found: dict[int, dict[str, Any]],
    lines: JsonLines,
    check_stop: Callable[[], None],
    progress: Callable[[int, int], None],
) -> list[Votes | None]:
    total, uploaded = len(problems.prompts), time.monotonic()
    progress(len(found), total)
    batches = sample_answers(
        model, problems.prompts, tokenizer,
        samples=settings.samples, temperature=settings.temperature, top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens, stops=problems.stops, batch_size=settings.batch_size,
        seed=settings.seed, done=set(found), check_stop=check_stop,
    )  # fmt: skip
    for batch in batches:
        for number, generated in batch.items():
            line = _line(number, generated, problems)
            found[number] = line
            lines.write({"step": len(found) - 1, **line})
        if not lines.remote or time.monotonic() - uploaded > _SECONDS_BETWEEN_UPLOADS:
            lines.flush()
            uploaded = time.monotonic()
        progress(len(found), total)
    lines.flush()
    return [_votes(found[number], problems) for number in range(total)]


def _line(number: int, generated: Sequence[Generated] | None, problems: Problems) -> dict[str, Any]:
    """A problem as it is written."""
    line: dict[str, Any] = {"problem": number, "prompt": problems.prompts[number], "truth": problems.truths[number]}
    if generated is None:
        return {**line, "samples": None}
    return {
        **line,
        "answers": [extract_answer(one.text, problems.answer_format) for one in generated],
        "finished": [one.finished for one in generated],
        "tokens": [one.tokens for one in generated],
        "samples": [one.text for one in generated],
    }


def _votes(line: Mapping[str, Any], problems: Problems) -> Votes | None:
    if line["samples"] is None:
        return None
    return Votes(tuple(line["answers"]), problems.truths[line["problem"]], tuple(line["tokens"]))


def _read(path: epath.Path, total: int) -> dict[int, dict[str, Any]]:
    """The problems of a file, by their number."""
    found: dict[int, dict[str, Any]] = {}
    content = path.read_bytes().decode() if path.exists() else ""
    for place, text in enumerate(content.split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
            if line.pop("step") >= 0:
                found[int(line["problem"])] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {place} is broken ({error}); delete it, and it is made anew.") from error
    if any(number not in range(total) for number in found):
        raise ConfigError(f"{path} has problems that are not among the {total} of now; delete it, and it is made anew.")
    return found


def write_test_time_record(directory: epath.PathLike, record: Record) -> epath.Path:
    """Writes a record of `test_time`; one of other settings that is there goes to `earlier_records/HASH/`.

    Args:
      directory: of the run.
      record: with `sampling_hash`.
    """
    directory = epath.Path(directory)
    path = directory / RECORDS_DIRECTORY / record_file(record)
    if path.exists():
        before = str(read_json(path).get("sampling_hash", "unknown"))
        if before != record["sampling_hash"]:
            aside = directory / EARLIER_RECORDS_DIRECTORY / before
            aside.mkdir(parents=True, exist_ok=True)
            path.replace(aside / path.name)
    return write_record(directory, record)
