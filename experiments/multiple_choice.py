"""Multiple-choice accuracy of a checkpoint of Hugging Face transformers, as lm-evaluation-harness counts it.

    python -m experiments.multiple_choice --checkpoint=FOLDER --questions=hellaswag_val.jsonl [--limit=100] [--json]

A line of the questions is HellaSwag's (`activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`) or has `context`,
`choices` and `answer`, the index of the right one. Prints the accuracy by log-likelihood (`acc`) and by log-likelihood
over characters (`acc_norm`), each with its standard error. Exit status: 0 done, 2 a mistake of yours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from absl import flags

from experiments.flags import fail, run_command
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder with config.json, safetensors and tokenizer.json.")
_QUESTIONS = flags.DEFINE_string("questions", None, "File of questions, one JSON object a line, local or gs://.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only this many questions, from the first on.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Choices at once.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    if len(argv) > 1:
        fail(ConfigError(f"unexpected argument {argv[1]!r}; flags are written --name=value."))
    if not _CHECKPOINT.value or not _QUESTIONS.value:
        fail(ConfigError("give --checkpoint=FOLDER and --questions=FILE.jsonl."))
    log_to_terminal()
    from jaxmoe.data import load_tokenizer
    from jaxmoe.evaluation import score_questions
    from jaxmoe.interop.huggingface import load_pretrained

    try:
        questions = read_questions(_QUESTIONS.value, _LIMIT.value)
        model = load_pretrained(_CHECKPOINT.value)
        tokenizer = load_tokenizer(f"{_CHECKPOINT.value}/tokenizer.json")
        score = score_questions(model.decoder, questions, tokenizer, batch_size=_BATCH_SIZE.value)
    except ConfigError as error:
        fail(error)
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(score), indent=2))
        return 0
    print(
        f"{score.questions} questions: acc {score.accuracy:.3f} ± {score.accuracy_standard_error:.3f}, acc_norm "
        f"{score.normalized_accuracy:.3f} ± {score.normalized_accuracy_standard_error:.3f}"
        + (f"; {score.skipped} skipped, too long for the model" if score.skipped else "")
    )
    return 0


def read_questions(path: str, limit: int | None) -> list:
    """The questions of a file.

    Raises:
      ConfigError: no such file, or a line that is neither of the two forms; it is named.
    """
    from jaxmoe.data.files import read_bytes
    from jaxmoe.evaluation import Question, hellaswag_question

    questions = []
    for number, line in enumerate(read_bytes(path).decode().splitlines()[:limit], start=1):
        try:
            row = json.loads(line)
            if "endings" in row:
                questions.append(hellaswag_question(row))
            else:
                questions.append(Question(row["context"], tuple(row["choices"]), int(row["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: not a question ({type(error).__name__}: {error}).") from error
    return questions


if __name__ == "__main__":
    run_command(main)
