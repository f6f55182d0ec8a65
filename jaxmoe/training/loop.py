"""The training loop: steps, logs, evaluations and checkpoints of one run, from wherever it stopped."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Literal, NoReturn

import jax
from etils import epath

from jaxmoe.config import ConfigError, RunConfig, config_hash
from jaxmoe.data import Mixture
from jaxmoe.exclusive import exclusive
from jaxmoe.processes import is_first, together
from jaxmoe.run_files import CHECKPOINT_DIRECTORY
from jaxmoe.sharding import Partitioning, partitioning_of_run, rows_here
from jaxmoe.training.allocator import reuse_freed_memory
from jaxmoe.training.bad_steps import is_bad, judge_bad_step
from jaxmoe.training.checkpoints import Checkpoints, Storage
from jaxmoe.training.context import EvaluationContext, Resumed, averaging_window, evaluation_context
from jaxmoe.training.errors import EvaluationStopped, TrainingError, explain_no_space
from jaxmoe.training.method import MakeMethod, Method, PreTraining, StepStoppedError
from jaxmoe.training.metrics import MetricsLog, NoLog, Throughput, plain_number
from jaxmoe.training.policies import Retention, SaveSchedule, quality
from jaxmoe.training.progress import ProgressReporter
from jaxmoe.training.signals import StopRequest
from jaxmoe.training.start import started_state
from jaxmoe.training.state import abstract_state, init_state
from jaxmoe.training.step import Metrics, parameter_norm
from jaxmoe.training.watchdog import Watchdog
from jaxmoe.training.workdir import Resume, check_contents, check_directory, claim_directory, training_hash

logger = logging.getLogger(__name__)

Evaluator = Callable[[EvaluationContext], Mapping[str, float | None] | None]
"""Evaluates a model in training; returns what it measured by name, for `train.best_metric`, or None."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
      status: `done`, or `resumable` if a signal ended it.
      step: steps done.
      loss: of the last step, nats per token; None if it was not finite or no step was done.
      resumed: that the run was forced to go on with another configuration or other data; None if it never was.
    """

    status: Literal["done", "resumable"]
    step: int
    loss: float | None
    resumed: Resumed | None = None


def train(
    run: RunConfig,
    directory: epath.PathLike,
    *,
    on_evaluate: Evaluator | None = None,
    before_checkpoint: Callable[[int], None] | None = None,
    progress: ProgressReporter | None = None,
    cache_dir: str | os.PathLike | None = None,
    resume: Resume = "auto",
    strict_restore: bool = False,
    stop: StopRequest | None = None,
    method: MakeMethod = PreTraining,
) -> TrainResult:
    """Trains a run to its end, going on after the newest checkpoint in its directory if there is one.

    The directory gets config.json, metrics.jsonl, throughput.jsonl, tensorboard/ and checkpoints/. metrics.jsonl
    depends on the configuration and the machine alone: a run that was killed at any moment and started again
    writes the same bytes as one that was not.

    Args:
      run: the configuration.
      directory: of the run, local or gs://.
      on_evaluate: called after each of the steps `run.evaluation.steps_of(steps)`. Its results must not matter to
        the training, and it must bear being called again for the same step, which happens after a kill. A long one
        calls the context's `check_stop` now and then, so that a signal need not wait for its end.
      before_checkpoint: called with its step before a checkpoint is written and before every further attempt, in a
        thread of its own. What it raises is a failure of the checkpoint, which is tried again or missed if storage is
        at fault.
      progress: to report to.
      cache_dir: where tokenized text is kept if the configuration does not say.
      resume: `force` goes on in a directory of another configuration, or with data that changed since its checkpoint,
        unless that run is finished and was trained as something else; config.json is replaced once the checkpoint
        is known to fit.
      strict_restore: a damaged checkpoint is an error, instead of being set aside for the one before it.
      stop: asks the run to stop; None: SIGTERM and SIGINT do, while this call lasts.
      method: what its steps are; `jaxmoe.post_training.GRPO` for a run with the section `grpo`.

    Raises:
      ConfigError: the configuration cannot be run, or not in this directory, or not with the data as they are now;
        another process is training in the directory; `run.start_from` has no checkpoint.
      TrainingError: storage that stays full or away, no readable checkpoint, too many non-finite steps in a row, or a
        loss spike if the configuration stops at one.

    Where nothing moves for `run.train.watchdog_minutes`, the process ends; see `jaxmoe.training.watchdog`.
    """
    directory = epath.Path(directory)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(directory, run.train.watchdog_minutes))
        with together():
            partitioning = partitioning_of_run(run)
            check_directory(directory, run, resume)
            rows = None if partitioning is None else rows_here(partitioning, run.train.batch_size)
            mixture = Mixture.of_run(run, rows=rows, cache_dir=cache_dir)
        if jax.default_backend() == "cpu":
            stack.enter_context(reuse_freed_memory())
        if stop is None:
            stop = stack.enter_context(StopRequest())
        with together():
            if is_first():
                stack.enter_context(exclusive(directory))
        retention, storage = Retention.of(run.train), Storage.of(run.train)
        checkpoints = stack.enter_context(Checkpoints(directory / CHECKPOINT_DIRECTORY, retention, storage))
        stack.enter_context(explain_no_space(directory, lambda: checkpoints.last_step))
        loop = _Loop(
            run, directory, mixture, partitioning, checkpoints, resume, strict_restore, stop, watchdog, on_evaluate,
            before_checkpoint, progress, method(run, mixture, partitioning, stop),
        )  # fmt: skip
        return loop.run_to_end()


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """A step that was started and whose numbers were not looked at yet."""

    step: int
    metrics: Metrics
    stop: jax.Array | None


class _Loop:
    """One session of a run. Steps are started ahead of looking at their numbers, as many as the method allows."""

    def __init__(
        self,
        run: RunConfig,
        directory: epath.Path,
        mixture: Mixture,
        partitioning: Partitioning | None,
        checkpoints: Checkpoints,
        resume: Resume,
        strict_restore: bool,
        stop: StopRequest,
        watchdog: Watchdog,
        on_evaluate: Evaluator | None,
        before_checkpoint: Callable[[int], None] | None,
        progress: ProgressReporter | None,
        method: Method,
    ):
        self._run, self._directory, self._mixture = run, directory, mixture
        self._checkpoints, self._stop, self._watchdog = checkpoints, stop, watchdog
        self._on_evaluate, self._before_checkpoint, self._progress = on_evaluate, before_checkpoint, progress
        self._method = method
        self._source_names, self._contents = mixture.source_names, mixture.contents()
        self._partitioning = partitioning
        self._step, self._loss, self._resumed, self._quality, self._start_step = 0, None, None, None, None
        evaluated = not method.evaluates_start
        self._graphdef, like = abstract_state(run, partitioning)
        restored = checkpoints.restore(like, strict=strict_restore)
        if restored is None and run.start_from is not None:
            self._start_step, self._state = started_state(run, partitioning)
            logger.info("%s starts from %s, step %d", run.name, run.start_from, self._start_step)
        elif restored is None:
            _, self._state = init_state(run, partitioning)
        else:
            self._state, self._step = restored.state, restored.step
            self._loss, evaluated = restored.metadata["loss"], restored.metadata["evaluated"]
            self._start_step = restored.metadata.get("start_step")
            found = restored.metadata["data"].get("contents")
            with together():
                self._check_resumable()
                check_directory(directory, run, resume, step=self._step)
                check_contents(directory, run, found, self._contents, self._step, resume)
            self._resumed = Resumed.of_checkpoint(run, self._step, restored.metadata, mixture)
        if self._resumed is not None:
            logger.warning("%s: %s", run.name, self._resumed)
        if is_first():
            claim_directory(directory, run)
        self._stop.agree()
        self._evaluation_due = not evaluated
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._throughput = Throughput(method.flops_per_token, method.tokens_per_step)
        self._log = MetricsLog(directory, self._step, self._source_names) if is_first() else NoLog()

    def run_to_end(self) -> TrainResult:
        """Trains, evaluates and saves until the run is done or a signal asks to stop."""
        train = self._run.train
        if self._progress is not None:
            self._progress.member(self._run.name, train.steps, self._step)
        try:
            if self._evaluation_due and self._stop.requested is None:
                self._evaluate()
            if self._step < train.steps and self._stop.requested is None:
                self._train_on()
            with self._watchdog.patient("finishing the last checkpoint"):
                self._checkpoints.wait()
        finally:
            self._log.close()
        status = "done" if self._step == train.steps and not self._evaluation_due else "resumable"
        if status == "resumable":
            by = self._stop.requested
            logger.info("%s: stopped by %s after step %d; run again to go on", self._run.name, by, self._step)
        return TrainResult(status=status, step=self._step, loss=self._loss, resumed=self._resumed)

    def _train_on(self) -> None:
        run, steps = self._run, self._run.train.steps
        evaluations = frozenset(run.evaluation.steps_of(steps))
        window = averaging_window(run.train, len(evaluations))
        window_starts = {step - window for step in evaluations}
        schedule = SaveSchedule(run.train, evaluations)
        self._method.begin(self._step, self._start_step)
        try:
            while self._step < steps:
                if self._step in window_starts:
                    self._state = dataclasses.replace(self._state, recent=self._state.recent.cleared())
                try:
                    self._state, metrics = self._method.step(self._state)
                except StepStoppedError:
                    self._save(required=True)
                    break
                self._step += 1
                if self._is_logged(self._step):
                    metrics = metrics | {"param_norm": parameter_norm(self._state.params)}
                self._in_flight.append(_InFlight(self._step, metrics, self._stop.ask()))
                self._observe(self._method.steps_in_flight)
                self._checkpoints.raise_if_failed()
                self._evaluation_due, self._quality = self._step in evaluations, None
                if self._evaluation_due and self._stop.requested is None:
                    self._evaluate()
                stopping = self._stop.requested is not None
                if schedule.due(self._step) or stopping:
                    self._save(required=stopping or self._step == steps)
                if stopping:
                    break
        finally:
            self._method.end()

    def _is_logged(self, step: int) -> bool:
        return step % self._run.train.log_every == 0 or step == self._run.train.steps

    def _observe(self, leave: int) -> None:
        """Looks at the numbers of the oldest steps in flight until `leave` are left, waiting for them."""
        while len(self._in_flight) > leave:
            oldest = self._in_flight.popleft()
            jax.block_until_ready(oldest.metrics)
            self._watchdog.step(oldest.step)
            self._throughput.observe(time.perf_counter(), int(oldest.metrics["tokens"]))
            self._stop.learn(oldest.stop)
            bad = is_bad(oldest.metrics)
            failure = judge_bad_step(self._run, oldest.step, oldest.metrics) if bad else None
            self._loss = plain_number(oldest.metrics["loss"])
            if self._progress is not None:
                self._progress.advance(oldest.step, self._loss, self._throughput.tokens_per_second)
            if bad or self._is_logged(oldest.step):
                self._log.write(oldest.step, jax.device_get(oldest.metrics), self._throughput.line(oldest.step))
            if failure is not None:
                self._fail(failure, oldest.step - int(oldest.metrics["skipped_in_a_row"]))

    def _fail(self, failure: Callable[[str], TrainingError], applied: int) -> NoReturn:
        """Ends the run, whose last step that changed anything was `applied`, and names the last good checkpoint."""
        self._checkpoints.wait()
        last = self._checkpoints.last_step
        which = "There is no checkpoint yet" if last is None else f"The last good checkpoint is of step {last}"
        if last is not None and last > applied and self._run.grpo is None:  # whose steps may be skipped in part
            which += f" (the parameters are those after step {applied})"
        raise failure(f"{which} in {self._checkpoints.directory}.")

    def _evaluate(self) -> None:
        """Calls the evaluator with the state after the step just done, which may end early to stop the run."""
        self._settle()
        if self._on_evaluate is not None:
            context = evaluation_context(
                self._run, self._directory, self._graphdef, self._state, self._mixture, self._resumed, self._stop,
                self._partitioning,
            )  # fmt: skip
            try:
                with self._watchdog.patient(f"evaluating step {self._step}"):
                    measured = self._on_evaluate(context)
            except EvaluationStopped:
                return  # it stays due
            self._quality = quality(self._run.train, context.training_loss, measured)
        self._evaluation_due = False

    def _save(self, *, required: bool) -> None:
        """Starts a checkpoint; everything logged so far is in storage before it can be complete."""
        self._settle()
        run = self._run
        rows = self._step * run.train.batch_size
        accounts = self._mixture.accounting(self._step).values()
        metadata = {
            "name": run.name,
            "config_hash": config_hash(run),
            "training_hash": training_hash(run),
            "resumed": None if self._resumed is None else dataclasses.asdict(self._resumed),
            "loss": self._loss,
            "evaluated": not self._evaluation_due,
            **({} if self._start_step is None else {"started_from": run.start_from, "start_step": self._start_step}),
            "data": {"iterator": self._method.position(), "step": self._step, "rows": rows, "contents": self._contents},
            "sources": {account.name: {"rows": account.rows, "tokens": account.tokens} for account in accounts},
        }
        with self._watchdog.patient(f"saving step {self._step}"):
            self._checkpoints.save(
                self._step, self._state, metadata, quality=self._quality, required=required,
                first=functools.partial(self._store_the_rest, self._step),
            )

    def _store_the_rest(self, step: int) -> None:
        """What must be in storage before the checkpoint of a step can be complete."""
        self._log.flush()
        if self._before_checkpoint is not None:
            self._before_checkpoint(step)

    def _settle(self) -> None:
        """Waits for every step in flight."""
        self._observe(leave=0)
        self._throughput.pause()

    def _check_resumable(self) -> None:
        if self._step > self._run.train.steps:
            raise ConfigError(
                f"train.steps={self._run.train.steps}, but the newest checkpoint in {self._checkpoints.directory} is "
                f"of step {self._step}; give more steps, or take another folder."
            )
