"""Tokenizers: text to ids and back, always with an end token and a padding id.

`bytes` and `symbols` need no file and no training; `*.json` is a Hugging Face tokenizers file, `*.model` a
sentencepiece model. None of them adds special tokens by itself: rows are put together in `jaxmoe.data.layouts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from jaxmoe.config import ConfigError, DataConfig
from jaxmoe.data.errors import DataError
from jaxmoe.data.source import Example
from jaxmoe.storage import as_path

SYMBOLS = "".join(chr(0x100 + i) for i in range(256))
"""The alphabet of the knowledge task: U+0100..U+01FF, 256 letters, two UTF-8 bytes each."""

TASK_CHARACTERS = "KR=+-* 0123456789" + SYMBOLS
"""Every character that the synthetic tasks write in symbols."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer.

    Attributes:
      vocab_size: ids are 0..vocab_size-1, specials included.
      pad_id: fills rows; never carries loss.
      bos_id: starts a text, or None where the tokenizer has none.
      eos_id: ends every document.
      fingerprint: changes whenever the same text could get other ids; keys the cache of tokenized text.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as int32 arrays, without the memory that lists of integers take."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens write nothing."""


class ByteTokenizer:
    """UTF-8 bytes: 0 pads, 1 begins, 2 ends, byte b is 3 + b. 259 ids, any text, nothing to train."""

    vocab_size, pad_id, bos_id, eos_id = 259, 0, 1, 2
    fingerprint = "bytes-1"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self._ids(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as int32 arrays."""
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens write nothing."""
        return bytes(i - 3 for i in map(int, ids) if 3 <= i < 259).decode(errors="replace")


class SymbolTokenizer:
    """One id for each character that the synthetic tasks can write: 0 pads, 1 begins, 2 ends, characters from 3.

    Raises:
      ConfigError: from `encode`, on a character outside `TASK_CHARACTERS`.
    """

    pad_id, bos_id, eos_id = 0, 1, 2
    vocab_size = 3 + len(TASK_CHARACTERS)
    fingerprint = "symbols-1"

    def __init__(self):
        self._id_of = np.full(0x200, -1, np.int32)
        self._id_of[[ord(character) for character in TASK_CHARACTERS]] = 3 + np.arange(len(TASK_CHARACTERS))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self._ids(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as int32 arrays."""
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self._id_of[np.minimum(codes, len(self._id_of) - 1)]
        ids[codes >= len(self._id_of)] = -1
        if (ids < 0).any():
            character = chr(codes[np.argmax(ids < 0)])
            raise ConfigError(
                f"tokenizer='symbols' has no {character!r} (U+{ord(character):04X}); it knows what the synthetic tasks "
                "write in symbols. Use tokenizer='bytes' for other text."
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens write nothing."""
        return "".join(TASK_CHARACTERS[i - 3] for i in map(int, ids) if 3 <= i < self.vocab_size)


def encode_examples(tokenizer: Tokenizer, examples: Sequence[Example]) -> tuple[list[np.ndarray], np.ndarray]:
    """Ids of prompt + answer together, and where the answer begins.

    The boundary is the number of ids of the prompt alone, as in the paper's task-loss code (`taskloss-eval`): where
    a merge spans the two, it moves by a token.

    Returns:
      Ids (int32) of each example without special tokens, and (examples,) int32 indices of the first answer token.
    """
    together = tokenizer.encode_arrays([example.prompt + example.answer for example in examples])
    prompts = tokenizer.encode_arrays([example.prompt for example in examples])
    starts = [min(len(prompt), len(ids)) for prompt, ids in zip(prompts, together, strict=True)]
    return together, np.array(starts, np.int32)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names.

    Raises:
      ConfigError: a spec of no known form.
      DataError: a file that is missing, broken, or has no end-of-text token.
    """
    from jaxmoe.data import tokenizer_files

    if spec == "bytes":
        return ByteTokenizer()
    if spec == "symbols":
        return SymbolTokenizer()
    if spec.endswith(".json"):
        return tokenizer_files.HuggingFaceTokenizer(spec)
    if spec.endswith(".model"):
        return tokenizer_files.SentencePieceTokenizer(spec)
    raise ConfigError(
        f"tokenizer={spec!r}; choose 'bytes', 'symbols', a *.json file (Hugging Face tokenizers) or a *.model file "
        "(sentencepiece)."
    )


def tokenizer_of(data: DataConfig) -> Tokenizer:
    """`load_tokenizer` of a configuration's.

    Raises:
      ConfigError, DataError: as there; a file that is not here, with the key that its folder would be given by.
    """
    spec = data.tokenizer
    try:
        return load_tokenizer(spec)
    except DataError as error:
        rooted = spec.startswith(("/", "~")) or "://" in spec
        if rooted or as_path(spec).exists():
            raise
        raise DataError(f"data.tokenizer: {error} Give the folder that it is in as data.root.") from error


def require_any_text(tokenizer: Tokenizer, source: str) -> None:
    """Checks that `tokenizer` can write more than the synthetic tasks in symbols.

    Raises:
      ConfigError: naming the source that needs it.
    """
    if isinstance(tokenizer, SymbolTokenizer):
        raise ConfigError(
            f"tokenizer='symbols' cannot write the text of source {source!r}; use 'bytes' or a tokenizer file."
        )


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that a model with `vocab_size` embeddings has one for every id.

    Raises:
      ConfigError: naming both sizes.
    """
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; set "
            f"model.vocab_size={tokenizer.vocab_size} or more."
        )
