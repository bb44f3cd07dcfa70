import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samadapt.evaluation.intervals import estimate


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_the_interval_contains_the_mean_and_lies_within_the_values(values):
    found = estimate(values)
    assert min(values) - 1e-9 <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= max(values) + 1e-9


def test_the_interval_shrinks_as_the_root_of_the_number_of_cases():
    random = np.random.default_rng(0)
    widths = []
    for count in (10, 160):
        found = estimate(random.normal(0.7, 0.1, count))
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)
    assert widths[1] == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(160), rel=0.25)


def test_undefined_values_do_not_count():
    found = estimate([0.5, math.nan, 0.7])
    assert (found.mean, found.count) == (pytest.approx(0.6), 2)
    assert estimate([math.nan, 0.5]).mean == 0.5
    assert math.isnan(estimate([0.5]).low)
    assert math.isnan(estimate([]).mean)
