"""Question and answer files, for training, task loss and accuracy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.config import QuestionAnswerSource
from jaxmoe.data.answers import extract_answer
from jaxmoe.data.errors import DataError
from jaxmoe.data.files import expand
from jaxmoe.data.layouts import Documents, Layout, PackedLayout, PaddedLayout
from jaxmoe.data.records import QUESTION_SUFFIXES, RecordErrors, read_records, string_field
from jaxmoe.data.source import Example, Source
from jaxmoe.data.tokenizers import Tokenizer, encode_examples, require_any_text

_log = logging.getLogger(__name__)


def question_answer_source(
    name: str,
    config: QuestionAnswerSource,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    run_seed: int,
    index: int = 0,
) -> Source:
    """Examples as rows, packed or padded; the prompt weighs `config.prompt_weight`, the answer 1.

    The answer of an example starts with `config.answer_separator`, as a model that continues the prompt must write
    it. Padded, examples of more than S+1 tokens have no row (counted in `skipped`), but are among `examples`.

    Raises:
      DataError: a missing, empty or unreadable file, a broken record, no training example short enough for a row.
    """
    require_any_text(tokenizer, name)
    errors = RecordErrors(name, config.on_error)
    splits = {
        split: read_examples(patterns, config, errors)
        for split, patterns in (("train", config.train_paths), ("test", config.test_paths))
        if patterns
    }
    errors.summarize(sum(map(len, splits.values())))
    _warn_of_shared_prompts(name, splits)
    layouts = {
        split: _layout(name, split, examples, config, tokenizer, sequence_length, errors)
        for split, examples in splits.items()
    }
    content = [layout.documents.digest() for layout in layouts.values()]
    return Source(
        name, config, layouts, seed=run_seed, content=content, index=index, examples=splits, skipped=errors.skipped
    )


def read_examples(patterns: Sequence[str], config: QuestionAnswerSource, errors: RecordErrors) -> list[Example]:
    """The examples of files, in order.

    Raises:
      DataError: a file that cannot be used, a broken record (unless `errors` skips), no example at all.
    """
    paths = expand(patterns, QUESTION_SUFFIXES)
    examples = []
    for path in paths:
        for location, value in read_records(path, errors):
            example = _example(location, value, config, errors)
            if example is not None:
                examples.append(example)
    if not examples:
        raise DataError(f"{', '.join(paths)}: no record is an example of schema={config.schema!r}.")
    return examples


def _example(location: str, value: Any, config: QuestionAnswerSource, errors: RecordErrors) -> Example | None:
    first = string_field(location, value, "question" if config.schema == "gsm8k" else "prompt", errors)
    answer = None if first is None else string_field(location, value, "answer", errors)
    if first is None or answer is None:
        return None
    prompt = config.prompt_template.replace("{question}", first) if config.schema == "gsm8k" else first
    if not prompt or not answer:
        errors.report(location, "empty prompt" if not prompt else "empty answer")
        return None
    return Example(prompt, config.answer_separator + answer, extract_answer(answer, config.answer_format))


def _layout(
    name: str,
    split: str,
    examples: list[Example],
    config: QuestionAnswerSource,
    tokenizer: Tokenizer,
    sequence_length: int,
    errors: RecordErrors,
) -> Layout:
    tokens, answer_starts = encode_examples(tokenizer, examples)
    documents = Documents.from_arrays(tokens, tokenizer.eos_id, answer_starts)
    if config.packed:
        return PackedLayout(documents, sequence_length, tokenizer.pad_id, config.prompt_weight)
    fits = documents.lengths <= sequence_length + 1
    too_long = int(np.sum(~fits))
    if too_long:
        longest = int(documents.lengths.max())
        if split == "train" and too_long == len(documents):
            raise DataError(
                f"source {name!r}: no training example fits a row of sequence_length={sequence_length}; the shortest "
                f"has {int(documents.lengths.min())} tokens, the longest {longest}. Raise sequence_length or set "
                "packed=True."
            )
        errors.skipped[f"{split} example longer than a row"] += too_long
        _log.warning(
            "source %r: %d of %d %s examples are longer than a row of sequence_length=%d and left out of the rows "
            "(the longest has %d tokens).", name, too_long, len(documents), split, sequence_length, longest,
        )
    return PaddedLayout(documents.select(fits), sequence_length, tokenizer.pad_id, config.prompt_weight)


def _warn_of_shared_prompts(name: str, splits: dict[str, list[Example]]) -> None:
    """Test prompts that were trained on measure memory, not transfer: say how many there are."""
    seen = {_comparable(example.prompt) for example in splits.get("train", ())}
    shared = sum(_comparable(example.prompt) in seen for example in splits.get("test", ()))
    if shared:
        _log.warning(
            "source %r: %d of %d test prompts are also in the training files.", name, shared, len(splits["test"])
        )


def _comparable(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()
