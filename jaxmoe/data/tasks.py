"""What the synthetic tasks share: examples of one split as rows, one example a row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxmoe.config import ConfigError, SourceConfig
from jaxmoe.data.layouts import Documents, PaddedLayout
from jaxmoe.data.source import Example, Source
from jaxmoe.data.tokenizers import Tokenizer, encode_examples


def task_source(
    name: str,
    config: SourceConfig,
    splits: Mapping[str, list[Example]],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    run_seed: int,
    index: int,
    prompt_weight: float,
) -> Source:
    """A source of padded rows from the examples of each split.

    Raises:
      ConfigError: an example does not fit a row; the message says which sequence_length would do.
    """
    layouts = {}
    for split, examples in splits.items():
        tokens, answer_starts = encode_examples(tokenizer, examples)
        documents = Documents.from_arrays(tokens, tokenizer.eos_id, answer_starts)
        longest = int(documents.lengths.max())
        if longest > sequence_length + 1:
            raise ConfigError(
                f"an example of source {name!r} has {longest} tokens with this tokenizer (end token included), but "
                f"a row of sequence_length={sequence_length} holds {sequence_length + 1}; "
                f"sequence_length={longest - 1} or more is needed."
            )
        layouts[split] = PaddedLayout(documents, sequence_length, tokenizer.pad_id, prompt_weight)
    content = [layout.documents.digest() for layout in layouts.values()]
    return Source(name, config, layouts, seed=run_seed, content=content, index=index, examples=splits)


def texts_of(characters: np.ndarray) -> list[str]:
    """(n, length) characters as n strings."""
    joined = np.ascontiguousarray(characters).view(f"<U{characters.shape[1]}").ravel()
    return joined.tolist()
