"""Where voxels lie: a grid's shape and affine, and turning a grid to a common orientation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from samadapt.errors import InputError

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Turns RAS millimetres (NIfTI) into LPS millimetres (ITK, DICOM, NRRD), and back."""

THICK_SLICE_RATIO = 1.2
"""An axis whose spacing exceeds the next largest by more than this is the one the slices were acquired along."""

FEWEST_SLICES = 16
"""A volume with fewer voxels along one of its axes is looked at in its acquisition plane alone."""

MISMATCH_VOXELS = 0.2
"""Two grids are the same when no corner voxel lies further apart than this part of the smallest spacing."""


_SERIES_AXES = ("PIR", "LIP", "LPS")
"""Where i, j and k of a sagittal, a coronal and an axial series point to, each a right hand."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid in space.

    Args:
        shape: (I, J, K).
        affine: 4x4 float64, voxel index (i, j, k) -> RAS millimetres. May be sheared (gantry tilt).
        in_space: False for pictures (PNG, JPEG, ...), whose pixels have no size or place; their affine is that of
            ITK: one unit per pixel, i to the patient's left, j to the back.

    Raises:
        InputError: an empty grid, or an affine that is not invertible.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    in_space: bool = True

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        affine = np.array(self.affine, dtype=np.float64)
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"the image is empty: its shape is {shape}", remedy="Export it again from its source.")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or _flat(affine):
            raise InputError(
                "the image's orientation (affine) cannot be used: it is not finite or folds the volume flat",
                remedy="Set its spacing and orientation (for example in Slicer: Volumes > Volume Information).",
            )
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in millimetres between neighbouring voxels along i, j and k."""
        di, dj, dk = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(di), float(dj), float(dk)

    @property
    def acquisition_axis(self) -> int:
        """The axis to step along slice by slice: 0, 1 or 2.

        The only axis with one voxel if there is such a one (a 2D image), else the axis with clearly the largest
        spacing (:data:`THICK_SLICE_RATIO`), else k.
        """
        single = [axis for axis in (2, 1, 0) if self.shape[axis] == 1]
        if single:
            return single[0]
        order = np.argsort(self.spacing)
        thickest, second = self.spacing[order[2]], self.spacing[order[1]]
        return int(order[2]) if thickest > THICK_SLICE_RATIO * second else 2

    def slice_axes(self, planes: str) -> tuple[int, ...]:
        """The axes to step along slice by slice, the acquisition axis first.

        Args:
            planes: "acquisition"; or "all": of a volume whose voxels are nearly cubes all three axes, of any other the
                acquisition axis, because across it the other planes' pixels are far from square.
        """
        first = self.acquisition_axis
        cubes = self.in_space and max(self.spacing) <= THICK_SLICE_RATIO * min(self.spacing)
        if planes == "acquisition" or not cubes or min(self.shape) < FEWEST_SLICES:
            return (first,)
        return first, *(axis for axis in (2, 1, 0) if axis != first)

    def slices(self, axes: Sequence[int]) -> int:
        """How many slices there are across all of ``axes``."""
        return sum(self.shape[axis] for axis in axes)

    @property
    def orientation(self) -> str:
        """Where i, j and k point to, as three letters, for example ``"LPS"``."""
        return "".join(str(code) for code in nib.aff2axcodes(self.affine))

    def to_world(self, voxels: np.ndarray) -> np.ndarray:
        """Voxel indices (N, 3) -> RAS millimetres (N, 3)."""
        return np.asarray(voxels, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def matches(self, other: Geometry) -> bool:
        """Whether both grids have the same shape and, where both have a place in space, the same place."""
        if self.shape != other.shape:
            return False
        if not (self.in_space and other.in_space):
            return True
        last = np.array(self.shape) - 1
        corners = np.array(list(np.ndindex(2, 2, 2))) * last
        apart = np.linalg.norm(self.to_world(corners) - other.to_world(corners), axis=1).max()
        return bool(apart <= MISMATCH_VOXELS * min(self.spacing + other.spacing))

    def __str__(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        if not self.in_space:
            return f"{shape} pixels"
        spacing = " x ".join(f"{s:.4g}" for s in self.spacing)
        origin = ", ".join(f"{x:.5g}" for x in self.affine[:3, 3])
        return f"{shape} voxels of {spacing} mm, axes {self.orientation}, first voxel at RAS ({origin}) mm"


@dataclass(frozen=True, eq=False)
class Turn:
    """Reorders and flips the axes of a grid without resampling, so that they point along L, P and S.

    The same anatomy then comes to the model the same way up, however the file stores it. Make one with
    :func:`turn_to_lps`.

    Args:
        native: the grid as stored.
        turned: the grid after :meth:`forward`.
        steps: nibabel orientation array (3, 2): target axis and sign for each native axis.
    """

    native: Geometry
    turned: Geometry
    steps: np.ndarray

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Native (I, J, K) or (C, I, J, K) -> the turned grid; a view."""
        return _reorient(array, self.steps)

    def back(self, array: np.ndarray) -> np.ndarray:
        """Turned (I', J', K') or (C, I', J', K') -> the native grid; a view."""
        return _reorient(array, _inverse(self.steps))

    def voxels_forward(self, voxels: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        """Native voxel indices (N, 3) -> indices on the turned grid (N, 3), float64."""
        points = np.asarray(voxels, dtype=np.float64).reshape(-1, 3)
        turned = np.empty_like(points)
        for axis, (target, sign) in enumerate(self.steps):
            last = self.native.shape[axis] - 1
            turned[:, int(target)] = points[:, axis] if sign > 0 else last - points[:, axis]
        return turned


def turn_to_lps(geometry: Geometry) -> Turn:
    """The turn that brings ``geometry`` closest to i -> left, j -> posterior, k -> superior.

    That is the order in which axial images are displayed (columns to the patient's left, rows to the back), and the
    identity for pictures.
    """
    return _turn(geometry, axcodes2ornt("LPS"))


def turn_to_series(geometry: Geometry) -> Turn:
    """The turn that brings ``geometry`` into the order of a DICOM series.

    The slices are those of the acquisition plane. Rows and columns run as in the usual pictures: to the patient's left
    and to the back (axial), left and down (coronal), or to the back and down (sagittal). k follows the normal of the
    plane (row direction x column direction), which viewers sort slices by.
    """
    across = int(io_orientation(geometry.affine)[geometry.acquisition_axis, 0])
    wanted = axcodes2ornt(_SERIES_AXES[across])
    turn = _turn(geometry, wanted)
    if np.linalg.det(LPS_FROM_RAS @ turn.turned.affine) > 0:
        return turn
    wanted[2, 1] *= -1  # far off every axis of the body, the nearest directions may form a left hand
    return _turn(geometry, wanted)


def turn_to(geometry: Geometry, target: Geometry) -> Turn:
    """The turn that brings ``geometry``'s axes closest to ``target``'s."""
    return _turn(geometry, io_orientation(target.affine))


def _turn(geometry: Geometry, wanted: np.ndarray) -> Turn:
    steps = ornt_transform(io_orientation(geometry.affine), wanted)
    shape = [0, 0, 0]
    for axis, (target, _) in enumerate(steps):
        shape[int(target)] = geometry.shape[axis]
    affine = geometry.affine @ inv_ornt_aff(steps, geometry.shape)
    return Turn(geometry, Geometry((shape[0], shape[1], shape[2]), affine, geometry.in_space), steps)


def _reorient(array: np.ndarray, steps: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        return apply_orientation(array, steps)
    # nibabel turns the leading axes: hand it the channels last.
    return np.moveaxis(apply_orientation(np.moveaxis(array, 0, -1), steps), -1, 0)


def _inverse(steps: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(steps)
    for axis, (target, sign) in enumerate(steps):
        inverse[int(target)] = (axis, sign)
    return inverse


def _flat(affine: np.ndarray) -> bool:
    """Whether the three axes do not span a volume (relative to their lengths)."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (lengths > 0).all():
        return True
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3)
