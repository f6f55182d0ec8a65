"""What responses are worth beside the others to the same prompt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxmoe.post_training import equal_groups, group_advantages


def test_three_right_of_five():
    found = group_advantages(np.array([[1, 0, 0, 1, 0]]))
    np.testing.assert_allclose(found, [[1.095443, -0.730295, -0.730295, 1.095443, -0.730295]], atol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_teaches_nothing(reward):
    assert (group_advantages(np.full((2, 5), reward)) == 0).all()
    assert equal_groups(np.full((2, 5), reward)).all()


def test_a_group_of_one_has_mean_0_and_deviation_1():
    np.testing.assert_allclose(group_advantages(np.array([[1.0], [0.0]])), [[1 / (1 + 1e-6)], [0.0]])


@given(arrays.arrays(np.float32, (3, 6), elements=st.sampled_from([0.0, 0.25, 1.0])))
def test_a_group_is_centred_and_of_unit_spread_unless_it_is_equal(rewards):
    found = group_advantages(rewards)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(found.std(axis=1, ddof=1), np.where(equal_groups(rewards), 0, 1), atol=1e-4)
