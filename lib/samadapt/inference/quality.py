"""What a mask is worth without a label to compare it with: its Dice by class, foretold and set right on held-out cases.

The raw figure is the Dice that the mask would have if the model's probabilities were right (``Examination.overlap``).
Networks trained with Dice are too sure of themselves, so the held-out cases, where the truth is known, say by how much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samadapt.evaluation.metrics import mean
from samadapt.inference.examine import Examination, doubtful_foreground

PRIOR_CASES = 2.0
"""The correction counts for so many cases less than it comes from, so that one odd held-out case cannot turn it."""

PRIOR_ERROR = 0.1
"""Error of an estimate, in Dice, as long as no case has shown it."""


@dataclass(frozen=True)
class Calibration:
    """How far the raw figure of one class is from the truth.

    Attributes:
        shift: is added to the raw figure.
        error: root mean square error of the estimates after that, each case left out once.
        cases: how many this comes from.
    """

    shift: float = 0.0
    error: float = PRIOR_ERROR
    cases: int = 0

    @classmethod
    def of(cls, raw: Sequence[float], truth: Sequence[float]) -> Calibration:
        """From the raw figures and the true Dice of the same cases; those where either is NaN do not count."""
        pairs = [(r, t) for r, t in zip(raw, truth, strict=True) if not math.isnan(r + t)]
        rest = np.array([t - r for r, t in pairs])
        if not len(rest):
            return cls()
        left_out = [_shift(np.delete(rest, n)) for n in range(len(rest))]
        squares = ((rest - left_out) ** 2).sum() + PRIOR_CASES * PRIOR_ERROR**2
        return cls(float(_shift(rest)), math.sqrt(squares / (len(rest) + PRIOR_CASES)), len(rest))

    def estimate(self, raw: float) -> float:
        """Dice to expect, 0..1; NaN for NaN."""
        return raw if math.isnan(raw) else min(1.0, max(0.0, raw + self.shift))


def calibrate(
    names: Sequence[str], raw: Sequence[Mapping[str, float]], truth: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """What a model file keeps: class name -> ``Calibration`` as a dictionary.

    Args:
        names: the model's classes.
        raw: of each held-out case, class name -> ``Examination.overlap``.
        truth: of the same cases, class name -> Dice.
    """
    return {name: vars(Calibration.of([r[name] for r in raw], [t[name] for t in truth])) for name in names}


@dataclass(frozen=True)
class Quality:
    """What a mask is probably worth.

    Attributes:
        dice: class name -> estimated Dice 0..1; only classes that were found or suspected.
        not_found: the other classes. Where they are rightly absent they have no Dice, and else it is 0; nobody knows.
        error: class name -> typical error of that estimate.
        mean: mean of ``dice``; NaN where there is none.
        unsure: slices where the model is least sure, the worst first, across the acquisition axis of the stored image.
            Only those that show what was found; where that is nothing, any.
    """

    dice: dict[str, float]
    not_found: list[str]
    error: dict[str, float]
    mean: float
    unsure: list[int]

    def to_dict(self) -> dict[str, Any]:
        """JSON, two digits."""
        return {
            "dice": {name: round(value, 2) for name, value in self.dice.items()},
            "error": {name: round(value, 2) for name, value in self.error.items()},
            "mean": None if math.isnan(self.mean) else round(self.mean, 2),
            "not_found": self.not_found,
            "unsure_slices": self.unsure,
        }


UNSURE_SLICES = 5


def quality(names: Sequence[str], examination: Examination, kept: Mapping[str, Any]) -> Quality:
    """Estimate from one examination.

    Args:
        names: the model's classes.
        examination: of the mask.
        kept: what ``calibrate`` gave for this model; empty where nothing was held out.
    """
    calibrations = {name: Calibration(**kept[name]) if name in kept else Calibration() for name in names}
    raw = dict(zip(names, examination.overlap.tolist(), strict=True))
    dice = {name: calibrations[name].estimate(value) for name, value in raw.items() if not math.isnan(value)}
    error = {name: calibrations[name].error for name in dice}
    not_found = [name for name in names if name not in dice]
    return Quality(dice, not_found, error, mean(dice.values()), _unsure(examination))


def _unsure(examination: Examination) -> list[int]:
    doubt = examination.doubt
    shown = doubtful_foreground(examination, doubt)
    worst = shown[np.argsort(-doubt[shown], kind="stable")][:UNSURE_SLICES]
    return [int(index) for index in worst if doubt[index] > 0]


def _shift(rest: np.ndarray) -> float:
    return float(rest.sum() / (len(rest) + PRIOR_CASES))
