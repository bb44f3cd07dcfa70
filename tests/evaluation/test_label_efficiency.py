"""Areas, tests and adjustments, beside values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from samadapt.evaluation.label_efficiency import (
    Curve,
    area_under_budget_curve,
    corrected_paired_test,
    duels,
    holm,
    mean_curve,
    shared_stretch,
)

shares = st.floats(0, 1)


def test_the_area_is_that_of_trapezoids_by_their_stretch():
    # (0.2 + 0.6) / 2 * 10 + (0.6 + 0.8) / 2 * 30 = 4 + 21
    assert area_under_budget_curve([10, 20, 50], [0.2, 0.6, 0.8], 10, 50) == pytest.approx(25 / 40)


def test_the_area_of_a_part_cuts_the_curve_between_its_rounds():
    # from 15 (Dice 0.4) to 20 (0.6), then to 35 (0.7): 2.5 + 9.75
    assert area_under_budget_curve([10, 20, 50], [0.2, 0.6, 0.8], 15, 35) == pytest.approx(12.25 / 20)


@pytest.mark.parametrize(("low", "high"), [(5, 20), (10, 60), (20, 20), (30, 20)])
def test_no_area_where_the_curve_does_not_reach(low, high):
    assert math.isnan(area_under_budget_curve([10, 20, 50], [0.2, 0.6, 0.8], low, high))


@given(st.lists(shares, min_size=2, max_size=8), st.data())
def test_the_area_lies_within_the_curve_and_a_better_curve_has_no_smaller_one(dice, data):
    steps = data.draw(st.lists(st.integers(1, 50), min_size=len(dice), max_size=len(dice)))
    budget = list(itertools.accumulate(steps))
    area = area_under_budget_curve(budget, dice, budget[0], budget[-1])
    assert min(dice) - 1e-9 <= area <= max(dice) + 1e-9
    better = [data.draw(st.floats(value, 1)) for value in dice]
    assert area_under_budget_curve(budget, better, budget[0], budget[-1]) >= area - 1e-9


def test_curves_are_compared_where_all_of_them_are():
    assert shared_stretch([[10, 20, 40], [15, 30], [5, 35, 90]]) == (15, 30)


def test_the_corrected_test_by_hand():
    # mean 0.2, variance 0.02 / 3, 4 draws, test share 1/4: t = 0.2 / sqrt((1/4 + 1/4) * 0.02 / 3) = 3.4641; with 3
    # degrees of freedom P(T > t) = 1/2 - (theta + sin(theta) cos(theta)) / pi, theta = atan(t / sqrt(3))
    theta = math.atan(0.2 / math.sqrt(0.01 / 3) / math.sqrt(3))
    wanted = 1 - 2 * (theta + math.sin(theta) * math.cos(theta)) / math.pi
    assert corrected_paired_test([0.1, 0.2, 0.2, 0.3], 0.25) == pytest.approx(wanted)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=10).filter(lambda values: np.std(values) > 1e-3))
def test_without_overlap_it_is_the_paired_t_test_and_overlap_makes_it_more_careful(differences):
    plain = corrected_paired_test(differences, 0.0)
    assert plain == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=1e-9)
    assert corrected_paired_test(differences, 0.3) >= plain - 1e-12
    assert corrected_paired_test([-d for d in differences], 0.3) == pytest.approx(
        corrected_paired_test(differences, 0.3)
    )


@pytest.mark.parametrize(
    "differences",
    [
        [0.3],
        [0.1, 0.2, 0.3],  # too few draws to know how much they differ
        [0.0, 0.0, 0.0, 0.0],  # no spread: nothing to compare the mean with
        [0.701 - 0.7, 0.601 - 0.6, 0.501 - 0.5, 0.801 - 0.8],  # the same difference but for rounding
    ],
)
def test_few_draws_and_draws_without_spread_give_no_p_value(differences):
    assert math.isnan(corrected_paired_test(differences, 0.25))


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 by 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04 -> never falling: 0.06 at the end
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@given(st.lists(shares, max_size=8))
def test_holm_never_lowers_never_passes_one_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    assert all(
        a1 <= a2 for (p1, a1), (p2, a2) in itertools.permutations(zip(p_values, adjusted, strict=True), 2) if p1 < p2
    )


def test_what_was_not_tested_does_not_count_for_holm():
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[0] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])


def level(*heights):
    """Seed -> a curve of the same height from 10 to 20."""
    return {seed: Curve([10, 20], [height, height]) for seed, height in enumerate(heights)}


def test_duels_pair_by_seed():
    curves = {
        "good": level(0.8, 0.7, 0.9, 0.5),
        "bad": level(0.5, 0.75, 0.55, 0.4, 0.1),
        "lost": {0: Curve([10, 20], [math.nan, 0.5])},
    }
    first, *others = duels(curves, 0.2)
    assert (first.first, first.second, first.wins, first.losses) == ("good", "bad", 3, 1)
    assert first.difference == pytest.approx((0.3 - 0.05 + 0.35 + 0.1) / 4)
    assert all(math.isnan(duel.p_value) and not duel.significant for duel in others)
    assert first.adjusted == first.p_value  # the only one that was tested


def test_a_clear_and_steady_lead_is_significant_and_noise_is_not():
    steady = duels({"a": level(*(0.8 + 0.001 * n for n in range(5))), "b": level(*[0.6] * 5)}, 0.2)
    noisy = duels({"a": level(0.8, 0.4, 0.7, 0.5), "b": level(*[0.6] * 4)}, 0.2)
    assert steady[0].significant
    assert not noisy[0].significant


def test_a_duel_is_over_what_its_two_curves_share_whoever_else_plays():
    # the first leads by 0.2 late, trails by 0.1 early; a third that ends early must not hide the late part
    first = {seed: Curve([10, 20, 40], [0.2, 0.5, 0.9 + 0.01 * seed]) for seed in range(4)}
    second = {seed: Curve([10, 20, 50], [0.3, 0.6, 0.6]) for seed in range(4)}
    short = {seed: Curve([5, 12], [0.1, 0.1]) for seed in range(3)}
    (alone,) = duels({"first": first, "second": second}, 0.2)
    found = {(duel.first, duel.second): duel for duel in duels({"short": short, "first": first, "second": second}, 0.2)}
    among = found["first", "second"]
    assert (among.difference, among.p_value, among.stretch) == (alone.difference, alone.p_value, alone.stretch)
    # (-0.1 * 10 + mean of -0.1 and 0.3 .. 0.33 * 20) / 30
    assert alone.difference == pytest.approx(np.mean([(-1 + (0.2 + 0.01 * n) * 10) / 30 for n in range(4)]))
    assert alone.stretch == (10, 40)
    assert found["short", "first"].stretch == (10, 12)


def test_a_stretch_is_the_mean_over_the_seeds_that_were_compared():
    first = {0: Curve([10, 20], [0.2, 0.4]), 1: Curve([20, 40], [0.2, 0.4]), 2: Curve([1, 2], [0.2, 0.4])}
    second = {0: Curve([10, 30], [0.2, 0.4]), 1: Curve([10, 30], [0.2, 0.4]), 2: Curve([3, 4], [0.2, 0.4])}
    (duel,) = duels({"first": first, "second": second}, 0.2)
    assert duel.stretch == (15, 25)
    (apart,) = duels({"first": {2: first[2]}, "second": {2: second[2]}}, 0.2)
    assert all(map(math.isnan, (*apart.stretch, apart.difference)))


def test_the_mean_curve_is_taken_round_by_round():
    spent, dice = mean_curve([[10, 20, 30], [20, 40], [15, 30]], [[0.2, 0.4, 0.9], [0.4, 0.8], [0.3, 0.6]])
    assert spent == [15, 30]
    assert [one.mean for one in dice] == pytest.approx([0.3, 0.6])
    assert 0 <= dice[0].low < 0.3 < dice[0].high <= 1
