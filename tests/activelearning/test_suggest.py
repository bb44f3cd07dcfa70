"""Which slices to label: few, spread out, uncertain, with something on them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samadapt.activelearning.strategy import Candidate
from samadapt.activelearning.suggest import evenly, suggest_slices
from samadapt.inference.examine import Examination


def examined(doubt, areas):
    doubt, areas = np.asarray(doubt, dtype=float), np.asarray(areas).reshape(len(doubt), -1)
    none = np.full(areas.shape[1], np.nan)
    return Candidate("case", examination=Examination(2, areas, doubt, np.zeros(areas.shape), none))


@given(total=st.integers(0, 400), count=st.integers(1, 20))
def test_even_slices_leave_no_large_gap(total, count):
    found = evenly(total, count)
    assert len(set(found)) == len(found) == min(total, count)
    if found:
        edges = [-1, *found, total]
        assert max(np.diff(edges)) <= -(-total // len(found)) + 1


def test_doubtful_slices_with_foreground_are_spread_over_it():
    doubt, areas = np.full(100, 0.95), np.zeros(100)
    areas[40:60] = 100
    doubt[40:60] = 0.1
    doubt[[41, 47, 48, 49, 58]] = 0.5
    found = suggest_slices(examined(doubt, areas), 3)
    assert all(40 <= n < 60 for n in found)
    assert len(set(found) & {41, 58}) == 2  # not all three from 47 to 49


def test_the_most_doubtful_slice_comes_first():
    doubt = np.linspace(0.1, 0.9, 10)
    assert suggest_slices(examined(doubt, np.full(10, 9)), 4)[0] == 9


def test_specks_at_the_ends_of_an_object_do_not_count():
    doubt = [0.9, 0.3, 0.4, 0.3, 0.9]
    assert set(suggest_slices(examined(doubt, [2, 80, 100, 80, 2]), 5)) == {1, 2, 3}


def test_a_small_class_counts_by_its_own_size():
    found = suggest_slices(examined([0.2, 0.2, 0.9], [[500, 0], [500, 0], [0, 6]]), 2)
    assert found[0] == 2


def test_suspicion_counts_where_nothing_is_found():
    assert suggest_slices(examined([0, 0, 0.6, 0], [0, 0, 0, 0])) == [2]


def test_before_a_model_slices_of_every_kind():
    rows = np.full((30, 4), np.nan, np.float32)
    rows[0:10:2] = np.eye(4)[0] + np.random.default_rng(0).normal(0, 0.01, (5, 4))
    rows[10:16:2] = np.eye(4)[1] + np.random.default_rng(1).normal(0, 0.01, (3, 4))
    rows[20] = np.eye(4)[2]
    found = suggest_slices(Candidate("case", slice_descriptors=rows), 3)
    assert found[0] < 10 <= found[1] < 16
    assert found[2] == 20


@pytest.mark.parametrize(
    ("case", "found"),
    [
        (Candidate("case"), []),
        (Candidate("case", slice_descriptors=np.full((9, 4), np.nan, np.float32)), [1, 4, 7]),
        (examined([0.0] * 9, [0] * 9), [1, 4, 7]),
        (examined([0.0], [5]), [0]),
        (Candidate("case", slice_descriptors=np.ones((1, 4), np.float32)), [0]),
    ],
)
def test_with_little_or_nothing_known(case, found):
    assert suggest_slices(case, 3) == found


def test_the_number_of_slices_is_enough_for_an_even_choice():
    assert suggest_slices(Candidate("case"), 2, total=8) == [2, 6]
