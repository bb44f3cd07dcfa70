"""Overlap and distance per case and class, on the native grid. Definitions that do not reward an empty prediction.

Voxels whose truth is ``IGNORE`` are left out, and so are classes that nobody has looked for in a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage

from samadapt.data.labels import IGNORE, LabelMap


def dice(predicted: np.ndarray, truth: np.ndarray, labels: LabelMap, unknown: Collection[str] = ()) -> dict[str, float]:
    """Dice coefficient of each class.

    Args:
        predicted: (I,J,K) indices of ``labels``.
        truth: the same for the true label, with ``IGNORE`` where nobody has labelled.
        labels: the classes.
        unknown: names of classes that nobody has looked for.

    Returns:
        name -> 0..1; 0 where exactly one of the two is empty; NaN where both are, or for an unknown class (nothing to
        measure).
    """
    labelled = truth != IGNORE
    return {
        name: math.nan if name in unknown else _dice((predicted == n) & labelled, truth == n)
        for n, name in enumerate(labels.names, start=1)
    }


def hd95(
    predicted: np.ndarray,
    truth: np.ndarray,
    labels: LabelMap,
    spacing: Sequence[float],
    unknown: Collection[str] = (),
) -> dict[str, float]:
    """95th percentile of the surface distance of each class, in mm by ``spacing``; NaN where either has no surface.

    Where a structure is cut off by voxels that nobody has labelled is no surface of it. The arguments are ``dice``'s.
    """
    ignored = truth == IGNORE
    distance = _hd95_beside(ignored) if ignored.any() else _hd95
    return {
        name: math.nan if name in unknown else distance(predicted == n, truth == n, spacing)
        for n, name in enumerate(labels.names, start=1)
    }


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


def _hd95_beside(ignored: np.ndarray) -> Callable[[np.ndarray, np.ndarray, Sequence[float]], float]:
    """``_hd95`` of the surfaces between voxels that are not ``ignored`` (I,J,K) bool."""

    def surface(mask: np.ndarray) -> np.ndarray:
        return mask & ~ignored & ~ndimage.binary_erosion(mask | ignored)

    def distance(predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
        found, wanted = surface(predicted), surface(truth)
        if not found.any() or not wanted.any():
            return math.nan
        ways = [
            ndimage.distance_transform_edt(~to, sampling=spacing)[of] for of, to in ((found, wanted), (wanted, found))
        ]
        return float(max(np.percentile(way, 95) for way in ways))

    return distance
