"""One run: how it is trained and evaluated, and `RunConfig`, which is everything that it depends on.

B batch, S sequence.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from jaxmoe.config.data import DataConfig
from jaxmoe.config.errors import (
    nearest,
    require,
    require_declared,
    require_non_negative,
    require_positive,
    require_positive_or_none,
)
from jaxmoe.config.grpo import GRPOConfig, check_grpo
from jaxmoe.config.mesh import MeshConfig
from jaxmoe.config.model import ModelConfig
from jaxmoe.config.values import IF_GIVEN, NOT_IDENTITY

_LONGEST_SPIKE_WINDOW = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in what batches, with which optimizer. Defaults are the paper's where it states one.

    Attributes:
      steps: optimizer steps.
      batch_size: B, sequences per step over all devices.
      sequence_length: S, tokens predicted per row.
      gradient_accumulation: micro-batches per step; numbers do not depend on it, so it cannot be combined with a
        `capacity_factor`, which would limit each micro-batch.
      learning_rate: peak of AdamW's.
      schedule: `warmup_cosine`, `warmup_stable_decay` (linear decay over the last `decay_fraction`), or
        `constant` (after warm-up).
      warmup_steps: linear from 0.
      final_learning_rate_fraction: where the decay ends, relative to the peak.
      decay_fraction: share of the steps that `warmup_stable_decay` decays over.
      beta1, beta2, epsilon, weight_decay: AdamW; decay is decoupled, times the learning rate, on matrices only.
      clip_norm: of the global gradient; None does not clip.
      log_every: steps between lines of metrics.jsonl; a step that was left out or is a spike has its line too.
      checkpoint_every: steps between checkpoints; None: ten per run. The last step is always saved.
      checkpoint_every_minutes: also save when the last checkpoint is so many minutes old; None: no.
      keep_checkpoints: how many of the newest stay.
      keep_every: checkpoints of a multiple of this many steps stay, too; None: none for that.
      keep_best: and so many of the best by `best_metric`. Every evaluation is then followed by a checkpoint.
      best_metric: `training_loss`, the mean that an evaluation reports, or a number of a record as
        `EVALUATION/SOURCE/SPLIT/FIELD`, such as `task/reasoning/test/accuracy`.
      best_mode: whether the smallest or the largest is best.
      checkpoint_ocdbt: many arrays in few files (TensorStore's OCDBT); else a folder for each array.
      checkpoint_zarr3: version 3 of the zarr format; else 2.
      checkpoint_chunk_bytes: arrays are stored in chunks of at most this size, the least that is read at a time.
      max_missed_saves: so many checkpoints in a row may be missed, because storage is full or does not answer, before
        the run stops.
      storage_patience_seconds: how long training waits for storage, at a checkpoint for the one before it and at the
        end for the last one.
      max_nonfinite_steps: this many skipped steps in a row stop the run.
      spike_action: what to do about a step whose loss is above the median of the last `spike_window` finite losses
        by more than `spike_factor` times their median absolute deviation. `warn` says so; `skip` leaves the step
        out, as one that is not finite; `stop` ends the run before the step is applied. `off` does not look.
      spike_window: finite losses that a step is compared with; it is not before there are so many.
      spike_factor: 10 is 6.7 standard deviations of a normal distribution.
      watchdog_minutes: a run in which no step ends for so long is taken to hang: the stacks of all threads are
        written down and the process ends with status 75, for a scheduler to start it again. Three times as long where
        XLA may be compiling, storage is waited for, or a study is prepared. None waits for ever.
    """

    steps: int
    batch_size: int
    sequence_length: int
    gradient_accumulation: int = 1
    learning_rate: float = 4e-4
    schedule: Literal["warmup_cosine", "warmup_stable_decay", "constant"] = "warmup_cosine"
    warmup_steps: int = 0
    final_learning_rate_fraction: float = 0.1
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    log_every: int = 10
    checkpoint_every: int | None = None
    checkpoint_every_minutes: float | None = None
    keep_checkpoints: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str = "training_loss"
    best_mode: Literal["min", "max"] = "min"
    checkpoint_ocdbt: bool = True
    checkpoint_zarr3: bool = True
    checkpoint_chunk_bytes: int = 16 * 2**20
    max_missed_saves: int = 3
    storage_patience_seconds: float = 60.0
    max_nonfinite_steps: int = 20
    spike_action: Literal["off", "warn", "skip", "stop"] = "off"
    spike_window: int = 100
    spike_factor: float = 10.0
    watchdog_minutes: float | None = 20.0

    def __post_init__(self):
        require_declared(self)
        require_positive(
            self, "steps", "batch_size", "sequence_length", "gradient_accumulation", "learning_rate", "log_every",
            "keep_checkpoints", "max_nonfinite_steps", "epsilon", "spike_factor", "storage_patience_seconds",
        )
        require_non_negative(
            self, "warmup_steps", "final_learning_rate_fraction", "weight_decay", "keep_best", "max_missed_saves"
        )
        require(
            self.warmup_steps <= self.steps,
            f"warmup_steps={self.warmup_steps} is more than steps={self.steps}.",
        )
        require(0 < self.decay_fraction <= 1, f"decay_fraction={self.decay_fraction}; choose 0 < decay_fraction <= 1.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value}; choose 0 <= {name} < 1.")
        require_positive_or_none(
            self, "checkpoint_every", "checkpoint_every_minutes", "keep_every", "clip_norm", "watchdog_minutes"
        )
        if self.keep_every is not None:
            require(
                self.keep_every % self.checkpoint_interval == 0,
                f"keep_every={self.keep_every}, but checkpoints are written every {self.checkpoint_interval} steps; "
                "choose a multiple of that.",
            )
        require(
            self.checkpoint_chunk_bytes >= 1024,
            f"checkpoint_chunk_bytes={self.checkpoint_chunk_bytes}; choose 1024 or more (2**24 is the default).",
        )
        require(
            self.best_metric == "training_loss" or self.best_metric.count("/") == 3,
            f"best_metric={self.best_metric!r}; choose 'training_loss' or EVALUATION/SOURCE/SPLIT/FIELD, such as "
            "'task/reasoning/test/accuracy'.",
        )
        require(
            2 <= self.spike_window <= _LONGEST_SPIKE_WINDOW,
            f"spike_window={self.spike_window}; choose 2 <= spike_window <= {_LONGEST_SPIKE_WINDOW}.",
        )

    BOOKKEEPING: ClassVar[tuple[str, ...]] = (
        "log_every", "checkpoint_every", "checkpoint_every_minutes", "keep_checkpoints", "keep_every", "keep_best",
        "best_metric", "best_mode", "checkpoint_ocdbt", "checkpoint_zarr3", "checkpoint_chunk_bytes",
        "max_missed_saves", "storage_patience_seconds", "max_nonfinite_steps", "watchdog_minutes",
    )  # fmt: skip
    """Fields that no number of a training depends on."""

    @property
    def tokens(self) -> int:
        """Token positions of the whole run, padding included: steps · B · S."""
        return self.steps * self.batch_size * self.sequence_length

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints with the default resolved."""
        return self.checkpoint_every or max(1, math.ceil(self.steps / 10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestTimeConfig:
    """Test-time compute: several sampled answers to each problem, and a vote (`experiments.test_time_compute`).

    Defaults are the paper's where it states one, else those of its code (a fork of "Large Language Monkeys"). Nothing
    of it is part of `config_hash`: a finished run can be sampled again otherwise, and its samples have a hash of their
    own.

    Attributes:
      samples: answers to each problem.
      temperature: 0 is greedy, for one sample.
      top_p: mass of the nucleus that tokens are drawn from.
      max_new_tokens: longest answer; at most half of the model's max_sequence_length is used.
      stops: texts before which an answer is cut. Of question_answer sources only: the others write no such thing.
      shots: worked examples before each question, drawn from the training split (question_answer sources only).
      sources: of `data.sources`, by name; empty: every one that has problems.
      splits: of each source.
      problems: at most this many of a split; None takes all.
      batch_size: answers at once. No sample depends on it, beyond rounding.
      seed: of the samples, the examples, and which problems are taken.
    """

    __test__: ClassVar[bool] = False  # no class of tests, though its name starts like one

    samples: int = 128
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 1024
    stops: tuple[str, ...] = ("Q:", "Question:")
    shots: int = 0
    sources: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("test",)
    problems: int | None = None
    batch_size: int = 64
    seed: int = 0

    MOST_SAMPLES: ClassVar[int] = 1024
    """Up to here the numbers of subsets fit float64 (`jaxmoe.evaluation.test_time`)."""

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "train_clean", "test")

    def __post_init__(self):
        require_declared(self)
        require_positive(self, "max_new_tokens", "batch_size")
        require_non_negative(self, "temperature", "shots", "seed")
        require(
            1 <= self.samples <= self.MOST_SAMPLES,
            f"samples={self.samples}; choose 1 <= samples <= {self.MOST_SAMPLES}.",
        )
        require(
            self.temperature > 0 or self.samples == 1,
            f"temperature={self.temperature} with samples={self.samples}: greedy decoding writes the same answer every "
            "time; choose samples=1, or a temperature such as 0.6.",
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p}; choose 0 < top_p <= 1.")
        require(all(self.stops), f"stops={self.stops!r}; an empty text would end every answer before it begins.")
        if self.problems is not None:
            require_positive(self, "problems")
        require(bool(self.splits), f"splits is empty; name at least one of {', '.join(self.SPLITS)}.")
        for split in self.splits:
            require(split in self.SPLITS, f"splits: {split!r} is no split.{nearest(split, self.SPLITS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured while and after training. Evaluation is always dropless.

    Attributes:
      points: how many times, evenly spaced, the last step included.
      examples: at most this many per split and task.
      batch_size: rows per evaluation batch.
      validation_rows: at most this many rows per source and split for the validation loss.
      generate: also score question/answer sources by generating answers.
      max_new_tokens: longest generated answer.
      test_time: how answers are sampled where a run is asked for it.
    """

    points: int = 5
    examples: int = 512
    batch_size: int = 128
    validation_rows: int = 512
    generate: bool = True
    max_new_tokens: int = 256
    test_time: TestTimeConfig = dataclasses.field(default=TestTimeConfig(), metadata=NOT_IDENTITY)

    def __post_init__(self):
        require_positive(self, "points", "examples", "batch_size", "validation_rows", "max_new_tokens")

    def steps_of(self, total: int) -> tuple[int, ...]:
        """The steps after which to evaluate a run of `total` steps."""
        points = min(self.points, total)
        return tuple(sorted({round(total * (i + 1) / points) for i in range(points)}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, complete.

    Attributes:
      name: of the member; its folder in the study's.
      seed: of initialization, data and order.
      mesh: the devices. It is no part of `config_hash`: a run may go on on another mesh.
      start_from: a run directory, local or gs://, from whose newest checkpoint the parameters are taken instead of
        being drawn; moments, steps and data begin anew.
      grpo: the run is GRPO of `start_from`'s model; None trains on the sources' rows.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata=NOT_IDENTITY)
    start_from: str | None = dataclasses.field(default=None, metadata=IF_GIVEN)
    grpo: GRPOConfig | None = dataclasses.field(default=None, metadata=IF_GIVEN)

    def __post_init__(self):
        require_non_negative(self, "seed")
        require(
            self.train.sequence_length <= self.model.max_sequence_length,
            f"train.sequence_length={self.train.sequence_length} exceeds "
            f"model.max_sequence_length={self.model.max_sequence_length}.",
        )
        for name in self.evaluation.test_time.sources:
            require(
                name in self.data.sources,
                f"evaluation.test_time.sources: no source of data.sources is called {name!r}."
                f"{nearest(name, self.data.sources)}",
            )
        if self.model.num_moe_layers and self.model.moe.capacity_factor is not None:
            require(
                self.train.gradient_accumulation == 1,
                f"train.gradient_accumulation={self.train.gradient_accumulation} with "
                f"model.moe.capacity_factor={self.model.moe.capacity_factor}: the limit would hold for each "
                "micro-batch, and drop other tokens than without accumulation. Use gradient_accumulation=1, or no "
                "capacity_factor.",
            )
        require(self.start_from != "", "start_from is empty; name a run directory, or leave it out.")
        if self.grpo is not None:
            check_grpo(self)
        else:
            require(
                self.train.batch_size % self.train.gradient_accumulation == 0,
                f"train.batch_size={self.train.batch_size} is not divisible by train.gradient_accumulation="
                f"{self.train.gradient_accumulation}.",
            )

    @property
    def rows_per_update(self) -> int:
        """Rows of an optimizer update: B, or under GRPO the responses that it learns from."""
        return self.train.batch_size if self.grpo is None else self.grpo.responses_per_update(self.train)

    @property
    def tokens_per_step(self) -> int:
        """Token positions of a step's updates, padding included: B · S, times the group size under GRPO."""
        responses = 1 if self.grpo is None else self.grpo.group_size
        return self.train.batch_size * responses * self.train.sequence_length

    @property
    def tokens(self) -> int:
        """Token positions of the whole run."""
        return self.train.steps * self.tokens_per_step
