"""Overlap and distance per case and class, on the native grid. Definitions that do not reward an empty prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance

from samadapt.data.labels import LabelMap


def dice(predicted: np.ndarray, truth: np.ndarray, labels: LabelMap) -> dict[str, float]:
    """Dice coefficient of each class.

    Args:
        predicted: (I,J,K) indices of ``labels``.
        truth: the same for the true label.
        labels: the classes.

    Returns:
        name -> 0..1; 0 where exactly one of the two is empty, NaN where both are (nothing to measure).
    """
    return {name: _dice(predicted == n, truth == n) for n, name in enumerate(labels.names, start=1)}


def hd95(predicted: np.ndarray, truth: np.ndarray, labels: LabelMap, spacing: Sequence[float]) -> dict[str, float]:
    """95th percentile of the surface distance of each class, in mm by ``spacing``; NaN where either is empty."""
    return {name: _hd95(predicted == n, truth == n, spacing) for n, name in enumerate(labels.names, start=1)}


def mean(values: Iterable[float]) -> float:
    """Mean of the defined values; NaN where there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def mean_by_class(cases: Sequence[dict[str, float]]) -> dict[str, float]:
    """name -> mean over the cases in which the class is defined."""
    names = cases[0] if cases else {}
    return {name: mean(case[name] for case in cases) for name in names}


def _dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else math.nan


def _hd95(predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    if not predicted.any() or not truth.any():
        return math.nan
    batch = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (predicted, truth)]
    distance = compute_hausdorff_distance(
        batch[0], batch[1], include_background=True, percentile=95, spacing=list(spacing)
    )
    return float(distance)
