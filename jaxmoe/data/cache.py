"""The cache of tokenized text: each corpus is tokenized once, and read as a memory map from then on.

A corpus is a folder `text-KEY` with `tokens.bin`, `starts.npy`, `lengths.npy`, `hashes.npy` and `about.json`. It is
written under another name and renamed when complete, so that a process killed half-way leaves nothing that could be
taken for a corpus, and two processes that write the same one do not disturb each other.
"""

from __future__ import annotations

import atexit
import dataclasses
import errno
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from jaxmoe.data.errors import DataError
from jaxmoe.data.layouts import Documents
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.liveness import beat
from jaxmoe.storage import is_remote

_FORMAT = 1
_BLOCK_CHARACTERS = 1 << 20
_BLOCK_DOCUMENTS = 4096
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized documents of some files.

    Attributes:
      documents: memory-mapped.
      hashes: (documents,) uint64 hash of each document's text.
      skipped: records left out, by reason.
    """

    documents: Documents
    hashes: np.ndarray
    skipped: Mapping[str, int]


def text_hash(text: str) -> int:
    """64 bits of a hash of `text`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def cached_corpus(
    cache_dir: str | os.PathLike | None,
    key: object,
    texts: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
    skipped: Mapping[str, int],
) -> Corpus:
    """The corpus under `key`, tokenized now if it is not in the cache.

    Args:
      cache_dir: None, or a remote path (which cannot be memory-mapped): a temporary folder of this process.
      key: JSON values; everything that the corpus depends on besides the tokenizer.
      texts: called if there is anything to do.
      tokenizer: ids, each document ends in its `eos_id`.
      skipped: filled while `texts` is read; kept with the corpus.

    Raises:
      DataError: no document at all, or no space left.
    """
    root = _cache_root(cache_dir)
    canonical = json.dumps([_FORMAT, tokenizer.fingerprint, key], sort_keys=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:20]
    folder = os.path.join(root, f"text-{digest}")
    corpus = _opened(folder)
    if corpus is None:
        try:
            _write(root, folder, digest, texts(), tokenizer, skipped)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"{root}: no space left for tokenized text; free some, or set data.cache_dir to a folder elsewhere."
                ) from error
            raise
        corpus = _opened(folder)
        if corpus is None:
            raise DataError(f"{folder}: the tokenized text cannot be read back.")
    return corpus


def _opened(folder: str) -> Corpus | None:
    """The corpus in `folder`, or None where there is none or its files are not what was written."""
    try:
        with open(os.path.join(folder, "about.json"), encoding="utf-8") as file:
            about = json.load(file)
        names = ("starts", "lengths", "hashes")
        starts, lengths, hashes = (np.load(os.path.join(folder, f"{name}.npy")) for name in names)
        tokens = np.memmap(os.path.join(folder, "tokens.bin"), dtype=about["dtype"], mode="r")
    except (OSError, ValueError, KeyError):
        return None
    if len(tokens) != about["tokens"] or not len(starts) == len(lengths) == len(hashes) == about["documents"]:
        return None
    return Corpus(Documents(tokens, starts, lengths), hashes, about["skipped"])


def _write(
    root: str, folder: str, digest: str, texts: Iterable[str], tokenizer: Tokenizer, skipped: Mapping[str, int]
) -> None:
    _remove_abandoned(root, digest)
    host = socket.gethostname()
    draft = tempfile.mkdtemp(prefix=f"draft-{digest}-{host}-{os.getpid()}-", dir=root)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    lengths: list[int] = []
    hashes: list[int] = []
    try:
        with open(os.path.join(draft, "tokens.bin"), "wb") as file:
            for block in _blocks(texts):
                beat()
                for text, ids in zip(block, tokenizer.encode_arrays(block), strict=True):
                    file.write(np.append(ids, tokenizer.eos_id).astype(dtype).tobytes())
                    lengths.append(len(ids) + 1)
                    hashes.append(text_hash(text))
        if not lengths:
            raise DataError("the text files hold no document.")
        sizes = np.array(lengths, np.int64)
        for name, values in (
            ("starts", np.cumsum(sizes) - sizes), ("lengths", sizes), ("hashes", np.array(hashes, np.uint64))
        ):
            np.save(os.path.join(draft, f"{name}.npy"), values)
        about = {
            "dtype": dtype.name, "tokens": int(sizes.sum()), "documents": len(sizes), "skipped": dict(skipped)
        }
        with open(os.path.join(draft, "about.json"), "w", encoding="utf-8") as file:
            json.dump(about, file)
        _flush(draft)
        if os.path.isdir(folder) and _opened(folder) is None:
            shutil.rmtree(folder)
        try:
            os.rename(draft, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # else another process has just finished the same corpus
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _log.info("tokenized %s documents, %s tokens, into %s", f"{len(lengths):,}", f"{sum(lengths):,}", folder)


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists that are large enough to tokenize well and small enough to hold in memory."""
    block: list[str] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text)
        if characters >= _BLOCK_CHARACTERS or len(block) >= _BLOCK_DOCUMENTS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _flush(folder: str) -> None:
    """Waits until the files of `folder` are on disk, so that the rename after it never comes first."""
    for name in itertools.chain(os.listdir(folder), ["."]):
        descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(root: str, digest: str) -> None:
    """Removes drafts of this corpus whose process on this machine is gone."""
    prefix = os.path.join(root, f"draft-{digest}-{socket.gethostname()}-")
    for draft in glob.glob(glob.escape(prefix) + "*"):
        try:
            os.kill(int(draft.removeprefix(prefix).split("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(draft, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


def _cache_root(cache_dir: str | os.PathLike | None) -> str:
    path = None if cache_dir is None else os.path.expanduser(os.fspath(cache_dir))
    if path is not None and is_remote(path):
        _log.info("%s cannot be memory-mapped; tokenized text goes to a temporary folder of this machine.", path)
        path = None
    if path is None:
        return _temporary_root()
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cache_dir={path}: cannot be made ({error.strerror}); set data.cache_dir to another folder."
        ) from error
    return path


@functools.cache
def _temporary_root() -> str:
    folder = tempfile.mkdtemp(prefix="jaxmoe-text-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
