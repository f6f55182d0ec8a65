"""Everything that is measured of a member at one point of its training, as records.

Four evaluations: `training` (the loss that training itself saw just now), `validation` (the same loss on rows of
each source's train and test split), `task` (loss and accuracy of answers under teacher forcing), and `generation`
(accuracy of written answers). Train and test splits are both measured, so both gaps of the study can be read off:
test against train, and accuracy against loss.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxmoe import accounting
from jaxmoe.config import KnowledgeSource, QuestionAnswerSource, ReasoningSource, RunConfig, config_hash
from jaxmoe.data import Source
from jaxmoe.data.knowledge import recall_by_chance
from jaxmoe.evaluation.generation import GenerationScore, generation_accuracy
from jaxmoe.evaluation.records import Record, device_description, make_record, versions
from jaxmoe.evaluation.scoring import TaskScore, score_examples
from jaxmoe.evaluation.validation import validation_loss
from jaxmoe.models import Decoder
from jaxmoe.sharding import use_partitioning
from jaxmoe.training import EvaluationContext, averaging_window

logger = logging.getLogger(__name__)

MIXTURE = "all"
"""The `source` of a training record that is about the whole mixture; `DataConfig` refuses a source of this name."""

VALIDATION_SPLITS = ("train", "test")
TASK_SPLITS = ("train", "train_clean", "test")


def evaluate_all(context: EvaluationContext, labels: Mapping[str, str] | None = None) -> list[Record]:
    """All records of a member at the step of `context`. Nothing is written.

    Args:
      context: of `jaxmoe.training.train`, or of `jaxmoe.evaluation.checkpoint_context`.
      labels: `study`, `arm` and `slices` of the member; without them those of a run that stands for itself.

    Returns:
      Records in a fixed order, the same for the same context.

    Raises:
      EvaluationStopped: the run was asked to stop meanwhile.
    """
    with use_partitioning(context.partitioning):
        return _evaluate_all(context, run_identity(context, labels))


def _evaluate_all(context: EvaluationContext, identity: Mapping[str, Any]) -> list[Record]:
    records = training_records(context, identity)
    model = context.model()
    settings = context.run.evaluation
    for source in context.mixture.sources:
        for split in VALIDATION_SPLITS:
            context.check_stop()
            if split in source.splits:
                score = validation_loss(
                    model, source, split, rows=settings.validation_rows, batch_size=settings.batch_size
                )
                records.append(_record(identity, "validation", source.name, split, dataclasses.asdict(score)))
        for split in TASK_SPLITS:
            context.check_stop()
            if source.example_count(split):
                records += _task_records(context, identity, model, source, split)
    return records


def reward_records(
    context: EvaluationContext,
    measured: Iterable[tuple[str, Mapping[str, Any]]],
    labels: Mapping[str, str] | None = None,
) -> list[Record]:
    """Records of the reward of greedy responses to the test split, by `jaxmoe.post_training.validation_rewards`.

    Args:
      context: that was measured.
      measured: source and numbers.
      labels: as in `evaluate_all`.
    """
    identity = run_identity(context, labels)
    return [
        _record(identity, "reward", source, "test", {**numbers, "dropped_fraction": 0.0})
        for source, numbers in measured
    ]


def run_identity(context: EvaluationContext, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What every record of a member at one step has in common: see `jaxmoe.evaluation.records.IDENTITY_FIELDS`."""
    resumed = {} if context.resumed is None else context.resumed.fields()
    return {**identity_at(context.run, context.step, labels), **resumed}


def identity_at(run: RunConfig, step: int, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`run_identity` of a run of which no more than the step of a checkpoint is known."""
    tokens = step * run.tokens_per_step
    return {
        "study": run.name,
        "member": run.name,
        "arm": run.name,
        "slices": "",
        **(labels or {}),
        "seed": run.seed,
        "step": step,
        "tokens": tokens,
        **model_identity(run, tokens),
        "learning_rate": run.train.learning_rate,
        "init_std": run.model.init_std,
        "config_hash": config_hash(run),
        **versions(),
        "device": device_description(),
    }


def model_identity(run: RunConfig, tokens: int) -> dict[str, int | float]:
    """Size of a run's model, and `tokens` relative to it."""
    model = run.model
    count = accounting.parameter_count(model)
    routed = model.moe if model.num_moe_layers else None
    return {
        "total_parameters": count.total,
        "active_parameters": count.active,
        "flops_per_token": accounting.flops_per_token(model, run.train.sequence_length).approximate,
        "tokens_per_parameter": tokens / count.total,
        "sparsity": accounting.sparsity(model),
        "num_experts": routed.num_experts if routed else 0,
        "experts_per_token": routed.experts_per_token if routed else 0,
    }


def training_records(context: EvaluationContext, identity: Mapping[str, Any]) -> list[Record]:
    """The loss of training over the window before this step, of the mixture and of each source.

    Empty where the context does not know it (after training).
    """
    if context.training_loss is None and not any(loss is not None for loss in context.source_losses.values()):
        return []
    run = context.run
    common = {
        "averaging_steps": averaging_window(run.train, len(run.evaluation.steps_of(run.train.steps))),
        "skipped_steps": context.skipped_steps,
        "dropped_fraction": context.dropped_fraction,
    }
    accounts = context.mixture.accounting(context.step)
    numbers = {
        "loss": context.training_loss,
        "trained_tokens": sum(account.tokens for account in accounts.values()),
        **common,
        **load_numbers(context.expert_load),
    }
    records = [_record(identity, "training", MIXTURE, "train", numbers)]
    for name, account in accounts.items():
        if account.rows:
            numbers = {
                "loss": context.source_losses.get(name),
                "trained_tokens": account.tokens,
                "epochs": account.epochs,
                "skipped_records": account.skipped_records,
                **common,
            }
            records.append(_record(identity, "training", name, "train", numbers))
    return records


def load_numbers(expert_load: np.ndarray | None) -> dict[str, Any]:
    """How evenly experts were used, from their (layers, E) shares; nothing for a dense model."""
    if expert_load is None or expert_load.size == 0:
        return {}
    relative = expert_load * expert_load.shape[1]
    return {
        "dead_experts": int(np.sum(expert_load == 0)),
        "load_max_over_mean": float(relative.max(-1).mean()),
        "load_cv": float(relative.std(-1).mean()),
        "expert_load": expert_load,
    }


def headline_accuracy(
    source: Source, score: TaskScore, generated: GenerationScore | None
) -> tuple[str, float, float]:
    """The accuracy that stands for a task: its kind, value and standard error.

    Knowledge: share of values recalled (`value_recall`). Reasoning: whole solutions (`exact_match`). Questions:
    written answers where they were generated (`generation`), else `exact_match`.
    """
    if isinstance(source.config, KnowledgeSource):
        return "value_recall", score.value_recall, score.value_recall_standard_error
    if generated is not None:
        return "generation", generated.accuracy, generated.accuracy_standard_error
    return "exact_match", score.exact_match, score.exact_match_standard_error


def chance_accuracy(source: Source) -> float | None:
    """The headline accuracy of uniform guessing among well-formed answers; None where that is not defined."""
    config = source.config
    if isinstance(config, KnowledgeSource):
        return recall_by_chance(config)
    if isinstance(config, ReasoningSource):
        return float(config.modulus) ** -config.operations
    return None


def _task_records(
    context: EvaluationContext, identity: Mapping[str, Any], model: Decoder, source: Source, split: str
) -> list[Record]:
    settings = context.run.evaluation
    examples = source.examples(split, settings.examples)
    training_length = context.run.train.sequence_length
    score = score_examples(
        model, examples, context.tokenizer, batch_size=settings.batch_size, training_length=training_length
    )
    if score.examples_beyond_training_length:
        _warn_of_extrapolation(
            source.name, split, score.examples_beyond_training_length, score.examples, training_length
        )
    generated = None
    context.check_stop()
    if settings.generate and isinstance(source.config, QuestionAnswerSource):
        generated = generation_accuracy(
            model, examples, context.tokenizer,
            answer_format=source.config.answer_format,
            max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        )  # fmt: skip
    kind, accuracy, error = headline_accuracy(source, score, generated)
    numbers = {
        **dataclasses.asdict(score),
        "accuracy": accuracy,
        "accuracy_kind": kind,
        "accuracy_standard_error": error,
        "chance_accuracy": chance_accuracy(source),
    }
    records = [_record(identity, "task", source.name, split, numbers)]
    if generated is not None:
        numbers = {**dataclasses.asdict(generated), "dropped_fraction": 0.0}
        records.append(_record(identity, "generation", source.name, split, numbers))
    return records


@functools.cache  # once for a source and split, not at every evaluation
def _warn_of_extrapolation(source: str, split: str, beyond: int, examples: int, training_length: int) -> None:
    logger.warning(
        "%s (%s): %d of %d examples are longer than train.sequence_length=%d, so their task loss measures "
        "extrapolation; raise train.sequence_length to avoid it.", source, split, beyond, examples, training_length,
    )  # fmt: skip


def _record(
    identity: Mapping[str, Any], evaluation: str, source: str, split: str, numbers: Mapping[str, Any]
) -> Record:
    return make_record({**identity, "evaluation": evaluation, "source": source, "split": split}, numbers)
