"""Seeds: streams are told apart by their keys, rows drawn without replacement are distinct."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.data.seeding import distinct_rows, generator


def test_a_stream_depends_on_every_key():
    streams = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "ab"), (0, "a", "b")]
    drawn = {tuple(generator(*keys).integers(0, 2**62, size=4).tolist()) for keys in streams}
    assert len(drawn) == len(streams)
    assert generator(3, "x").integers(0, 2**62) == generator(3, "x").integers(0, 2**62)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(0, 300), st.integers(0, 9))
def test_rows_are_distinct_and_in_range(radices, wanted, seed):
    count = min(wanted, int(np.prod(radices)))
    rows = distinct_rows(generator(seed), radices, count)
    assert rows.shape == (count, len(radices))
    assert len({tuple(row) for row in rows.tolist()}) == count
    assert (rows >= 0).all()
    assert (rows < radices).all()


def test_rows_of_a_range_too_large_to_list_are_distinct_and_uniform():
    rows = distinct_rows(generator(0), (200,) * 9, 20_000)
    assert len(np.unique(rows, axis=0)) == 20_000
    assert rows.max() == 199
    assert abs(rows.mean() - 99.5) < 5 * np.sqrt((200**2 - 1) / 12 / rows.size)


def test_the_whole_range_can_be_drawn():
    rows = distinct_rows(generator(0), (4, 5), 20)
    assert sorted(map(tuple, rows.tolist())) == [(a, b) for a in range(4) for b in range(5)]
    with pytest.raises(ValueError, match="21 distinct rows wanted, but only 20 exist"):
        distinct_rows(generator(0), (4, 5), 21)
