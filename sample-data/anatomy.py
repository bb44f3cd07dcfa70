"""Structures of the brain, found in the MNI152 template that the package nilearn carries (no download).

Template: ICBM 2009a nonlinear symmetric (Fonov et al., NeuroImage 47, 2009, S102), skull-stripped T1 plus a
white-matter map, 1 mm. The template has no labels of these structures; they are grown here from short seed lines in
MNI millimetres by a marker-controlled watershed on the T1 edges.
"""

import itertools
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from nilearn.datasets import load_mni152_template, load_mni152_wm_template
from scipy import ndimage
from skimage.draw import line_nd
from skimage.morphology import ball
from skimage.segmentation import watershed

LABELS: dict[str, int] = json.loads((Path(__file__).resolve().parent / "labels.json").read_text(encoding="utf-8"))

# T1 levels of the template (0..1), read off its histogram.
CSF, GREY, WHITE = 0.29, 0.70, 0.88
FLUID_EDGE = 0.52
AIR = 8  # mm of nothing kept around the brain, so that positions outside it find air

Point = tuple[int, int, int]  # MNI millimetres: right, anterior, superior
Line = tuple[Point, ...]
Span = tuple[float, float]


@dataclass(frozen=True)
class Seeds:
    """Lines that certainly lie inside one structure, and the box around the midline that it cannot leave.

    Seeds are given for the right side; the template is symmetric, so they count for both.
    """

    label: str
    lines: tuple[Line, ...]
    lateral: Span  # |x| in mm
    anterior: Span
    superior: Span


GROWN = (
    Seeds("deep_grey_nuclei", (((12, 16, 0), (13, 14, 8), (13, 8, 14), (15, 0, 19)), ((9, 12, -4), (12, 18, 2))),
          (2, 22), (-12, 26), (-9, 27)),  # caudate
    Seeds("deep_grey_nuclei", (((26, 4, 2), (29, -8, 4)), ((25, 8, -4), (26, 6, 8)), ((19, -3, 0), (22, -8, 2))),
          (9, 34), (-22, 20), (-9, 18)),  # putamen and pallidum
    Seeds("deep_grey_nuclei", (((6, -10, 8), (10, -20, 9), (16, -26, 6)), ((8, -18, 3), (10, -14, 13))),
          (-1, 24), (-34, 0), (-3, 19)),  # thalamus
    Seeds("brain_stem", (((3, -28, -14), (2, -24, -24), (4, -26, -32), (2, -34, -44), (2, -42, -54), (1, -45, -66)),
                         ((7, -17, -13), (10, -24, -35)), ((10, -22, -30), (12, -28, -38))),
          (-1, 19), (-54, -6), (-73, -10)),
    Seeds("cerebellum", (((20, -60, -40), (35, -60, -40), (20, -75, -35), (8, -60, -20), (3, -55, -12), (4, -70, -25),
                          (18, -50, -22)), ((24, -46, -34), (38, -50, -36)), ((14, -48, -54), (28, -50, -50)),
                         ((3, -52, -42), (3, -58, -48))),
          (-1, 62), (-105, -30), (-73, 2)),
)  # fmt: skip
LATERAL_VENTRICLE: tuple[Line, ...] = (
    ((7, 28, 4), (7, 22, 8), (7, 5, 18), (9, -10, 23), (16, -28, 22), (24, -40, 10)),
)
# Fluid next to the lateral ventricles that is not theirs: third ventricle, cisterns behind it, velum interpositum.
OTHER_FLUID: tuple[Line, ...] = (
    ((0, -2, -6), (0, -10, -2), (0, -16, 2)),
    ((0, -36, 4), (0, -40, -2), (8, -36, 0)),
    ((0, -26, 14), (0, -33, 13)),
)
# Grey matter that touches a structure and is none of it: insula, and the temporal and occipital lobes on the tentorium.
CORTEX: tuple[Line, ...] = (
    ((36, 6, 0), (37, -8, 4), (35, 10, 6)),
    ((10, -75, 2), (25, -70, -8), (35, -55, -12), (45, -50, -12), (30, -35, -14), (26, -22, -20)),
    ((40, -85, -10), (15, -92, -8)),
    ((50, -55, -10), (52, -45, -18)),
)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The template with its structures, all on one (I, J, K) grid in RAS order.

    Attributes:
        t1: float32 in [0, 1], 0 outside the brain.
        white: float32 in [0, 1], share of white matter.
        labels: uint8, values of ``labels.json``.
        origin: (3,) MNI position of voxel (0, 0, 0) in mm; voxels are 1 mm.
    """

    t1: np.ndarray
    white: np.ndarray
    labels: np.ndarray
    origin: np.ndarray


@lru_cache(maxsize=1)
def load_anatomy() -> Anatomy:
    """Read the template from the installed nilearn and find its structures (a few seconds, once per process)."""
    template = load_mni152_template(resolution=1)
    t1 = np.asarray(template.dataobj, dtype=np.float32)
    white = np.asarray(load_mni152_wm_template(resolution=1).dataobj, dtype=np.float32)
    origin = np.asarray(template.affine[:3, 3], dtype=np.float64)
    inside = ndimage.find_objects(t1 > 0.2)[0]
    t1, white = (np.pad(volume[inside], AIR) for volume in (t1, white))
    origin = origin + [side.start - AIR for side in inside]
    return Anatomy(t1=t1, white=white, labels=_find_structures(t1, white, origin), origin=origin)


def _find_structures(t1: np.ndarray, white: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Labels (I, J, K) uint8 for the whole template; the work happens in the box that holds all structures."""
    low = np.maximum(np.array([-66, -108, -73]) - origin, 0).astype(int)
    high = (np.array([66, 48, 42]) - origin).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    labels = np.zeros(t1.shape, dtype=np.uint8)
    ventricles = _lateral_ventricles(t1[box], origin + low)
    labels[box] = _grow(t1[box], white[box], ventricles, origin + low)
    labels[box][ventricles] = LABELS["lateral_ventricles"]
    return labels


def _draw(shape: tuple[int, ...], lines: tuple[Line, ...], origin: np.ndarray) -> np.ndarray:
    """Mask of seed lines on both sides, three voxels thick."""
    mask = np.zeros(shape, dtype=bool)
    for side in (1, -1):
        for line in lines:
            points = [np.array((side * x, y, z)) - origin for x, y, z in line]
            for start, stop in itertools.pairwise(points):
                mask[line_nd(start.astype(int), stop.astype(int), endpoint=True)] = True
    return ndimage.binary_dilation(mask)


def _box(shape: tuple[int, ...], origin: np.ndarray, lateral: Span, anterior: Span, superior: Span) -> np.ndarray:
    x, y, z = (np.arange(n) + start for n, start in zip(shape, origin, strict=True))
    inside = [(low < axis) & (axis < high) for axis, (low, high) in ((abs(x), lateral), (y, anterior), (z, superior))]
    return inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :]


def _lateral_ventricles(t1: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Central fluid, cut from the third ventricle and the cisterns where the connection is narrowest."""
    fluid = ndimage.gaussian_filter(t1, 0.5) < FLUID_EDGE
    fluid &= _box(t1.shape, origin, (-1, 42), (-75, 45), (-25, 38))
    markers = np.zeros(t1.shape, dtype=np.int8)
    markers[_draw(t1.shape, OTHER_FLUID, origin) & fluid] = 2
    markers[_draw(t1.shape, LATERAL_VENTRICLE, origin) & fluid] = 1
    return watershed(-ndimage.distance_transform_edt(fluid), markers, mask=fluid) == 1


def _grow(t1: np.ndarray, white: np.ndarray, ventricles: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Grow every seed of GROWN to the next T1 edge, against fluid, white matter and cortex."""
    background = len(GROWN) + 1
    markers = np.zeros(t1.shape, dtype=np.int8)
    allowed = [_box(t1.shape, origin, seeds.lateral, seeds.anterior, seeds.superior) for seeds in GROWN]
    for number, (seeds, box) in enumerate(zip(GROWN, allowed, strict=True), start=1):
        markers[_draw(t1.shape, seeds.lines, origin) & box] = number
    above_stem = _box(t1.shape, origin, (-1, 99), (-199, 199), (-12, 199))
    midline = _box(t1.shape, origin, (-1, 2), (1, 199), (-12, 30))
    other = (t1 < 0.5) | ventricles | midline | _draw(t1.shape, CORTEX, origin)
    other |= ndimage.binary_erosion(white > 0.86) & above_stem
    markers[other & (markers == 0)] = background
    regions = watershed(ndimage.gaussian_gradient_magnitude(t1, 1.0), markers, mask=t1 > 0.2)
    labels = np.zeros(t1.shape, dtype=np.uint8)
    for number, (seeds, box) in enumerate(zip(GROWN, allowed, strict=True), start=1):
        grown = _tidy((regions == number) & box, markers == number)
        labels[grown & (labels == 0) & ~ventricles] = LABELS[seeds.label]
    return labels


def _tidy(region: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """Smooth the outline by about 2 mm, fill folds and holes, and keep what hangs together with the seed."""
    region = ndimage.binary_closing(ndimage.binary_opening(region, ball(1)), ball(2))
    parts, _ = ndimage.label(region)
    kept = np.unique(parts[seed & region])
    return ndimage.binary_fill_holes(np.isin(parts, kept[kept > 0]))
