"""Means with confidence intervals over cases."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 5000


@dataclass(frozen=True)
class Estimate:
    """A mean over cases.

    Attributes:
        mean: of the defined values; NaN where there is none.
        low: lower end of its 95 % confidence interval; NaN with fewer than two values.
        high: upper end.
        count: number of defined values.
    """

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3); NaN values do not count."""
    defined = np.array([value for value in values if not math.isnan(value)])
    if len(defined) < 2:
        return Estimate(float(defined[0]) if len(defined) else math.nan, math.nan, math.nan, len(defined))
    interval = bootstrap(
        (defined,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",  # defined for equal values, too, as BCa is not
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(defined.mean()), float(interval.low), float(interval.high), len(defined))
