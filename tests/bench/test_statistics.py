"""Medians, percentiles, and the order of rounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.statistics import interleave, median, percentile, summarize


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], 3.0), ([9.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 3.0, 100.0], 3.5)],
)
def test_the_median_is_in_the_middle_whatever_the_order(values, expected):
    assert median(values) == expected


def test_a_summary_has_the_whole_spread():
    assert summarize([5.0, 1.0, 9.0]) == (5.0, 1.0, 9.0, 3)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100), (0.001, 1)]
)
def test_a_percentile_is_a_value_that_was_measured(share, expected):
    assert percentile(list(range(1, 101)), share) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 1.0))
def test_no_more_than_the_rest_is_over_a_percentile(values, share):
    ordered = sorted(values)
    at = percentile(ordered, share)
    assert sum(value <= at for value in values) >= share * len(values) - 1e-6
    assert sum(value < at for value in values) < share * len(values) + 1e-6


def test_rounds_take_turns():
    assert list(interleave("AB", 3)) == [
        (0, "A"), (0, "B"), (1, "A"), (1, "B"), (2, "A"), (2, "B"),
    ]  # fmt: skip
