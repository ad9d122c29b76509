"""Group-relative advantages against the formula."""

import pytest

from eepo_fast.algorithm.advantages import group_advantages


def test_advantages_against_the_formula():
    rewards = [1.0, 0.0, 0.0, 1.0]
    expected = [(r - 0.5) / (3**-0.5 + 1e-6) for r in rewards]  # unbiased variance of two zeros and two ones: 1/3
    assert group_advantages(rewards) == pytest.approx(expected)


def test_advantages_of_equal_and_missing_rewards():
    assert group_advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    assert group_advantages([1.0, None, None]) == [0.0, 0.0, 0.0]
    with_gap, without = group_advantages([1.0, None, 0.0, 0.0]), group_advantages([1.0, 0.0, 0.0])
    assert with_gap == [without[0], 0.0, without[1], without[2]]
