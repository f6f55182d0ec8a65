"""Tokens from shards: documents that were tokenized before, shuffled each epoch, concatenated and cut into rows."""

from __future__ import annotations

import os

from jaxmoe.config import TokensSource
from jaxmoe.data.errors import DataError
from jaxmoe.data.files import expand
from jaxmoe.data.shards import SUFFIX, open_corpus
from jaxmoe.data.source import Source
from jaxmoe.data.text import held_out, packed_layouts
from jaxmoe.data.tokenizers import Tokenizer


def tokens_source(
    name: str,
    config: TokensSource,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    run_seed: int,
    cache_dir: str | os.PathLike | None = None,
    index: int = 0,
) -> Source:
    """Documents as packed rows (`PackedLayout`), read from disk as they are needed; every token weighs 1.

    In memory are where each document begins and ends and the order of an epoch, a few numbers a document.

    Raises:
      DataError: a missing or damaged shard, one of another tokenizer, no document left to train on.
    """
    corpus = open_corpus(_expand(name, config.paths), tokenizer.fingerprint, cache_dir)
    content = [tokenizer.fingerprint.encode(), corpus.hashes.tobytes()]
    if config.test_paths:
        test_corpus = open_corpus(_expand(name, config.test_paths), tokenizer.fingerprint, cache_dir)
        content.append(test_corpus.hashes.tobytes())
        train, test = corpus.documents, test_corpus.documents
    else:
        train, test = held_out(name, corpus.documents, corpus.hashes, config.test_fraction)
    layouts = packed_layouts(name, config, train, test, sequence_length, tokenizer.pad_id)
    return Source(name, config, layouts, seed=run_seed, content=content, index=index, skipped=corpus.skipped)


def _expand(name: str, patterns: tuple[str, ...]) -> list[str]:
    try:
        return expand(patterns, (SUFFIX,))
    except DataError as error:
        rooted = any(pattern.startswith(("/", "~")) or "://" in pattern for pattern in patterns)
        hint = "" if rooted else " Give the folder that it is in as data.root."
        raise DataError(f"source {name!r}: {error}{hint}") from error
