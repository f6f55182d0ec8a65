"""A source: named rows and examples, whatever they were made from."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxmoe.config import SourceConfig
from jaxmoe.data.layouts import Arrangement, Batch, Layout
from jaxmoe.data.seeding import generator

_ARRANGEMENTS_KEPT = 3


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and the answer to it.

    Attributes:
      prompt, answer: texts; the model is trained on their concatenation followed by the end token.
      final: what accuracy compares of a generated answer, where that is less than all of it.
      values: (start, end) characters of `answer` that only knowledge can predict, in order, where the rest of it is
        fixed words.
    """

    prompt: str
    answer: str
    final: str | None = None
    values: tuple[tuple[int, int], ...] = ()


class Source:
    """One entry of `DataConfig.sources`, tokenized and laid out in rows of S.

    Training rows are numbered without end: row i belongs to epoch i // rows_per_epoch, and each epoch has its own
    order, drawn from the run's seed, the source's name and the epoch. Other splits are finite and in file order.

    Attributes:
      name, config: as in the configuration.
      index: position among the mixture's sources.
      rows_per_epoch: rows of the training split.
      tokens_per_epoch: predicted positions of the training split; padding is none.
      skipped_records: records left out, by reason in `skipped`.
      fingerprint: changes with the tokens of any split, so with the files, the tokenizer or the seed.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        layouts: Mapping[str, Layout],
        *,
        seed: int,
        content: Iterable[bytes],
        index: int = 0,
        examples: Mapping[str, Sequence[Example]] | None = None,
        skipped: Mapping[str, int] | None = None,
    ):
        """Takes the rows of each split; `content` holds digests of what they were made of."""
        self.name, self.config, self.index = name, config, index
        self.skipped = dict(skipped or {})
        self.fingerprint = hashlib.sha256(b"".join(content)).hexdigest()[:16]
        self._layouts = dict(layouts)
        self._examples = dict(examples or {})
        self._seed = seed
        self._lock = threading.Lock()
        self._arrangements: collections.OrderedDict[tuple[str, int], Arrangement] = collections.OrderedDict()

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that have rows."""
        return tuple(split for split, layout in self._layouts.items() if layout.row_count)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch of the training split."""
        return self.row_count("train")

    @property
    def tokens_per_epoch(self) -> int:
        """Predicted positions of one epoch of the training split."""
        return self.token_count("train")

    @property
    def skipped_records(self) -> int:
        """Records left out while reading, for any reason."""
        return sum(self.skipped.values())

    def row_count(self, split: str) -> int:
        """Rows of a split (of one epoch of it); 0 where the source has none."""
        layout = self._layouts.get(split)
        return 0 if layout is None else layout.row_count

    def token_count(self, split: str) -> int:
        """Predicted positions of a split (of one epoch of it)."""
        layout = self._layouts.get(split)
        return 0 if layout is None else layout.token_count

    def example_count(self, split: str) -> int:
        """Examples of a split."""
        return len(self._examples.get(split, ()))

    def rows(self, indices: Sequence[int] | np.ndarray, split: str = "train") -> Batch:
        """Rows by number, in the order asked for.

        Args:
          indices: of the training split any number >= 0; of another split in [0, row_count(split)).
          split: `train` or `test`.

        Returns:
          Arrays of (len(indices), S), and `source` (len(indices),) filled with `index`.
        """
        indices = np.asarray(indices, np.int64)
        count = self.row_count(split)
        if count == 0:
            raise ValueError(f"source {self.name!r} has no {split} rows.")
        limit = None if split == "train" else count
        if indices.size and (indices.min() < 0 or (limit is not None and indices.max() >= limit)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {self.name!r}, which has {count} {split} rows.")
        epochs, places = np.divmod(indices, count)
        present = np.unique(epochs)
        if len(present) <= 1:
            batch = self._arrangement(split, int(present[0]) if len(present) else 0).rows(places)
        else:
            batch = {}
            for epoch in present:
                chosen = epochs == epoch
                for key, values in self._arrangement(split, int(epoch)).rows(places[chosen]).items():
                    batch.setdefault(key, np.empty((len(indices), *values.shape[1:]), values.dtype))[chosen] = values
        batch["source"] = np.full(len(indices), self.index, np.int32)
        return batch

    def tokens_before(self, row: int) -> int:
        """Predicted positions of training rows 0..row-1, over as many epochs as that takes."""
        if row == 0:
            return 0
        epochs, rest = divmod(row, self.rows_per_epoch)
        partial = self._arrangement("train", epochs).tokens_before(rest) if rest else 0
        return epochs * self.tokens_per_epoch + partial

    def examples(self, split: str, limit: int | None = None, seed: int = 0) -> list[Example]:
        """Examples of a split, at most `limit`: always the same ones for the same seed.

        Args:
          split: `train` (as trained on), `test`, and for reasoning `train_clean` (the training problems with
            correct solutions).
          limit: None takes all.
          seed: which subset, where the limit leaves some out.

        Returns:
          The examples in their order in the split; none for text.
        """
        examples = self._examples.get(split, ())
        if limit is None or limit >= len(examples):
            return list(examples)
        chosen = generator(seed, "examples").permutation(len(examples))[:limit]
        return [examples[i] for i in sorted(chosen)]

    def _arrangement(self, split: str, epoch: int) -> Arrangement:
        key = (split, epoch)
        with self._lock:
            if key in self._arrangements:
                self._arrangements.move_to_end(key)
                return self._arrangements[key]
        random = generator(self._seed, self.name, "order", epoch) if split == "train" else None
        arrangement = self._layouts[split].arrange(random)
        with self._lock:
            self._arrangements[key] = arrangement
            while len(self._arrangements) > _ARRANGEMENTS_KEPT:
                self._arrangements.popitem(last=False)
        return arrangement
