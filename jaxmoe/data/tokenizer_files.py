"""Tokenizers that come from a file, and training one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxmoe.data.errors import DataError
from jaxmoe.data.files import read_bytes

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
"""What `train_tokenizer` calls its special tokens; their ids are 0, 1, 2."""

_PAD_NAMES = (PAD, "<PAD>", "[PAD]", "<|pad|>", "<|padding|>")
_BOS_NAMES = (BOS, "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
_EOS_NAMES = (EOS, "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizers` JSON file.

    Special tokens are those of a `tokenizer_config.json` beside the file, else the first of the usual names that the
    vocabulary has. Without a padding token the end token pads (padding carries no loss). Truncation and padding that
    the file asks for are switched off, and a special token's name in a text is read as text.
    """

    def __init__(self, path: str):
        import tokenizers

        content = read_bytes(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the binding raises bare Exception
            raise DataError(f"{path}: not a Hugging Face tokenizers file ({error}).") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is text, not the end of it
        named = _tokens_beside(path)
        id_of = self._tokenizer.token_to_id
        self.eos_id = _special(path, id_of, (named.get("eos_token"), *_EOS_NAMES), "end-of-text")
        self.bos_id = _first_known(id_of, (named.get("bos_token"), *_BOS_NAMES))
        pad = _first_known(id_of, (named.get("pad_token"), *_PAD_NAMES))
        self.pad_id = self.eos_id if pad is None else pad
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = "json-" + hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as int32 arrays."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens write nothing."""
        special = {self.pad_id, self.bos_id, self.eos_id}
        return self._tokenizer.decode([int(i) for i in ids if int(i) not in special], skip_special_tokens=True)


class SentencePieceTokenizer:
    """A sentencepiece `.model` file.

    Special ids are the model's own; where it has none (-1), the first of the usual names among its pieces. Without
    any padding piece the end piece pads.
    """

    def __init__(self, path: str):
        import sentencepiece

        content = read_bytes(path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataError(f"{path}: not a sentencepiece model ({error}).") from error
        pieces = self._processor

        def id_of(name: str) -> int | None:
            found = pieces.piece_to_id(name)
            return found if found != pieces.unk_id() or name == pieces.id_to_piece(pieces.unk_id()) else None

        self.eos_id = pieces.eos_id() if pieces.eos_id() >= 0 else _special(path, id_of, _EOS_NAMES, "end-of-text")
        self.bos_id = pieces.bos_id() if pieces.bos_id() >= 0 else _first_known(id_of, _BOS_NAMES)
        pad = pieces.pad_id() if pieces.pad_id() >= 0 else _first_known(id_of, _PAD_NAMES)
        self.pad_id = self.eos_id if pad is None else pad
        self.vocab_size = pieces.vocab_size()
        self.fingerprint = "model-" + hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return self._processor.encode(list(texts), out_type=int)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as int32 arrays."""
        return [np.asarray(ids, np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens write nothing."""
        special = {self.pad_id, self.bos_id, self.eos_id}
        return self._processor.decode([int(i) for i in ids if int(i) not in special])


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> bytes:
    """Trains a byte-level BPE tokenizer.

    Args:
      texts: the corpus; read once.
      vocab_size: ids in all: 3 special tokens, 256 bytes, and the merges.
      show_progress: draw bars.

    Returns:
      The content of a tokenizer JSON file that `load_tokenizer` reads. It may have fewer ids than asked for, where
      the corpus has no more pairs to merge.

    Raises:
      DataError: vocab_size below 259.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = [PAD, BOS, EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(special) + len(alphabet)
    if vocab_size < least:
        raise DataError(f"vocab_size={vocab_size}; 3 special tokens and 256 bytes need vocab_size >= {least}.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=sorted(alphabet),
            show_progress=show_progress,
        ),
    )
    return tokenizer.to_str(pretty=False).encode()


def _first_known(id_of, names: Iterable[str | None]) -> int | None:
    ids: Iterator[int] = (found for name in names if name and (found := id_of(name)) is not None)
    return next(ids, None)


def _special(path: str, id_of, names: Iterable[str | None], role: str) -> int:
    found = _first_known(id_of, names)
    if found is None:
        known = ", ".join(name for name in names if name)
        raise DataError(f"{path}: the vocabulary has no {role} token; one of {known} is needed.")
    return found


def _tokens_beside(path: str) -> dict[str, str]:
    """Names of the special tokens in the `tokenizer_config.json` of the same folder; empty where there is none."""
    from etils import epath

    beside = epath.Path(path).parent / "tokenizer_config.json"
    if not beside.exists():
        return {}
    try:
        values = json.loads(beside.read_text())
    except ValueError as error:
        raise DataError(f"{beside}: not JSON ({error}).") from error
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in tokens.items() if key.endswith("_token") and isinstance(value, str)}
