"""Text from files: documents, tokenized once, shuffled each epoch, concatenated and cut into rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np

from jaxmoe.config import TextSource, TokensSource
from jaxmoe.data.cache import Corpus, cached_corpus
from jaxmoe.data.errors import DataError
from jaxmoe.data.files import expand, identity
from jaxmoe.data.layouts import Documents, PackedLayout
from jaxmoe.data.records import TEXT_SUFFIXES, RecordErrors, in_words, read_records, string_field
from jaxmoe.data.source import Source
from jaxmoe.data.tokenizers import Tokenizer, require_any_text

_log = logging.getLogger(__name__)


def text_source(
    name: str,
    config: TextSource,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    run_seed: int,
    cache_dir: str | os.PathLike | None = None,
    index: int = 0,
) -> Source:
    """Documents as packed rows (`PackedLayout`); every token weighs 1.

    The test split is `config.test_paths`; where that is empty, the documents whose text hashes into the first
    `test_fraction` of all hashes, so that equal documents are never on both sides.

    Raises:
      DataError: a missing, empty or unreadable file, a broken record, no document left to train on.
    """
    require_any_text(tokenizer, name)
    corpus = _corpus(name, config, config.paths, tokenizer, cache_dir)
    train, test = corpus.documents, None
    content = [tokenizer.fingerprint.encode(), corpus.hashes.tobytes()]
    skipped = dict(corpus.skipped)
    if config.test_paths:
        test_corpus = _corpus(name, config, config.test_paths, tokenizer, cache_dir)
        test = test_corpus.documents
        content.append(test_corpus.hashes.tobytes())
        shared = int(np.isin(test_corpus.hashes, corpus.hashes).sum())
        if shared:
            _log.warning("source %r: %d of %d test documents are also in the training files.", name, shared, len(test))
        for reason, count in test_corpus.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    else:
        train, test = held_out(name, corpus.documents, corpus.hashes, config.test_fraction)
    layouts = packed_layouts(name, config, train, test, sequence_length, tokenizer.pad_id)
    return Source(name, config, layouts, seed=run_seed, content=content, index=index, skipped=skipped)


def read_texts(paths: Sequence[str], text_key: str, errors: RecordErrors) -> Iterator[str]:
    """The documents of files, in order.

    Args:
      paths: existing files, as `expand` gives them.
      text_key: the field of a JSON record that holds the text.
      errors: told of records that cannot be used; empty texts are skipped and counted whatever it does.
    """
    for path in paths:
        for location, value in read_records(path, errors):
            text = text_of(path, location, value, text_key, errors)
            if text:
                yield text


def packed_layouts(
    name: str,
    config: TextSource | TokensSource,
    train: Documents,
    test: Documents | None,
    sequence_length: int,
    pad_id: int,
) -> dict[str, PackedLayout]:
    """Both splits as packed rows.

    Raises:
      DataError: no document is left to train on.
    """
    layouts = {"train": PackedLayout(train, sequence_length, pad_id)}
    if layouts["train"].row_count == 0:
        documents = len(train) + (0 if test is None else len(test))
        raise DataError(
            f"source {name!r}: none of its {documents} documents is left for training at "
            f"test_fraction={config.test_fraction}; lower it, or name test_paths."
        )
    if test is not None and len(test):
        layouts["test"] = PackedLayout(test, sequence_length, pad_id)
    return layouts


def held_out(
    name: str, documents: Documents, hashes: np.ndarray, fraction: float
) -> tuple[Documents, Documents | None]:
    """Training and test documents: those whose text hashes into the first `fraction` of all hashes are for testing."""
    if not fraction:
        return documents, None
    chosen = hashes < np.uint64(int(fraction * 2**64))
    if not chosen.any():
        _log.warning(
            "source %r: test_fraction=%s holds out none of %d documents; for a validation loss, name test_paths.",
            name, fraction, len(chosen),
        )  # fmt: skip
    return documents.select(~chosen), documents.select(chosen)


def text_of(path: str, location: str, value: object, text_key: str, errors: RecordErrors) -> str | None:
    """The text of a record of `read_records`; None, and told to `errors`, where there is none or an empty one."""
    plain = isinstance(value, str) and path.endswith((".txt", ".array_record"))
    text = value if plain else string_field(location, value, text_key, errors)
    if text == "":
        errors.skipped["empty text"] += 1
    return text or None


def _corpus(
    name: str, config: TextSource, patterns: Sequence[str], tokenizer: Tokenizer, cache_dir: str | os.PathLike | None
) -> Corpus:
    paths = expand(patterns, TEXT_SUFFIXES)
    errors = RecordErrors(name, config.on_error)

    def texts() -> Iterator[str]:
        count = 0
        for text in read_texts(paths, config.text_key, errors):
            count += 1
            yield text
        errors.summarize(count)
        if count == 0:
            skipped = f" (skipped: {in_words(errors.skipped)})" if errors.skipped else ""
            raise DataError(f"source {name!r}: {', '.join(paths)}: no record has any text{skipped}.")

    key = {"files": [identity(path) for path in paths], "text_key": config.text_key, "on_error": config.on_error}
    return cached_corpus(cache_dir, key, texts, tokenizer, errors.skipped)
