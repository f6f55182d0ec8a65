"""Runs a study: every member trained, evaluated and recorded, from wherever that stopped.

The study's folder is the only state:

    study.json                      what the study is, with a summary of every member
    MEMBER/config.json              the member's complete configuration
    MEMBER/metrics.jsonl ...        written by `jaxmoe.training.train`
    MEMBER/records/*.json           what was measured
    MEMBER/status.json              what it is doing, how far it is, its last error
    MEMBER/DONE                     step, loss and configuration hash of a finished member
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from etils import epath

from jaxmoe.config import ConfigError, RunConfig, config_hash
from jaxmoe.evaluation import checkpoint_context, evaluate_all, named_numbers, reward_records
from jaxmoe.exclusive import HeldElsewhereError
from jaxmoe.post_training import GRPO, validation_rewards
from jaxmoe.processes import alone, is_first, of_first, together
from jaxmoe.run_files import RECORDS_DIRECTORY
from jaxmoe.scaling.alike import require_started_alike
from jaxmoe.scaling.heartbeat import Heartbeat, record_end
from jaxmoe.scaling.pending_records import PendingRecords
from jaxmoe.scaling.preflight import Resume, preflight
from jaxmoe.scaling.status import is_done, read_done
from jaxmoe.scaling.study import Member, Study
from jaxmoe.scaling.study_file import write_study_file
from jaxmoe.storage import as_path, is_remote, read_json, write_json
from jaxmoe.training import (
    DONE_FILE,
    BufferOverflowError,
    EvaluationContext,
    LossSpikeError,
    NonFiniteLossError,
    NoSpaceLeftError,
    PreTraining,
    ProgressReporter,
    StopRequest,
    TrainingError,
    TrainResult,
    Watchdog,
    train,
)
from jaxmoe.training.errors import explain_no_space

logger = logging.getLogger(__name__)

CACHE_DIRECTORY = "cache"


@dataclasses.dataclass(frozen=True)
class MemberResult:
    """How a member ended.

    Attributes:
      name: of the member.
      status: `done` now, `skipped` because it was done before, `resumable` after a signal, `failed`, or `pending`
        if its turn did not come.
      step, loss: where it stands, nats per token; None where that is not known.
      error: of a failed member.
      fatal: whether the others would fail in the same way, as on a full disk.
      mistake: whether it failed by a mistake of the user, so that trying again is no use.
    """

    name: str
    status: Literal["done", "skipped", "resumable", "failed", "pending"]
    step: int | None = None
    loss: float | None = None
    error: str | None = None
    fatal: bool = False
    mistake: bool = False


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """How a study ended: `status` and each member's result, in order."""

    members: tuple[MemberResult, ...]

    @property
    def status(self) -> Literal["done", "resumable", "failed"]:
        """`failed` if a member failed, else `resumable` if anything is left to do, else `done`."""
        statuses = {member.status for member in self.members}
        if "failed" in statuses:
            return "failed"
        return "resumable" if statuses & {"resumable", "pending"} else "done"

    @property
    def mistaken(self) -> bool:
        """Whether every member that failed did so by a mistake of the user."""
        failed = [member for member in self.members if member.status == "failed"]
        return bool(failed) and all(member.mistake for member in failed)

    def __str__(self) -> str:
        lines = []
        for member in self.members:
            details = [f"step {member.step}"] if member.step is not None else []
            details += [f"loss {member.loss:.4f}"] if member.loss is not None else []
            details += [member.error] if member.error else []
            lines.append(f"{member.name}: {member.status}" + (f" ({', '.join(details)})" if details else ""))
        return "\n".join(lines)


def run_study(
    study: Study,
    workdir: epath.PathLike,
    *,
    only: str | None = None,
    resume: Resume = "auto",
    strict_restore: bool = False,
    progress: ProgressReporter | None = None,
    command: str | None = None,
    stop: StopRequest | None = None,
) -> StudyResult:
    """Trains and evaluates the members of a study, one after the other. Called again, it goes on.

    Args:
      study: its members, in order.
      workdir: the study's folder, local or gs://.
      only: train this member alone.
      resume: `force` goes on in folders of another configuration, from the checkpoints that are there. A finished
        member stays what it was trained as: it may be evaluated otherwise, or trained for more steps.
      strict_restore: a damaged checkpoint ends its member with an error, instead of being set aside.
      progress: to report to; None makes one that writes to stderr.
      command: how a person would start this, for `study.json`.
      stop: asks to stop; None: SIGTERM and SIGINT do, while this call lasts.

    Returns:
      How each member ended. A member that fails does not keep the others from being trained; a full disk does.
      SIGTERM or SIGINT, whenever it comes, ends the study at the next point from which it can go on.

    Raises:
      HeldElsewhereError: another host has a member's folder.
      ConfigError: known before anything is trained, as that the processes that train it were not started alike.

    A watchdog is there from the beginning on: where nothing moves in any process while the study is checked, its data
    are made or a member is waited for, for `PATIENCE` times the members' longest `watchdog_minutes`, the process ends.
    """
    workdir = as_path(workdir)
    members = study.members if only is None else (study.member(only),)
    with contextlib.nullcontext(stop) if stop is not None else StopRequest() as stop:
        try:
            require_started_alike(workdir, members, only=only, resume=resume, strict_restore=strict_restore)
            with Watchdog(workdir, _watchdog_minutes(members)):
                return _run_members(study, members, workdir, resume, strict_restore, progress, command, stop)
        except ConfigError as error:
            if only is not None and is_first() and workdir.is_dir():
                record_end(workdir / only, "failed", str(error))
            raise


def _run_members(
    study: Study,
    members: Sequence[Member],
    workdir: epath.Path,
    resume: Resume,
    strict_restore: bool,
    progress: ProgressReporter | None,
    command: str | None,
    stop: StopRequest,
) -> StudyResult:
    """`run_study` until a stop is requested."""
    cache_dir = None if is_remote(workdir) else os.fspath(workdir / CACHE_DIRECTORY)
    with together():
        if is_first():  # the others find what it has tokenized
            preflight(study, members, workdir, resume=resume, cache_dir=cache_dir)
            write_study_file(study, workdir, command, for_one_member=len(members) < len(study.members))
    results: list[MemberResult] = []
    with _reporting(progress) as progress:
        finished = sum(member.config.train.steps for member in members if is_done(workdir / member.name, member))
        progress.study(sum(member.config.train.steps for member in members), finished)
        for member in members:
            stop.agree()
            if stop.requested is not None and not of_first(is_done(workdir / member.name, member)):
                logger.info("stopped by %s before %s; run again to go on", stop.requested, member.name)
                break
            result = _attempt(member, workdir, study.name, resume, strict_restore, progress, cache_dir, stop)
            results.append(result)
            if result.status == "skipped":
                progress.note(f"{member.name}: done before, skipped")
            elif result.status == "failed":
                progress.note(f"{member.name}: failed: {result.error}")
            if result.status == "resumable" or result.fatal:
                break
    waiting = [MemberResult(member.name, "pending") for member in members[len(results) :]]
    return StudyResult(tuple(results + waiting))


def run_member(
    member: Member,
    study_dir: epath.PathLike,
    *,
    study_name: str | None = None,
    resume: Resume = "auto",
    strict_restore: bool = False,
    progress: ProgressReporter | None = None,
    cache_dir: str | os.PathLike | None = None,
    stop: StopRequest | None = None,
) -> MemberResult:
    """Trains and evaluates one member; skips it if it is done.

    Args:
      member: of a study.
      study_dir: the study's folder; the member's is in it.
      study_name: for the records; None: the folder's name.
      resume, strict_restore, progress: as in `run_study`.
      cache_dir: where tokenized text is kept if the configuration does not say.
      stop: asks to stop; None: SIGTERM and SIGINT do, while this call trains.

    Raises:
      ConfigError: the member's folder is of another configuration; the message lists the differences.
      TrainingError: training cannot go on.
    """
    directory = epath.Path(study_dir) / member.name
    done = read_done(directory)
    if of_first(done is not None and done["config_hash"] == config_hash(member.config)):
        known = {} if done is None else {"step": done["step"], "loss": done["loss"]}
        return MemberResult(member.name, "skipped", **known)
    labels = {
        "study": epath.Path(study_dir).name if study_name is None else study_name,
        "arm": member.arm,
        "slices": ",".join(member.slices),
    }

    pending = PendingRecords(directory, config_hash(member.config))

    def evaluate(context: EvaluationContext) -> dict[str, float | None]:
        records = evaluate_all(context, labels)
        if context.run.grpo is not None:
            records += reward_records(context, validation_rewards(context), labels)
        if is_first():
            pending.add(records)
        return named_numbers(records)

    method = PreTraining if member.config.grpo is None else GRPO
    result = train(
        member.config, directory, on_evaluate=evaluate, before_checkpoint=pending.write, progress=progress,
        cache_dir=cache_dir, resume=resume, strict_restore=strict_restore, stop=stop, method=method,
    )  # fmt: skip
    if result.status == "resumable":
        return MemberResult(member.name, "resumable", result.step, result.loss)
    with explain_no_space(directory, lambda: result.step):
        return _completed(member, directory, result, evaluate, pending, cache_dir, stop)


def _completed(
    member: Member,
    directory: epath.Path,
    result: TrainResult,
    evaluate: Callable[[EvaluationContext], object],
    pending: PendingRecords,
    cache_dir: str | os.PathLike | None,
    stop: StopRequest | None,
) -> MemberResult:
    """What is left of a member once it is trained: the records of its last step, if they are not there, and DONE."""
    pending.write()
    if not of_first(_has_records(directory, member.config)):
        if stop is not None and stop.requested is not None:
            return MemberResult(member.name, "resumable", result.step, result.loss)
        context = checkpoint_context(member.config, directory, cache_dir=cache_dir)
        if context is not None:
            limit = member.config.train.watchdog_minutes
            with Watchdog(directory, limit) as watchdog, watchdog.patient(f"evaluating step {result.step}"):
                evaluate(context)
            pending.write()
    done = {
        "member": member.name,
        "step": result.step,
        "loss": result.loss,
        "config_hash": config_hash(member.config),
        **({} if result.resumed is None else result.resumed.fields()),
    }
    if is_first():
        write_json(directory / DONE_FILE, done)
    return MemberResult(member.name, "done", result.step, result.loss)


def _attempt(
    member: Member,
    workdir: epath.Path,
    study_name: str,
    resume: Resume,
    strict_restore: bool,
    progress: ProgressReporter,
    cache_dir: str | None,
    stop: StopRequest,
) -> MemberResult:
    """`run_member`, with what goes wrong as a result, and with signs of life in the member's folder."""
    writes = is_first() and not is_done(workdir / member.name, member)
    with Heartbeat(workdir / member.name, progress, stop, write=writes) as heartbeat:
        result = _outcome(member, workdir, study_name, resume, strict_restore, progress, cache_dir, stop)
        heartbeat.ended("preempted" if result.status == "resumable" else result.status, result.error)
    return result


def _outcome(
    member: Member,
    workdir: epath.Path,
    study_name: str,
    resume: Resume,
    strict_restore: bool,
    progress: ProgressReporter,
    cache_dir: str | None,
    stop: StopRequest,
) -> MemberResult:
    """`run_member`, with what goes wrong as a result."""
    try:
        return run_member(
            member, workdir, study_name=study_name, resume=resume, strict_restore=strict_restore, progress=progress,
            cache_dir=cache_dir, stop=stop,
        )  # fmt: skip
    except HeldElsewhereError:  # which is for a scheduler to try again
        raise
    except (ConfigError, NonFiniteLossError, LossSpikeError, BufferOverflowError) as error:  # of all processes
        return MemberResult(member.name, "failed", error=str(error), mistake=isinstance(error, ConfigError))
    except Exception as error:
        if not alone():
            raise  # the other processes are in the midst of a step, or of a checkpoint, and end with this one
        if isinstance(error, TrainingError):
            fatal = isinstance(error, NoSpaceLeftError)
            return MemberResult(member.name, "failed", error=str(error), fatal=fatal)
        logger.exception("%s failed", member.name)
        return MemberResult(member.name, "failed", error=f"{type(error).__name__}: {error}")


def _has_records(directory: epath.Path, run: RunConfig) -> bool:
    """Whether the last step was evaluated with this configuration."""
    folder = directory / RECORDS_DIRECTORY
    last = folder.glob(f"*-{run.train.steps:08d}.json") if folder.exists() else ()
    records = (read_json(path) for path in last)
    return any(
        record["config_hash"] == config_hash(run) for record in records if record["evaluation"] != "test_time"
    )


def _watchdog_minutes(members: Sequence[Member]) -> float | None:
    """Of the preparation, and of what lies between members: the longest that a member has."""
    minutes = [member.config.train.watchdog_minutes for member in members]
    return None if None in minutes else max(minutes)


@contextlib.contextmanager
def _reporting(progress: ProgressReporter | None) -> Iterator[ProgressReporter]:
    """The given reporter as it is, or one that is closed at the end."""
    if progress is not None:
        yield progress
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, ProgressReporter(None if is_first() else nowhere) as own:
        yield own
