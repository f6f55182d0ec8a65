"""Evaluation: task loss, accuracy, validation loss, test-time compute, and the records that hold them."""

from jaxmoe.evaluation.checkpoint import checkpoint_context
from jaxmoe.evaluation.evaluate import evaluate_all, identity_at, reward_records
from jaxmoe.evaluation.generation import (
    Generated,
    GenerationScore,
    generation_accuracy,
    greedy_answers,
    sample_answers,
)
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
from jaxmoe.evaluation.samples import (
    Problems,
    problems_of,
    sample_problems,
    samples_file,
    sampling_hash,
    write_test_time_record,
)
from jaxmoe.evaluation.scoring import ExampleScores, TaskScore, score_each, score_examples
from jaxmoe.evaluation.test_time import (
    Votes,
    budgets,
    covered,
    expected_majority,
    majority,
    pass_at,
    sampling_numbers,
)
from jaxmoe.evaluation.validation import ValidationScore, validation_loss

__all__ = [
    "ExampleScores",
    "Generated",
    "GenerationScore",
    "MultipleChoiceScore",
    "Problems",
    "Question",
    "Record",
    "TaskScore",
    "ValidationScore",
    "Votes",
    "budgets",
    "checkpoint_context",
    "covered",
    "evaluate_all",
    "expected_majority",
    "generation_accuracy",
    "greedy_answers",
    "hellaswag_question",
    "identity_at",
    "majority",
    "make_record",
    "named_numbers",
    "pass_at",
    "problems_of",
    "reward_records",
    "sample_answers",
    "sample_problems",
    "samples_file",
    "sampling_hash",
    "sampling_numbers",
    "score_each",
    "score_examples",
    "score_questions",
    "set_aside",
    "validate_record",
    "validation_loss",
    "write_record",
    "write_records",
    "write_test_time_record",
]
