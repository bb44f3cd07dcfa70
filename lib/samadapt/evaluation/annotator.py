"""A simulated annotator: what it takes to label a case, in clicks and seconds.

The label itself is the true one whatever it took, so that trainings differ by what was chosen alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from scipy import ndimage

from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.slices import pixel_to_voxel, take_slice
from samadapt.data.volume import Volume
from samadapt.evaluation.click_simulation import largest_part
from samadapt.inference.clicks import segment_slice
from samadapt.inference.prompts import Prompts, Voxel
from samadapt.model import AdaptedModel

GOOD = 0.85
"""Dice of one structure in one slice from which on the robot is content. Higher ones ask more of small structures than
two people's outlines would agree on."""

MOST_CLICKS = 5
"""The robot draws an object by hand that is not good after so many clicks."""

CLICKED_SLICES = 3
"""Slices of a case on which clicks are counted, evenly spread over those that show something; the others are taken to
need as many on average."""

VERSION = 1
"""Of the robot's rules; to be raised with them, as the clicks that they lead to are kept."""

JITTER = 0.5
"""A click hits a place at least this deep inside the error, in parts of the greatest depth."""


@dataclass(frozen=True)
class Costs:
    """Seconds of an annotator's time. Assumptions, but for the click: set them to what your annotators need.

    Attributes:
        case: to open an image and find one's way.
        look: to look at one slice and find it right.
        click: Bearman et al., "What's the Point: Semantic Segmentation with Point Supervision" (ECCV 2016): 2.4 s for
            the first click on an object.
        outline: to draw one structure in one slice by hand.
    """

    case: float = 20.0
    look: float = 1.0
    click: float = 2.4
    outline: float = 30.0

    def seconds(self, slices: int, clicks: float, outlines: float) -> float:
        """Time for one case."""
        return self.case + self.look * slices + self.click * clicks + self.outline * outlines


@dataclass(frozen=True)
class Effort:
    """What one case took.

    Attributes:
        clicks: how many; a fraction where they were counted on some slices only.
        outlines: structures that were drawn by hand, in one slice each; may be a fraction, too.
    """

    clicks: float
    outlines: float


class Annotator(ABC):
    """Labels cases."""

    @abstractmethod
    def label(self, volume: Volume, truth: np.ndarray, found: np.ndarray, slices: Sequence[int], seed: int) -> Effort:
        """What it takes to label some slices of a case.

        Args:
            volume: the image.
            truth: uint8 (I,J,K) on the volume's grid.
            found: the same as the model has it; zeros where there is none.
            slices: which ones, across the acquisition axis of the image as stored.
            seed: of whatever is random: with the same one the same object takes the same clicks, whoever chose it.
        """


class FullAnnotator(Annotator):
    """Draws every structure on every slice by hand.

    Args:
        labels: the classes.
    """

    def __init__(self, labels: LabelMap) -> None:
        self._labels = labels

    def label(self, volume: Volume, truth: np.ndarray, found: np.ndarray, slices: Sequence[int], seed: int) -> Effort:
        """As ``Annotator.label``; the model's mask makes no difference."""
        axis = volume.geometry.acquisition_axis
        shown = [np.unique(take_slice(truth, axis, index)) for index in slices]
        return Effort(0.0, float(sum((values > 0).sum() for values in shown)))


class RobotAnnotator(Annotator):
    """Keeps what the model found well enough and clicks on the rest, with jitter, at the largest error.

    A structure that the model has well enough (``GOOD``) takes no click, one that is not there one click to remove it;
    any other is begun anew with a click inside it and corrected click by click.

    Args:
        labels: the classes.
        plain: answers the clicks; best at the image size that its backbone was made for.
        cache: of its embeddings, and of the clicks that objects take.
    """

    def __init__(self, labels: LabelMap, plain: AdaptedModel, cache: SliceCache | None) -> None:
        self._labels = labels
        self._plain = plain
        self._cache = cache

    def label(self, volume: Volume, truth: np.ndarray, found: np.ndarray, slices: Sequence[int], seed: int) -> Effort:
        """As ``Annotator.label``, counted on ``CLICKED_SLICES`` slices."""
        axis = volume.geometry.acquisition_axis
        busy = [n for n in slices if take_slice(truth, axis, n).any() or take_slice(found, axis, n).any()]
        if not busy:
            return Effort(0.0, 0.0)
        places = np.unique(np.linspace(0, len(busy) - 1, CLICKED_SLICES).round().astype(int))
        clicks = outlines = 0
        for index in (busy[place] for place in places):
            for value in range(1, len(self._labels) + 1):
                wanted, had = take_slice(truth, axis, index) == value, take_slice(found, axis, index) == value
                needed = self._needed(volume, wanted, had, axis, index, seed)
                clicks += min(needed, MOST_CLICKS)
                outlines += needed > MOST_CLICKS
        scale = len(busy) / len(places)
        return Effort(clicks * scale, outlines * scale)

    def _needed(self, volume: Volume, wanted: np.ndarray, had: np.ndarray, axis: int, index: int, seed: int) -> int:
        """Clicks until one structure of one slice is good; more than ``MOST_CLICKS``: it is not good by then."""
        if _dice(had, wanted) >= GOOD:
            return 0
        if not wanted.any():
            return 1
        digest = sha256(f"{volume.digest} {axis} {index}".encode() + np.packbits(wanted).tobytes()).hexdigest()
        random = np.random.default_rng([seed, int(digest[:15], 16)])
        if self._cache is None:
            return self._clicks(volume, wanted, axis, index, random)
        key = f"clicks {VERSION} {self._plain.frozen_key} {digest} {seed}"
        (kept,) = self._cache.gather([key], lambda _: [torch.tensor(self._clicks(volume, wanted, axis, index, random))])
        return int(kept)

    def _clicks(self, volume: Volume, wanted: np.ndarray, axis: int, index: int, random: np.random.Generator) -> int:
        """As ``_needed``, begun anew."""
        inside: list[Voxel] = [_voxel(inner_pixel(wanted, random), axis, index)]
        outside: list[Voxel] = []
        for count in range(1, MOST_CLICKS + 1):
            got = segment_slice(self._plain, volume, axis, index, Prompts(inside, outside), self._cache)
            if _dice(got, wanted) >= GOOD:
                return count
            missed, false = largest_part(wanted & ~got), largest_part(got & ~wanted)
            error, clicks = (missed, inside) if missed.sum() >= false.sum() else (false, outside)
            clicks.append(_voxel(inner_pixel(error, random), axis, index))
        return MOST_CLICKS + 1


def inner_pixel(mask: np.ndarray, random: np.random.Generator) -> tuple[int, int]:
    """(row, column) of a pixel well inside bool (H,W), which is not empty: a person's click is not exact."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    rows, columns = np.nonzero(mask & (depth >= JITTER * depth.max()))
    chosen = int(random.integers(len(rows)))
    return int(rows[chosen]), int(columns[chosen])


def _dice(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of two bool masks; 1 where both are empty, since there is nothing to do."""
    total = int(found.sum()) + int(wanted.sum())
    return 2 * int((found & wanted).sum()) / total if total else 1.0


def _voxel(pixel: tuple[int, int], axis: int, index: int) -> Voxel:
    i, j, k = pixel_to_voxel(index, *pixel, axis)
    return int(i), int(j), int(k)
