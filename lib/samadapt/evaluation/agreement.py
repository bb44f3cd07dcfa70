"""How well the estimated quality of masks agrees with the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from samadapt.evaluation.pictures import colour
from samadapt.files import atomic_path

FEWEST_RANKED = 3


@dataclass(frozen=True)
class Agreement:
    """Of estimates with true Dice.

    Attributes:
        rank_correlation: Spearman's, -1..1; NaN with fewer than three masks, or where either is the same for all.
        error: mean absolute difference; NaN without masks.
        bias: mean of estimate minus truth; NaN without masks.
        count: how many masks have both.
        not_found: how many structures have a true Dice and no estimate: they are there, and the model neither finds nor
            suspects them.
    """

    rank_correlation: float
    error: float
    bias: float
    count: int
    not_found: int


def agreement(estimated: Sequence[float], truth: Sequence[float]) -> Agreement:
    """Compare pairs; those where either is NaN do not count."""
    not_found = sum(math.isnan(one) and not math.isnan(true) for one, true in zip(estimated, truth, strict=True))
    pairs = np.array([pair for pair in zip(estimated, truth, strict=True) if not math.isnan(sum(pair))]).reshape(-1, 2)
    if not len(pairs):
        return Agreement(math.nan, math.nan, math.nan, 0, not_found)
    varied = len(pairs) >= FEWEST_RANKED and bool((np.ptp(pairs, axis=0) > 0).all())
    correlation = float(spearmanr(*pairs.T).statistic) if varied else math.nan
    difference = pairs[:, 0] - pairs[:, 1]
    return Agreement(correlation, float(np.abs(difference).mean()), float(difference.mean()), len(pairs), not_found)


def plot(
    estimated: Mapping[str, Sequence[float]],
    truth: Mapping[str, Sequence[float]],
    error: Mapping[str, float],
    path: Path,
) -> None:
    """Draw estimate against truth, a dot for each mask, to a PNG.

    Args:
        estimated: class name -> one figure per case.
        truth: the same of the true Dice.
        error: class name -> typical error that the model states; drawn as a bar on each dot.
        path: file to write.
    """
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever matplotlib is configured for
    draw(figure.subplots(), estimated, truth, error)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw(
    axes: Axes,
    estimated: Mapping[str, Sequence[float]],
    truth: Mapping[str, Sequence[float]],
    error: Mapping[str, float],
) -> None:
    """Draw what ``plot`` does into one panel of a picture."""
    axes.plot([0, 1], [0, 1], color="0.7", zorder=0, label="estimate = truth")
    for number, name in enumerate(estimated, start=1):
        axes.errorbar(
            estimated[name],
            truth[name],
            xerr=error.get(name),
            fmt="o",
            color=colour(number),
            ecolor="0.85",
            alpha=0.8,
            label=name,
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="estimated Dice", ylabel="Dice", aspect="equal")
    axes.legend(loc="upper left")
