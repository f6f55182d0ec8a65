"""Randomness from a seed and names: the same keys give the same stream, other keys an independent one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

_TABLE_LIMIT = 1 << 20


def generator(seed: int, *keys: str | int) -> np.random.Generator:
    """A PCG64 generator whose stream depends on `seed` and on every key, in order."""
    # Hashed because numpy.random.SeedSequence takes [1] and [1, 0] for the same entropy.
    digest = hashlib.sha256(json.dumps([seed, *keys]).encode()).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "big"))))


def distinct_rows(random: np.random.Generator, radices: Sequence[int], count: int) -> np.ndarray:
    """Draws rows without replacement, uniformly from the product of ranges.

    Args:
      random: consumed.
      radices: column c holds numbers in [0, radices[c]), radices[c] <= 256.
      count: rows wanted, at most the product of `radices`.

    Returns:
      (count, len(radices)) int64, all rows distinct, in random order.
    """
    total = 1
    for radix in radices:
        total *= radix
    if count > total:
        raise ValueError(f"{count} distinct rows wanted, but only {total} exist.")
    if total <= max(_TABLE_LIMIT, 4 * count):
        return np.stack(np.unravel_index(random.permutation(total)[:count], tuple(radices)), axis=1)
    rows = np.zeros((0, len(radices)), np.uint8)
    while len(rows) < count:
        drawn = random.integers(0, np.asarray(radices), size=(count - len(rows) + 16, len(radices))).astype(np.uint8)
        rows = np.concatenate([rows, drawn])
        keys = np.ascontiguousarray(rows).view(np.dtype((np.void, len(radices)))).ravel()
        first = np.unique(keys, return_index=True)[1]
        rows = rows[np.sort(first)]
    return rows[:count].astype(np.int64)
