"""Every row is in one tile, of its own group, and the tiles' number never passes its static bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.group_tiles import most_tiles, tiles_of_groups

ROWS, EXPERTS = 70, 5
tiles = jax.jit(tiles_of_groups, static_argnums=(1, 2))


@pytest.mark.parametrize("block", [1, 16, 64])
@settings(max_examples=40)
@given(sizes=st.lists(st.integers(0, 30), min_size=EXPERTS, max_size=EXPERTS).filter(lambda sizes: sum(sizes) <= ROWS))
def test_every_row_is_in_one_tile_of_its_group(sizes, block):
    group, start, stop = map(np.asarray, tiles(jnp.asarray(sizes, jnp.int32), ROWS, block))
    owner = np.repeat(np.arange(EXPERTS + 1), [*sizes, ROWS - sum(sizes)])
    seen = np.full(ROWS, -1)
    for this_group, first, end in zip(group, start, stop, strict=True):
        assert end - first <= block
        assert (seen[first:end] == -1).all()
        seen[first:end] = this_group
    np.testing.assert_array_equal(seen, owner)


def test_groups_that_each_end_one_row_into_a_tile_fill_the_bound():
    assert most_tiles(6 * 17, 5, 16) == 12
    group, start, _ = tiles(jnp.full(5, 17, jnp.int32), 6 * 17, 16)
    np.testing.assert_array_equal(group, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    np.testing.assert_array_equal(start[:4], [0, 16, 17, 33])


def test_fewer_rows_than_groups_need_no_more_tiles_than_rows():
    assert most_tiles(3, 100, 64) == 3
