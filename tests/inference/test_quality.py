"""Estimates of what a mask is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samadapt.inference.examine import Examination
from samadapt.inference.quality import PRIOR_ERROR, Calibration, calibrate, quality

share = st.floats(0, 1)


def examination(overlap, doubt=(0.0, 0.3, 0.9, 0.1)):
    doubt = np.array(doubt)
    classes = len(overlap)
    return Examination(
        2, np.ones((len(doubt), classes), int), doubt, np.tile(doubt[:, None], classes), np.array(overlap)
    )


def test_without_cases_nothing_is_set_right():
    assert Calibration.of([], []) == Calibration(0.0, PRIOR_ERROR, 0)
    assert Calibration.of([0.5, math.nan], [math.nan, 0.5]) == Calibration()


def test_many_overconfident_cases_set_the_next_right():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.3, 0.8, 60)
    raw = truth + 0.15 + rng.normal(0, 0.02, 60)
    found = Calibration.of(raw[:50], truth[:50])
    after = [found.estimate(value) for value in raw[50:]]
    assert np.abs(after - truth[50:]).mean() < 0.03 < np.abs(raw[50:] - truth[50:]).mean()
    assert 0.01 < found.error < 0.04


def test_one_odd_case_counts_for_little():
    assert -0.3 < Calibration.of([0.9], [0.1]).shift < 0
    assert Calibration.of([0.9], [0.1]).error > PRIOR_ERROR


@given(st.lists(st.tuples(share, share), max_size=8), share)
def test_an_estimate_is_a_dice(pairs, raw):
    found = Calibration.of([r for r, _ in pairs], [t for _, t in pairs])
    assert 0 <= found.estimate(raw) <= 1
    assert found.error > 0


@given(st.lists(st.tuples(share, share), min_size=1, max_size=8), share, share)
def test_a_better_raw_figure_is_never_a_worse_estimate(pairs, one, other):
    found = Calibration.of([r for r, _ in pairs], [t for _, t in pairs])
    assert (one <= other) == (found.estimate(one) <= found.estimate(other)) or found.estimate(one) == found.estimate(
        other
    )


def test_classes_that_are_nowhere_have_no_estimate_and_slices_come_worst_first():
    names = ("liver", "tumour")
    kept = calibrate(names, [{"liver": 0.9, "tumour": math.nan}], [{"liver": 0.6, "tumour": 0.0}])
    found = quality(names, examination([0.9, math.nan]), kept)
    assert set(found.dice) == {"liver"}
    assert found.dice["liver"] == pytest.approx(0.8)
    assert found.unsure == [2, 1, 3]
    assert found.to_dict()["mean"] == 0.8
    assert found.to_dict()["not_found"] == ["tumour"]


def test_the_slices_to_look_at_first_lie_in_what_was_found():
    """One doubtful speckle in each slice beside the object is more doubt on the mean, and nothing to look at."""
    areas = np.array([[0], [0], [40], [60], [40], [0], [1]])
    doubt = np.array([0.9, 0.8, 0.2, 0.0, 0.3, 0.7, 0.6])
    found = quality(("liver",), Examination(2, areas, doubt, doubt[:, None], np.array([0.9])), {})
    assert found.unsure == [4, 2]
    nowhere = quality(("liver",), Examination(2, 0 * areas, doubt, doubt[:, None], np.array([0.0])), {})
    assert nowhere.unsure == [0, 1, 5, 6, 4]


def test_nothing_found_has_no_mean():
    found = quality(("liver",), examination([math.nan]), {})
    assert math.isnan(found.mean)
    assert found.to_dict()["mean"] is None
