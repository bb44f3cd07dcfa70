"""How much Dice a budget of labels buys: curves, the area under them, and whether one way to choose beats another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import integrate, stats

from samadapt.evaluation.intervals import DICE, Estimate, estimate

SIGNIFICANT = 0.05
"""Adjusted p-value below which a win is called one."""

FEWEST_DRAWS = 4
"""With fewer the spread of the differences is hardly known, and no p-value is given."""

NO_SPREAD = 1e-9
"""Standard deviation of differences below which they are the same but for rounding."""


class Curve(NamedTuple):
    """What one run reached over a budget.

    Attributes:
        budget: cumulative, one for each round, rising.
        dice: 0..1, one for each round; NaN where none was defined.
    """

    budget: Sequence[float]
    dice: Sequence[float]


def area_under_budget_curve(budget: Sequence[float], dice: Sequence[float], low: float, high: float) -> float:
    """Mean height of a label-efficiency curve over a stretch of the budget (AUBC of Zhan et al., "A Comparative Survey
    of Deep Active Learning", arXiv 2203.13450): trapezoids between the rounds, divided by the stretch.

    Args:
        budget: cumulative, one for each round, rising.
        dice: 0..1, one for each round.
        low: where the stretch begins; at least the first of ``budget``.
        high: where it ends; at most the last of ``budget``.

    Returns:
        0..1; NaN where the stretch is empty or reaches beyond the rounds.
    """
    if not low < high or low < budget[0] or high > budget[-1]:
        return math.nan
    inner = [(x, y) for x, y in zip(budget, dice, strict=True) if low < x < high]
    ends = np.interp([low, high], budget, dice)
    x = [low, *(x for x, _ in inner), high]
    y = [ends[0], *(y for _, y in inner), ends[1]]
    return float(integrate.trapezoid(y, x) / (high - low))


def shared_stretch(budgets: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The part of the budget that every one of several curves covers; its end may lie before its start."""
    return max(budget[0] for budget in budgets), min(budget[-1] for budget in budgets)


def corrected_paired_test(differences: Sequence[float], test_share: float) -> float:
    """Two-sided p-value that the mean of ``differences`` is 0: the corrected resampled t-test of Nadeau and Bengio
    ("Inference for the Generalization Error", Machine Learning 52, 2003, section 3), with J - 1 degrees of freedom.

    Repeated draws from one set of cases overlap, so that a plain t-test finds differences where there are none; here
    the variance of the mean is (1/J + ``test_share``) instead of 1/J times that of the differences.

    Args:
        differences: one for each of J draws of test cases and pool.
        test_share: test cases of a draw, by its other cases.

    Returns:
        0..1; NaN with fewer than ``FEWEST_DRAWS`` draws, and where all differences are the same.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < FEWEST_DRAWS or values.std() < NO_SPREAD:
        return math.nan
    deviation = math.sqrt((1 / len(values) + test_share) * float(values.var(ddof=1)))
    return float(2 * stats.t.sf(abs(values.mean()) / deviation, df=len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being many (Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian
    Journal of Statistics 6, 1979). NaN stay NaN and do not count."""
    defined = sorted((p, n) for n, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, n) in enumerate(defined):
        largest = max(largest, min(1.0, (len(defined) - rank) * p))
        adjusted[n] = largest
    return adjusted


@dataclass(frozen=True)
class Duel:
    """Two ways to choose, by the areas under their curves for the same seeds, over what these two curves share.

    Attributes:
        first: name.
        second: name.
        stretch: first and last budget of that part, mean over the seeds; NaN where there is none.
        wins: seeds with a larger area for the first.
        losses: seeds with a larger area for the second.
        difference: mean area of the first less that of the second.
        p_value: of ``corrected_paired_test``.
        adjusted: the same, by ``holm`` over all duels.
    """

    first: str
    second: str
    stretch: tuple[float, float]
    wins: int
    losses: int
    difference: float
    p_value: float
    adjusted: float

    @property
    def significant(self) -> bool:
        """Whether the difference is more than chance explains."""
        return self.adjusted < SIGNIFICANT


def duels(curves: Mapping[str, Mapping[int, Curve]], test_share: float) -> list[Duel]:
    """Every pair of ``curves``, over the seeds that both have; what others reach has no part in it.

    Args:
        curves: name -> seed -> curve. A seed whose two curves share no part of the budget does not count.
        test_share: see ``corrected_paired_test``.
    """
    found = [
        (first, second, _differences(curves[first], curves[second]))
        for first, second in itertools.combinations(curves, 2)
    ]
    p_values = [corrected_paired_test([value for value, _ in pairs], test_share) for _, _, pairs in found]
    return [
        Duel(
            first,
            second,
            mean_stretch([stretch for _, stretch in pairs]),
            sum(value > 0 for value, _ in pairs),
            sum(value < 0 for value, _ in pairs),
            float(np.mean([value for value, _ in pairs])) if pairs else math.nan,
            p_value,
            adjusted,
        )
        for (first, second, pairs), p_value, adjusted in zip(found, p_values, holm(p_values), strict=True)
    ]


def mean_stretch(stretches: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean begin and mean end; NaN without any."""
    begin, end = np.mean(stretches, axis=0) if stretches else (math.nan, math.nan)
    return float(begin), float(end)


def _differences(first: Mapping[int, Curve], second: Mapping[int, Curve]) -> list[tuple[float, tuple[float, float]]]:
    """By seed, areas of the first less those of the second, each with the stretch that it is over."""
    found = []
    for seed in sorted(first.keys() & second.keys()):
        stretch = shared_stretch([first[seed].budget, second[seed].budget])
        mine, its = (area_under_budget_curve(*curve, *stretch) for curve in (first[seed], second[seed]))
        found.append((mine - its, stretch))
    return [pair for pair in found if not math.isnan(pair[0])]


def mean_curve(
    budgets: Sequence[Sequence[float]], dice: Sequence[Sequence[float]]
) -> tuple[list[float], list[Estimate]]:
    """Round by round over several runs: mean budget, and mean Dice with its interval over the runs.

    Args:
        budgets: of each run, cumulative, one for each round.
        dice: of each run, 0..1, one for each round.

    Returns:
        As many values as the shortest run has rounds.
    """
    spent = [float(np.mean(values)) for values in zip(*budgets, strict=False)]
    return spent, [estimate(values, DICE) for values in zip(*dice, strict=False)]
