"""Raw text to shards of token ids: in parallel, and from where it stopped."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from jaxmoe.config import ConfigError, config_hash
from jaxmoe.data.cache import text_hash
from jaxmoe.data.errors import DataError
from jaxmoe.data.files import expand, identity
from jaxmoe.data.records import TEXT_SUFFIXES, RecordErrors, in_words, read_records
from jaxmoe.data.shards import SUFFIX, id_dtype, read_index, write_shard
from jaxmoe.data.text import text_of
from jaxmoe.data.tokenizers import Tokenizer, load_tokenizer, require_any_text
from jaxmoe.storage import as_path, read_json, write_json

SUMMARY_FILE = "corpus.json"
_BLOCK_CHARACTERS = 1 << 20
_BLOCK_DOCUMENTS = 4096
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """What a folder of shards holds.

    Attributes:
      shards, documents, tokens: how many; end tokens are counted.
      skipped: records left out, by reason.
    """

    shards: int
    documents: int
    tokens: int
    skipped: dict[str, int]

    def with_shard(self, about: dict[str, Any]) -> TokenizedCorpus:
        """The same and one more shard."""
        skipped = collections.Counter(self.skipped) + collections.Counter(about["skipped"])
        return TokenizedCorpus(
            self.shards + 1, self.documents + about["documents"], self.tokens + about["tokens"], dict(skipped)
        )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Records of the corpus before which everything is done: `record` of file number `file` and all files before."""

    file: int = 0
    record: int = 0


@dataclasses.dataclass(frozen=True)
class _Block:
    """Documents to tokenize at a time, what was skipped since the block before, and where the block ends."""

    texts: list[str]
    skipped: dict[str, int]
    end: _Place


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A block's documents as ids."""

    documents: list[bytes]
    lengths: np.ndarray
    hashes: np.ndarray


def tokenize_corpus(
    inputs: Sequence[str],
    output: epath.PathLike,
    tokenizer: str,
    *,
    text_key: str = "text",
    on_error: Literal["raise", "skip"] = "raise",
    shard_tokens: int = 1 << 28,
    processes: int = 1,
    progress: Callable[[TokenizedCorpus, int, int], None] | None = None,
) -> TokenizedCorpus:
    """Writes the shards of a corpus to a folder; called again, it goes on after the last whole shard.

    Shards do not depend on the number of processes, nor on where the work was interrupted.

    Args:
      inputs: files or patterns, local or gs://, of `jaxmoe.data.records.TEXT_SUFFIXES`.
      output: the folder, local or gs://.
      tokenizer: as `DataConfig.tokenizer`; every document ends in its end token.
      text_key: the field of a JSON line or a parquet row that holds the text.
      on_error: what a broken record does: `raise`, or `skip` (counted).
      shard_tokens: a shard is closed when it has so many, after the block of documents that brings it there.
      processes: that tokenize; 1 does it in this process.
      progress: called after each block with what is written or in work, and files read of how many.

    Returns:
      The whole corpus, shards of earlier calls included.

    Raises:
      ConfigError: the folder holds another corpus; DataError: no file, a broken record, no document.
    """
    output, paths = as_path(output), expand(inputs, TEXT_SUFFIXES)
    encoder = load_tokenizer(tokenizer)
    require_any_text(encoder, str(output))
    recipe = {
        "inputs": [identity(path) for path in paths], "text_key": text_key, "on_error": on_error,
        "tokenizer": encoder.fingerprint, "shard_tokens": shard_tokens,
    }  # fmt: skip
    corpus, start = _done(output, config_hash(recipe))
    if start is None:
        return corpus
    output.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(output, encoder, config_hash(recipe), shard_tokens, corpus)
    blocks = _blocks(paths, start, text_key, RecordErrors(str(output), on_error))
    with contextlib.closing(_encoded(blocks, tokenizer, encoder, processes)) as encoded_blocks:
        for block, encoded in encoded_blocks:
            writer.add(block, encoded)
            if progress is not None:
                progress(writer.with_open_shard, block.end.file, len(paths))
    corpus = writer.finish()
    if not corpus.documents:
        skipped = f" (skipped: {in_words(corpus.skipped)})" if corpus.skipped else ""
        raise DataError(f"{', '.join(paths[:3])}: no record has any text{skipped}.")
    write_json(output / SUMMARY_FILE, {"recipe": config_hash(recipe), **dataclasses.asdict(corpus)})
    return corpus


def _done(output: epath.Path, recipe: str) -> tuple[TokenizedCorpus, _Place | None]:
    """What is there already, and where to go on; None if that is all."""
    corpus, place = TokenizedCorpus(0, 0, 0, {}), _Place()
    shards = sorted(output.glob(f"shard-*{SUFFIX}")) if output.exists() else []
    for number, path in enumerate(shards):
        try:
            about = read_index(path).about
        except DataError:
            break  # it was being written
        if about.get("recipe") != recipe or path.name != _shard_name(number):
            raise ConfigError(
                f"{output} holds shards of other files, or of the same with another tokenizer or other options; take "
                "another folder, or empty this one."
            )
        corpus, place = corpus.with_shard(about), _Place(**about["end"])
    summary = read_json(output / SUMMARY_FILE) if (output / SUMMARY_FILE).exists() else {}
    if summary.get("recipe") == recipe and summary["tokens"] == corpus.tokens:
        return dataclasses.replace(corpus, skipped=summary["skipped"]), None
    return corpus, place


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}{SUFFIX}"


class _ShardWriter:
    """Collects blocks until a shard is full."""

    def __init__(
        self, output: epath.Path, tokenizer: Tokenizer, recipe: str, shard_tokens: int, corpus: TokenizedCorpus
    ):
        self._output, self._tokenizer, self._recipe, self._limit = output, tokenizer, recipe, shard_tokens
        self._corpus = corpus
        self._clear()

    def _clear(self) -> None:
        self._documents: list[bytes] = []
        self._lengths: list[np.ndarray] = []
        self._hashes: list[np.ndarray] = []
        self._skipped: collections.Counter[str] = collections.Counter()
        self._tokens, self._end = 0, _Place()

    def add(self, block: _Block, encoded: _Encoded) -> None:
        """Takes a block, and writes the shard if that fills it."""
        self._documents += encoded.documents
        self._lengths.append(encoded.lengths)
        self._hashes.append(encoded.hashes)
        self._skipped.update(block.skipped)
        self._tokens += int(encoded.lengths.sum())
        self._end = block.end
        if self._tokens >= self._limit:
            self._write()

    @property
    def with_open_shard(self) -> TokenizedCorpus:
        """What is written and what is collected."""
        return self._corpus.with_shard(self._about()) if self._documents else self._corpus

    def finish(self) -> TokenizedCorpus:
        """Writes the last shard and returns the whole corpus; what was skipped after its last document counts."""
        if self._documents:
            self._write()
        elif self._skipped:
            skipped = collections.Counter(self._corpus.skipped) + self._skipped
            self._corpus = dataclasses.replace(self._corpus, skipped=dict(skipped))
        return self._corpus

    def _write(self) -> None:
        about = self._about()
        write_shard(
            self._output / _shard_name(self._corpus.shards), self._documents, np.concatenate(self._lengths),
            np.concatenate(self._hashes), about,
        )  # fmt: skip
        self._corpus = self._corpus.with_shard(about)
        self._clear()

    def _about(self) -> dict[str, Any]:
        return {
            "tokenizer": self._tokenizer.fingerprint,
            "dtype": id_dtype(self._tokenizer.vocab_size).str,
            "documents": len(self._documents),
            "tokens": self._tokens,
            "skipped": dict(self._skipped),
            "recipe": self._recipe,
            "end": dataclasses.asdict(self._end),
        }


def _blocks(paths: Sequence[str], start: _Place, text_key: str, errors: RecordErrors) -> Iterator[_Block]:
    """The documents from `start` on, in blocks that depend on nothing but the documents before them."""
    texts: list[str] = []
    characters = 0

    def block(end: _Place) -> _Block:
        nonlocal texts, characters
        done = _Block(texts, dict(errors.skipped), end)
        errors.skipped.clear()
        texts, characters = [], 0
        return done

    for number in range(start.file, len(paths)):
        record = 0
        for record, (location, value) in enumerate(read_records(paths[number], errors), start=1):
            if number == start.file and record <= start.record:
                errors.skipped.clear()  # counted in the shard that ends here
                continue
            text = text_of(paths[number], location, value, text_key, errors)
            if text is None:
                continue
            texts.append(text)
            characters += len(text)
            if characters >= _BLOCK_CHARACTERS or len(texts) >= _BLOCK_DOCUMENTS:
                yield block(_Place(number, record))
        _log.debug("%s: %d records", paths[number], record)
    if texts or errors.skipped:
        yield block(_Place(len(paths), 0))


def _encoded(
    blocks: Iterable[_Block], tokenizer: str, encoder: Tokenizer, processes: int
) -> Iterator[tuple[_Block, _Encoded]]:
    """Each block with its ids, in order; a few are in work at a time, so that memory stays bounded."""
    if processes == 1:
        for block in blocks:
            yield block, _encode(encoder, block.texts)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, (tokenizer,)) as pool:
        waiting: collections.deque[tuple[_Block, concurrent.futures.Future]] = collections.deque()
        try:
            for block in blocks:
                waiting.append((block, pool.submit(_encode_in_worker, tokenizer, block.texts)))
                if len(waiting) > 2 * processes:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the command ends its workers itself
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs in parallel
    _tokenizer_here(tokenizer)


def _end_with_parent() -> None:
    """A killed command leaves no worker: each waits for a pipe whose other end it holds itself, for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@functools.cache
def _tokenizer_here(spec: str) -> Tokenizer:
    return load_tokenizer(spec)


def _encode_in_worker(tokenizer: str, texts: list[str]) -> _Encoded:
    return _encode(_tokenizer_here(tokenizer), texts)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> _Encoded:
    dtype = id_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.eos_id], dtype).tobytes()
    arrays = tokenizer.encode_arrays(texts)
    return _Encoded(
        documents=[ids.astype(dtype).tobytes() + end for ids in arrays],
        lengths=np.fromiter((len(ids) + 1 for ids in arrays), np.int64, len(arrays)),
        hashes=np.fromiter(map(text_hash, texts), np.uint64, len(texts)),
    )
