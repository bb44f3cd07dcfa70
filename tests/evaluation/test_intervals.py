import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from samadapt.evaluation.intervals import DICE, FEWEST, estimate


@given(st.lists(st.floats(0, 1), min_size=3, max_size=12))
def test_the_interval_contains_the_mean_and_lies_within_what_can_be(values):
    found = estimate(values, DICE)
    assert 0 <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= 1


@pytest.mark.parametrize("count", [3, 5, 8, 12])
def test_it_covers_the_true_mean_about_as_often_as_it_says(count):
    """Few values once gave "95 %" intervals that held the true mean half of the time."""
    random = np.random.default_rng(0)
    found = [estimate(random.normal(0.8, 0.05, count)) for _ in range(400)]
    assert 0.89 < np.mean([one.low <= 0.8 <= one.high for one in found]) <= 0.98


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=9))
def test_few_values_get_the_interval_of_students_t(values):
    found = estimate(values)
    if np.std(values) < 1e-6:
        assert (found.low, found.high) == pytest.approx((found.mean, found.mean), abs=1e-5)
    else:
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_an_interval_ends_where_the_quantity_does():
    assert estimate([0.9, 1.0, 1.0], DICE).high == 1.0
    assert estimate([0.0, 0.0, 0.1], DICE).low == 0.0
    assert estimate([0.9, 1.0, 1.0]).high > 1
    assert estimate([1.0, 9.0, 1.0], (0, math.inf)).low == 0


def test_the_interval_shrinks_as_the_root_of_the_number_of_cases():
    random = np.random.default_rng(0)
    widths = []
    for count in (10, 160):
        found = estimate(random.normal(0.7, 0.1, count))
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)
    assert widths[1] == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(160), rel=0.25)


def test_undefined_values_do_not_count():
    found = estimate([0.5, math.nan, 0.7, 0.6])
    assert (found.mean, found.count) == (pytest.approx(0.6), 3)
    assert found.low < 0.6 < found.high
    assert estimate([math.nan, 0.5]).mean == 0.5
    assert math.isnan(estimate([]).mean)


@pytest.mark.parametrize("count", range(FEWEST))
def test_too_few_values_have_no_interval(count):
    found = estimate([0.5, 0.7][:count])
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.count == count
