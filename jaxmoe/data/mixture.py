"""The mixture: which row of the run comes from which source, known for any row without counting up to it.

Row n of the run is row n % B of batch n // B. Rows follow a fixed pattern of period P in which source s appears
exactly c_s times, spread evenly: its i-th appearance stands at about (i + 1/2) / c_s of the period. So a batch's
content depends on nothing but the configuration, the seed and the step: not on hosts, threads or resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from jaxmoe.config import ConfigError, DataConfig, RunConfig
from jaxmoe.data.build import build_source
from jaxmoe.data.layouts import Batch
from jaxmoe.data.source import Source
from jaxmoe.data.tokenizers import Tokenizer, require_vocabulary, tokenizer_of

LONGEST_PERIOD = 1 << 20
"""Rows after which a mixture's pattern repeats, at most: the paper's smallest source is 9 rows of a million."""


@dataclasses.dataclass(frozen=True)
class SourceAccount:
    """What a source contributes to a run; every number is exact.

    Attributes:
      name: of the source.
      share: of the rows, by the weights.
      rows: rows of the run.
      tokens: predicted positions in them (padding is none).
      epochs: rows / rows_per_epoch; 0 for a source without training rows.
      rows_per_epoch, tokens_per_epoch: of its training split.
      skipped_records: left out while reading.
    """

    name: str
    share: float
    rows: int
    tokens: int
    epochs: float
    rows_per_epoch: int
    tokens_per_epoch: int
    skipped_records: int


class Pattern:
    """Assigns the rows 0, 1, 2, ... to sources in proportion to their weights.

    Where the weights are in proportion to whole numbers that add up to at most `LONGEST_PERIOD`, shares are exact;
    else they are rounded to 1 / LONGEST_PERIOD by largest remainder, and no positive weight is rounded to nothing.

    Attributes:
      counts: (sources,) int64 rows of each in a period.
      period: rows until the pattern repeats.
    """

    def __init__(self, weights: Sequence[float]):
        self.counts = whole_proportions(weights)
        self.period = int(self.counts.sum())
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        ordinal = np.arange(self.period) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        due = (ordinal + 0.5) / self.counts[source]
        order = np.lexsort((source, due))
        self._source, self._ordinal = source[order].astype(np.int32), ordinal[order].astype(np.int32)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row, and the row's number within its source."""
        periods, places = np.divmod(rows, self.period)
        source = self._source[places]
        return source, periods * self.counts[source] + self._ordinal[places]

    def rows_before(self, row: int) -> np.ndarray:
        """(sources,) how many of the rows 0..row-1 each source has."""
        periods, place = divmod(row, self.period)
        return periods * self.counts + np.bincount(self._source[:place], minlength=len(self.counts))


def whole_proportions(weights: Sequence[float]) -> np.ndarray:
    """(sources,) int64 in proportion to `weights`, adding up to at most `LONGEST_PERIOD`; see `Pattern`."""
    fractions = [Fraction(weight).limit_denominator(LONGEST_PERIOD) for weight in weights]
    if all(float(fraction) == weight for fraction, weight in zip(fractions, weights, strict=True)):
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        whole = [int(fraction * scale) for fraction in fractions]
        divisor = math.gcd(*whole)
        if sum(whole) // divisor <= LONGEST_PERIOD:
            return np.array([count // divisor for count in whole], np.int64)
    quotas = np.asarray(weights, np.float64) / math.fsum(weights) * LONGEST_PERIOD
    counts = np.floor(quotas).astype(np.int64)
    remaining = LONGEST_PERIOD - int(counts.sum())
    counts[np.argsort(counts - quotas, kind="stable")[:remaining]] += 1
    for starved in np.flatnonzero((quotas > 0) & (counts == 0)):
        counts[starved] += 1
        counts[np.argmax(counts)] -= 1
    return counts


class Mixture:
    """The batches of a run, by step.

    Attributes:
      sources: every source of the configuration, weight 0 included, in its order.
      tokenizer: shared by all.
      batch_size: B over all hosts.
      rows: which rows of each batch are made here.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        batch_size: int,
        sequence_length: int,
        steps: int,
        seed: int,
        tokenizer: Tokenizer | None = None,
        rows: Sequence[int] | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        """Builds the sources: generates the tasks, reads and tokenizes the files.

        Args:
          data: the configuration.
          batch_size: B, over all hosts.
          sequence_length: S.
          steps: how long `iterator` goes on.
          seed: the run's.
          tokenizer: None loads `data.tokenizer`.
          rows: numbers of the rows of each batch that this process needs, in rising order; None for all.
          cache_dir: for tokenized text, where `data.cache_dir` does not say; None: a temporary folder.

        Raises:
          ConfigError, DataError: in the words of whoever wrote the configuration or the files.
        """
        self.tokenizer = tokenizer_of(data) if tokenizer is None else tokenizer
        self.batch_size, self.sequence_length, self.steps, self.seed = batch_size, sequence_length, steps, seed
        self.rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
        if not np.array_equal(self.rows, np.intersect1d(self.rows, np.arange(batch_size))):
            raise ConfigError(f"rows={self.rows.tolist()}; choose of 0..{batch_size - 1}, in rising order.")
        cache = data.cache_dir if data.cache_dir is not None else cache_dir
        self.sources: list[Source] = []
        for index, (name, source) in enumerate(data.sources.items()):
            with _naming(name):
                self.sources.append(
                    build_source(
                        name, source, self.tokenizer,
                        sequence_length=sequence_length, run_seed=seed, cache_dir=cache, index=index,
                    )
                )  # fmt: skip
        for source in self.sources:
            if source.config.weight > 0 and source.rows_per_epoch == 0:
                raise ConfigError(f"source {source.name!r} has weight={source.config.weight} but no training rows.")
        self._pattern = Pattern([source.config.weight for source in self.sources])
        self._check_repeats()

    def _check_repeats(self) -> None:
        """Refuses a run that needs more of a source than there is, where the source must not be repeated."""
        rows = self._pattern.rows_before(self.steps * self.batch_size)
        for source, needed in zip(self.sources, rows.tolist(), strict=True):
            if getattr(source.config, "allow_repeat", True) or needed <= source.rows_per_epoch:
                continue
            raise ConfigError(
                f"source {source.name!r}: the run takes {needed * self.sequence_length:,} tokens of it, and it has "
                f"{source.tokens_per_epoch:,}: {needed / source.rows_per_epoch:.2f} epochs. Set allow_repeat=True, "
                "tokenize more, or lower its weight or train.steps."
            )

    @classmethod
    def of_run(
        cls,
        run: RunConfig,
        *,
        tokenizer: Tokenizer | None = None,
        rows: Sequence[int] | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> Mixture:
        """The batches of a run, whose model must have an embedding for every token.

        Args:
          run: the configuration.
          tokenizer: None loads `run.data.tokenizer`.
          rows: of each batch that this process needs; None for all.
          cache_dir: as for `Mixture`.

        Raises:
          ConfigError: the vocabulary is too small, which is known before any data is read, or as for `Mixture`.
        """
        tokenizer = tokenizer_of(run.data) if tokenizer is None else tokenizer
        require_vocabulary(tokenizer, run.model.vocab_size)
        return cls(
            run.data,
            batch_size=run.train.batch_size,
            sequence_length=run.train.sequence_length,
            steps=run.train.steps,
            seed=run.seed,
            tokenizer=tokenizer,
            rows=rows,
            cache_dir=cache_dir,
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names by the index that a batch's `source` holds."""
        return tuple(source.name for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Of all that the batches are made from and no configuration shows: files, the tokenizer's, tasks as drawn.

        Two mixtures of one configuration have equal batches if, and only if, they have equal fingerprints.
        """
        shape = [self.batch_size, self.sequence_length, self.seed, self._pattern.counts.tolist()]
        content = [[source.name, source.fingerprint] for source in self.sources]
        return hashlib.sha256(json.dumps([shape, content]).encode()).hexdigest()[:16]

    def contents(self) -> dict[str, Any]:
        """What the batches are made from, as JSON values to keep with a checkpoint; see `content_changes`.

        Nothing is read for it: text is hashed document by document when it is tokenized, everything else when it is
        loaded.
        """
        return {
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "sources": {
                source.name: {
                    "fingerprint": source.fingerprint,
                    **{
                        split: {"rows": source.row_count(split), "tokens": source.token_count(split)}
                        for split in source.splits
                    },
                }
                for source in self.sources
            },
        }

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) which source each row of a step is of, and the row's number within that source, over all hosts."""
        return self._pattern(step * self.batch_size + np.arange(self.batch_size, dtype=np.int64))

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of 0-based global step `step`."""
        return self.batches(step, 1)[0]

    def batches(self, first_step: int, count: int) -> list[Batch]:
        """The batches of `count` steps from `first_step` on; made together, small ones cost less."""
        share = len(self.rows)
        starts = np.arange(first_step, first_step + count, dtype=np.int64) * self.batch_size
        owner, numbers = self._pattern((starts[:, None] + self.rows).ravel())
        together: Batch = {}
        for index in np.unique(owner):
            chosen = np.flatnonzero(owner == index)
            for key, values in self.sources[index].rows(numbers[chosen]).items():
                if key not in together:
                    together[key] = np.empty((len(owner), *values.shape[1:]), values.dtype)
                together[key][chosen] = values
        parts = [slice(start, start + share) for start in range(0, len(owner), share)]
        return [{key: values[part] for key, values in together.items()} for part in parts]

    def accounting(self, steps: int | None = None) -> dict[str, SourceAccount]:
        """Rows, tokens and epochs of each source in the first `steps` steps (None: all), over all hosts."""
        rows = self._pattern.rows_before((self.steps if steps is None else steps) * self.batch_size)
        shares = self._pattern.counts / self._pattern.period
        return {
            source.name: SourceAccount(
                name=source.name,
                share=float(share),
                rows=int(count),
                tokens=source.tokens_before(int(count)),
                epochs=int(count) / source.rows_per_epoch if source.rows_per_epoch else 0.0,
                rows_per_epoch=source.rows_per_epoch,
                tokens_per_epoch=source.tokens_per_epoch,
                skipped_records=source.skipped_records,
            )
            for source, share, count in zip(self.sources, shares, rows, strict=True)
        }

    def iterator(self, start_step: int = 0):
        """A Grain iterator over this host's batches of steps start_step..steps-1; see `jaxmoe.data.pipeline`."""
        from jaxmoe.data.pipeline import batch_iterator

        return batch_iterator(self, start_step)


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    """Errors of a source say which one it is, where they do not yet."""
    try:
        yield
    except ConfigError as error:
        if f"source {source!r}" in str(error):
            raise
        raise type(error)(f"source {source!r}: {error}") from error


def content_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the data of two `Mixture.contents` differ, a line for each difference; empty if they are the same.

    Compared are the tokenizer, and of each source all tokens (of text: a hash of every document, in order). Where
    files lie and when they were written does not count, nor does anything that a configuration says.
    """
    lines = [] if before["tokenizer"] == now["tokenizer"] else ["the tokenizer is another one"]
    old, new = before["sources"], now["sources"]
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            lines.append(f"source {name!r} was {'not there' if name not in old else 'there, and is not now'}")
        elif old[name]["fingerprint"] != new[name]["fingerprint"]:
            splits = [split for split in dict.fromkeys([*old[name], *new[name]]) if split != "fingerprint"]
            sizes = [
                f"{split} had {_size(old[name].get(split))}, and has {_size(new[name].get(split))} now"
                for split in splits
                if old[name].get(split) != new[name].get(split)
            ]
            lines.append(f"source {name!r}: {'; '.join(sizes) or 'as many rows and tokens as before, but other ones'}")
    return lines


def _size(split: Mapping[str, int] | None) -> str:
    return "nothing" if split is None else f"{split['rows']:,} rows ({split['tokens']:,} tokens)"


def describe_accounting(accounts: Mapping[str, SourceAccount]) -> str:
    """The accounts as an aligned plain-text table."""
    header = ("source", "share", "rows", "tokens", "epochs", "rows/epoch", "tokens/epoch", "skipped")
    lines = [header] + [
        (
            account.name, f"{account.share:.2%}", f"{account.rows:,}", f"{account.tokens:,}", f"{account.epochs:.2f}",
            f"{account.rows_per_epoch:,}", f"{account.tokens_per_epoch:,}", f"{account.skipped_records:,}",
        )
        for account in accounts.values()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])]
    return "\n".join("  ".join(padded).format(*line) for line in lines)
