"""How much Dice a budget of labels buys: curves, the area under them, and whether one way to choose beats another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import integrate, stats

from samadapt.evaluation.intervals import Estimate, estimate

SIGNIFICANT = 0.05
"""Adjusted p-value below which a win is called one."""


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
        0..1; NaN with fewer than two draws.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return math.nan
    deviation = math.sqrt((1 / len(values) + test_share) * float(values.var(ddof=1)))
    if deviation == 0:
        return 1.0 if values[0] == 0 else 0.0
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
    """Two ways to choose, by the areas under their curves for the same seeds.

    Attributes:
        first: name.
        second: name.
        wins: seeds with a larger area for the first.
        losses: seeds with a larger area for the second.
        difference: mean area of the first less that of the second.
        p_value: of ``corrected_paired_test``.
        adjusted: the same, by ``holm`` over all duels.
    """

    first: str
    second: str
    wins: int
    losses: int
    difference: float
    p_value: float
    adjusted: float

    @property
    def significant(self) -> bool:
        """Whether the difference is more than chance explains."""
        return self.adjusted < SIGNIFICANT


def duels(areas: Mapping[str, Mapping[int, float]], test_share: float) -> list[Duel]:
    """Every pair of ``areas``, over the seeds that both have.

    Args:
        areas: name -> seed -> area under the curve; NaN do not count.
        test_share: see ``corrected_paired_test``.
    """
    found = []
    for first, second in itertools.combinations(areas, 2):
        seeds = sorted(areas[first].keys() & areas[second].keys())
        differences = [areas[first][seed] - areas[second][seed] for seed in seeds]
        found.append((first, second, [value for value in differences if not math.isnan(value)]))
    p_values = [corrected_paired_test(differences, test_share) for _, _, differences in found]
    return [
        Duel(
            first,
            second,
            sum(value > 0 for value in differences),
            sum(value < 0 for value in differences),
            float(np.mean(differences)) if differences else math.nan,
            p_value,
            adjusted,
        )
        for (first, second, differences), p_value, adjusted in zip(found, p_values, holm(p_values), strict=True)
    ]


def mean_curve(
    budgets: Sequence[Sequence[float]], dice: Sequence[Sequence[float]]
) -> tuple[list[float], list[Estimate]]:
    """Round by round over several runs: mean budget, and mean Dice with its bootstrap interval over the runs.

    Args:
        budgets: of each run, cumulative, one for each round.
        dice: of each run, 0..1, one for each round.

    Returns:
        As many values as the shortest run has rounds.
    """
    spent = [float(np.mean(values)) for values in zip(*budgets, strict=False)]
    return spent, [estimate(values) for values in zip(*dice, strict=False)]
