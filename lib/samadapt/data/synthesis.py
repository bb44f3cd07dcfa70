"""Exemplar-guided synthesis: labelled images made from a few labelled slices and slices without their structures.

After Cheap Lunch (arXiv 2308.14133), which takes the idea from exemplar learning (En and Guo, arXiv 2204.01713). The
paper gives no code and no ranges; those here follow what its figure shows: every structure is cut out, changed in shape
about its own place and in intensity, and pasted hard onto another slice, whatever anatomy would say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from samadapt.data.labels import IGNORE

EXEMPLARS = 10
"""Labelled slices to cut from, at least, if there are so many; more only where all structures need more."""

SMALLEST = 16
"""Pixels below which a structure shows too little to learn from."""

BODY = 0.25
"""Between a slice's darkest and brightest pixels: above it is the body, below it air."""

SMOOTHNESS = 0.1
"""Width of the Gaussian that smooths elastic displacements, in sides of the frame."""


@dataclass(frozen=True)
class Synthesis:
    """What is drawn anew for every structure of a synthetic image, each uniformly from its range.

    Attributes:
        scale: smallest and largest factor along rows and along columns, above 0.
        anisotropy: largest ratio of these two factors, from 1.
        rotation: largest angle either way, degrees.
        shear: largest angle either way, degrees.
        translation: largest distance either way along rows and along columns, in sides of the frame.
        relocate: probability, 0..1, that the centre goes anywhere in the body that the background shows, which suits
            lesions, and not near its own place, which suits organs.
        elastic: largest bend, as a distance in sides of the frame; 0 keeps straight lines straight.
        flip: probability, 0..1, of mirroring left to right. 0, since left and right may be classes.
        gamma: smallest and largest exponent of the intensities, drawn for the background too.
        gain: smallest and largest factor of the intensities, drawn for the background too.
        offset: least and most that is then added to them, drawn for the background too; results are clipped to [0,1].
        brightness: lowest and highest mean, before clipping, that offsets may lead to: not all black, not all white.
        feather: width in pixels, inside a structure's border, over which it is blended in; 0 pastes hard, as the paper
            does.
        smallest: structures of fewer pixels after the warp are left out.
    """

    scale: tuple[float, float] = (0.5, 1.5)
    anisotropy: float = 1.3
    rotation: float = 30.0
    shear: float = 10.0
    translation: float = 0.05
    relocate: float = 0.0
    elastic: float = 0.0
    flip: float = 0.0
    gamma: tuple[float, float] = (0.8, 1.25)
    gain: tuple[float, float] = (0.6, 1.6)
    offset: tuple[float, float] = (-0.2, 0.2)
    brightness: tuple[float, float] = (0.1, 0.9)
    feather: float = 0.0
    smallest: int = SMALLEST


ORGANS = Synthesis()
"""Near their own place, upright."""

LESIONS = Synthesis(relocate=1.0, elastic=0.02, flip=0.5)
"""Anywhere in the body, bent and mirrored."""


class LabelledSlice(NamedTuple):
    """What the choice of exemplars goes by.

    Attributes:
        case: whose slice it is.
        areas: class index -> its pixels, without background.
    """

    case: Hashable
    areas: Mapping[int, int]


def synthesize(
    exemplar: tuple[Tensor, Tensor],
    background: tuple[Tensor, Tensor],
    ranges: Synthesis,
    random: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """The structures of one slice, each changed by itself, on another slice; large ones lie below small ones.

    The black rows and columns at the right and bottom of the background, which pad it, stay as they are.

    Args:
        exemplar: image (3,S,S) float32 in [0,1] and label (S,S) int64; ``IGNORE`` is no structure.
        background: the same; what it shows keeps its label, ``IGNORE`` too, where nothing is pasted over it.
        ranges: of what is drawn.
        random: the same state gives the same sample.

    Returns:
        Image (3,S,S) float32 in [0,1] and label (S,S) int64.
    """
    image, label = background[0].numpy().copy(), background[1].numpy().copy()
    content = _content(image)
    places = np.argwhere(_body(image, content)) if ranges.relocate else np.empty((0, 2))
    image[content] = _recoloured(image[content], True, ranges, random)
    source, classes = exemplar[0].numpy(), exemplar[1].numpy()
    shown = [int(n) for n in np.unique(classes) if n not in (0, IGNORE)]
    regions = [_cut(source, classes == n, n, content, places, ranges, random) for n in shown]
    for region in sorted(regions, key=lambda region: region.mask.sum(), reverse=True):
        if region.mask.sum() >= ranges.smallest:
            rows, columns = region.place
            weight = _weight(region.mask, ranges.feather)
            image[:, rows, columns] = weight * region.pixels + (1 - weight) * image[:, rows, columns]
            label[rows, columns][region.mask] = region.label
    return torch.from_numpy(image), torch.from_numpy(label)


def choose_exemplars(slices: Sequence[LabelledSlice], count: int = EXEMPLARS) -> list[int]:
    """Slices that show every class, as few as that takes, then more up to ``count``.

    Each is the one with most classes that no earlier one shows; among equals from the case that gave fewest so far,
    with most classes, with the largest labelled area. A class counts where it has ``SMALLEST`` pixels, or as many as it
    has anywhere. So the first is the exemplar of the paper: one slice that shows all structures.

    Returns:
        Positions in ``slices``, best first.
    """
    most: Counter[int] = Counter()
    for one in slices:
        most |= Counter(one.areas)
    shown = [{n for n, area in one.areas.items() if area >= min(SMALLEST, most[n])} for one in slices]
    missing, given = set(most), Counter[Hashable]()
    left = list(range(len(slices)))

    def rank(n: int) -> tuple[int, int, int, int]:
        case, areas = slices[n]
        return len(shown[n] & missing), -given[case], len(shown[n]), sum(areas.values())

    chosen: list[int] = []
    while left and (missing or len(chosen) < count):
        best = max(left, key=rank)
        left.remove(best)
        chosen.append(best)
        missing -= shown[best]
        given[slices[best].case] += 1
    return chosen


def random_exemplars(slices: Sequence[LabelledSlice], seed: int, count: int = EXEMPLARS) -> list[int]:
    """Positions of ``count`` slices (or all), drawn blindly: what ``choose_exemplars`` is to be compared with."""
    return [int(n) for n in np.random.default_rng(seed).permutation(len(slices))[:count]]


@dataclass(frozen=True)
class _Region:
    """A structure, ready to be pasted.

    Attributes:
        label: its class index.
        place: rows and columns of the frame that hold it.
        mask: (h,w) bool, its pixels among them.
        pixels: (3,h,w) float32 in [0,1].
    """

    label: int
    place: tuple[slice, slice]
    mask: np.ndarray
    pixels: np.ndarray


def _content(image: np.ndarray) -> tuple[slice, slice, slice]:
    """The part of a frame (3,S,S), from its top left, that is not black padding."""
    rows, columns = (np.flatnonzero(image.any(axis=others)) for others in ((0, 2), (0, 1)))
    return slice(None), slice(rows.max(initial=-1) + 1), slice(columns.max(initial=-1) + 1)


def _body(image: np.ndarray, content: tuple[slice, slice, slice]) -> np.ndarray:
    """(S,S) bool: the largest connected part of a frame (3,S,S) that is not dark, with its holes; black has none."""
    mean = image.mean(axis=0)
    if not mean.any():
        return np.zeros(mean.shape, bool)
    darkest, brightest = np.percentile(mean[content[1:]], (2, 98))
    parts, count = ndimage.label(mean > darkest + BODY * (brightest - darkest))
    if not count:
        return np.zeros(mean.shape, bool)
    return ndimage.binary_fill_holes(parts == 1 + np.bincount(parts[parts > 0] - 1).argmax())


def _moved(
    centre: np.ndarray, side: int, places: np.ndarray, ranges: Synthesis, random: np.random.Generator
) -> np.ndarray:
    """Row and column of where a centroid goes: one of ``places`` (n,2), or near where it is in a frame of ``side``."""
    if len(places) and random.random() < ranges.relocate:
        return places[random.integers(len(places))].astype(float)
    return centre + random.uniform(-ranges.translation, ranges.translation, 2) * side


def _cut(
    image: np.ndarray,
    mask: np.ndarray,
    label: int,
    content: tuple[slice, slice, slice],
    places: np.ndarray,
    ranges: Synthesis,
    random: np.random.Generator,
) -> _Region:
    """The structure ``mask`` of an image, warped about its centroid, moved (see ``_moved``), cut off outside
    ``content``, and recoloured."""
    centre = np.array(ndimage.center_of_mass(mask))
    moved = _moved(centre, len(mask), places, ranges, random)
    back = np.linalg.inv(_linear(ranges, random))
    start = centre - back @ moved
    grid = np.indices(mask.shape, np.float64)
    origins = np.einsum("ij,jrc->irc", back, grid) + start[:, None, None] + _bend(mask.shape, ranges, random)
    whole = ndimage.map_coordinates(mask.astype(np.uint8), origins, order=0, mode="grid-constant")
    warped = np.zeros_like(whole)
    warped[content[1:]] = whole[content[1:]]
    place = next(iter(ndimage.find_objects(warped)), (slice(0, 0), slice(0, 0)))
    inside, origins = warped[place] > 0, origins[:, place[0], place[1]]
    pixels = [ndimage.map_coordinates(channel, origins, order=1, mode="nearest") for channel in image]
    return _Region(label, place, inside, _recoloured(np.stack(pixels), inside, ranges, random))


def _bend(shape: tuple[int, ...], ranges: Synthesis, random: np.random.Generator) -> np.ndarray | float:
    """(2,S,S) pixels: a smooth displacement, nowhere larger than ``ranges.elastic`` allows."""
    if not ranges.elastic:
        return 0.0
    noise = ndimage.gaussian_filter(random.standard_normal((2, *shape)), (0, *(SMOOTHNESS * side for side in shape)))
    largest = random.uniform(0, ranges.elastic) * max(shape)
    return noise * (largest / np.linalg.norm(noise, axis=0).max())


def _linear(ranges: Synthesis, random: np.random.Generator) -> np.ndarray:
    """(2,2) matrix on (row, column): scale and flip, then shear, then rotation."""
    limit = math.log(ranges.anisotropy)
    rows = random.uniform(*ranges.scale)
    columns = np.clip(rows * math.exp(random.uniform(-limit, limit)), *ranges.scale)
    if random.random() < ranges.flip:
        columns = -columns
    slant = math.tan(math.radians(random.uniform(-ranges.shear, ranges.shear)))
    angle = math.radians(random.uniform(-ranges.rotation, ranges.rotation))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return turn @ np.array([[1, slant], [0, 1]]) @ np.diag([rows, columns])


def _recoloured(
    pixels: np.ndarray, counted: np.ndarray | bool, ranges: Synthesis, random: np.random.Generator
) -> np.ndarray:
    """(3,h,w) to the power of gamma, times a gain, plus an offset, clipped; the mean that limits the offset is over
    ``counted`` (h,w)."""
    pixels = pixels ** random.uniform(*ranges.gamma)
    gain, offset = random.uniform(*ranges.gain), random.uniform(*ranges.offset)
    where = np.broadcast_to(counted, pixels.shape)
    if where.any():
        mean = gain * pixels.mean(where=where)
        offset = np.clip(offset, *(limit - mean for limit in ranges.brightness))
    return np.clip(pixels * gain + offset, 0, 1).astype(np.float32)


def _weight(mask: np.ndarray, feather: float) -> np.ndarray:
    """(h,w) float32: 0 outside, 1 from ``feather`` pixels inside the border on."""
    if not feather:
        return mask.astype(np.float32)
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return np.clip(depth / (feather + 1), 0, 1).astype(np.float32)
