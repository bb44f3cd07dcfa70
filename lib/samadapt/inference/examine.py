"""How sure a model is of the mask that it makes: the raw material of quality estimates and of what to label next."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from samadapt.data.geometry import turn_to_lps
from samadapt.data.slice_cache import SliceCache
from samadapt.data.slices import put_slice
from samadapt.data.volume import Volume
from samadapt.inference.auto import class_shares
from samadapt.model import AdaptedModel

SUSPECTED = 0.1
"""Where all foreground classes together have this probability or more, a pixel counts for how sure the model is: the
empty rest of a volume is easy and would drown what matters. A class that has it nowhere is suspected nowhere."""

LEAST_PRESENT = 0.1
"""A slice shows a class where it has this part or more of the class's largest area in the case: at the very ends of an
object there is much doubt and little to learn."""

_TINY = 1e-6


@dataclass(frozen=True)
class Examination:
    """What a model found in one volume and how sure it was.

    Slices are counted across ``axis`` of the volume as stored, N in all; K classes in the order of the model's labels.

    Attributes:
        axis: 0, 1 or 2.
        areas: (N,K) pixels of each class in the mask.
        doubt: (N,) 0..1, mean entropy (in units of log(K+1)) over the suspected pixels; 0 where there are none.
        class_doubt: (N,K) the same over those suspected pixels whose likeliest foreground class is this one.
        overlap: (K,) 0..1, the Dice that the mask would have if the probabilities were right: twice the probability
            inside the mask, by mask plus probability. NaN for a class that is neither in the mask nor suspected: the
            trace of probability that softmax leaves in every voxel adds up, but says nothing.
    """

    axis: int
    areas: np.ndarray
    doubt: np.ndarray
    class_doubt: np.ndarray
    overlap: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """JSON; NaN becomes None."""
        return {
            "axis": self.axis,
            "areas": self.areas.tolist(),
            "doubt": np.round(self.doubt, 5).tolist(),
            "class_doubt": np.round(self.class_doubt, 5).tolist(),
            "overlap": [None if math.isnan(value) else round(float(value), 5) for value in self.overlap],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Examination:
        """The inverse of ``to_dict``, but for rounding.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        classes = len(value["overlap"])
        return cls(
            axis=int(value["axis"]),
            areas=np.asarray(value["areas"], dtype=np.int64).reshape(-1, classes),
            doubt=np.asarray(value["doubt"], dtype=np.float64),
            class_doubt=np.asarray(value["class_doubt"], dtype=np.float64).reshape(-1, classes),
            overlap=np.array([math.nan if one is None else one for one in value["overlap"]], dtype=np.float64),
        )


def examine(
    model: AdaptedModel,
    volume: Volume,
    progress: Callable[[int, int], None] | None = None,
    cache: SliceCache | None = None,
) -> tuple[np.ndarray, Examination]:
    """Segment a whole volume as ``segment`` does, and say how sure the model is.

    Args:
        model: trained.
        volume: the image.
        progress: called with (slices done, slices in all).
        cache: where embeddings are looked up and kept.

    Returns:
        The mask, uint8 (I,J,K) on the volume's own grid, and the examination.
    """
    turn = turn_to_lps(volume.geometry)
    mask = np.zeros(turn.turned.shape, dtype=np.uint8)
    own_axis, rows = 0, {}
    inside = np.zeros(len(model.info.labels))
    both = np.zeros(len(model.info.labels))
    highest = np.zeros(len(model.info.labels))
    for axis, index, shares in class_shares(model, volume, cache, progress):
        own_axis, found = axis, shares.argmax(axis=0).astype(np.uint8)
        put_slice(mask, axis, index, found)
        rows[index] = _measure(found, shares)
        highest = np.maximum(highest, shares[1:].max(axis=(1, 2)))
        for n in range(len(inside)):
            inside[n] += float(shares[n + 1][found == n + 1].sum())
            both[n] += float(shares[n + 1].sum()) + int((found == n + 1).sum())
    ordered = np.stack([rows[index] for index in sorted(rows)])
    native = int(np.flatnonzero(turn.steps[:, 0] == own_axis)[0])
    if turn.steps[native][1] < 0:
        ordered = ordered[::-1]
    classes = len(inside)
    areas, doubt, class_doubt = np.split(ordered, [classes, classes + 1], axis=1)
    there = areas.any(axis=0) | (highest >= SUSPECTED)
    overlap = np.where(there, 2 * inside / np.maximum(both, _TINY), math.nan)
    return np.ascontiguousarray(turn.back(mask)), Examination(
        native, areas.astype(np.int64), doubt[:, 0].copy(), class_doubt.copy(), overlap
    )


def _measure(found: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(2K+1,) of one slice: the areas, the doubt, the classes' doubts."""
    classes = len(shares) - 1
    areas = [int((found == n).sum()) for n in range(1, classes + 1)]
    suspected = shares[0] <= 1 - SUSPECTED
    few = np.clip(shares[:, suspected], _TINY, 1)
    if not few.size:
        return np.array([*areas, 0.0, *np.zeros(classes)])
    entropy = -(few * np.log(few)).sum(axis=0) / math.log(classes + 1)
    likeliest = few[1:].argmax(axis=0)
    by_class = [float(entropy[likeliest == n].mean()) if (likeliest == n).any() else 0.0 for n in range(classes)]
    return np.array([*areas, float(entropy.mean()), *by_class])


def present(examination: Examination) -> np.ndarray:
    """(N,) bool: the slices that show a good part of at least one class."""
    areas = examination.areas
    if not areas.size:
        return np.zeros(len(areas), dtype=bool)
    return (areas >= np.maximum(1, LEAST_PRESENT * areas.max(axis=0))).any(axis=1)


def doubtful_foreground(examination: Examination, measure: np.ndarray) -> np.ndarray:
    """Numbers of the slices that come into question: with foreground and doubt; else with either of the two."""
    shown = present(examination)
    for chosen in (shown & (measure > 0), shown, measure > 0):
        if chosen.any():
            return np.flatnonzero(chosen)
    return np.array([], dtype=int)
