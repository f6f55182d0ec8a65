"""Evaluation: task loss, accuracy, validation loss, and the records that hold them."""

from jaxmoe.evaluation.checkpoint import checkpoint_context
from jaxmoe.evaluation.evaluate import evaluate_all, reward_records
from jaxmoe.evaluation.generation import GenerationScore, generation_accuracy, greedy_answers
from jaxmoe.evaluation.multiple_choice import MultipleChoiceScore, Question, hellaswag_question, score_questions
from jaxmoe.evaluation.records import (
    Record,
    make_record,
    named_numbers,
    set_aside,
    validate_record,
    write_record,
    write_records,
)
from jaxmoe.evaluation.scoring import ExampleScores, TaskScore, score_each, score_examples
from jaxmoe.evaluation.validation import ValidationScore, validation_loss

__all__ = [
    "ExampleScores",
    "GenerationScore",
    "MultipleChoiceScore",
    "Question",
    "Record",
    "TaskScore",
    "ValidationScore",
    "checkpoint_context",
    "evaluate_all",
    "generation_accuracy",
    "greedy_answers",
    "hellaswag_question",
    "make_record",
    "named_numbers",
    "reward_records",
    "score_each",
    "score_examples",
    "score_questions",
    "set_aside",
    "validate_record",
    "validation_loss",
    "write_record",
    "write_records",
]
