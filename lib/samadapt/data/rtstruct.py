"""Contours of a DICOM RT Structure Set -> a label map on the grid of the series they were drawn on."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from pydicom.dataset import Dataset
from skimage.draw import polygon2mask

from samadapt.data.dicom import SeriesGrid
from samadapt.data.dicom_label import DicomLabel, Structure, label_map
from samadapt.data.geometry import LPS_FROM_RAS
from samadapt.errors import InputError

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")

_FLAT = 0.25
"""A contour whose points lie further apart across the slices than this part of their distance is not drawn in one."""


def structure_names(structures: Dataset) -> dict[int, str]:
    """Value -> name of the structures that have contours; values are 1, 2, ... in the order of the object."""
    drawn = {int(c.ReferencedROINumber) for c in structures.get("ROIContourSequence") or [] if c.get("ContourSequence")}
    listed = [roi for roi in structures.get("StructureSetROISequence") or [] if int(roi.ROINumber) in drawn]
    return {n: _name(roi) for n, roi in enumerate(listed, start=1)}


def read_rtstruct(structures: Dataset, grid: SeriesGrid) -> DicomLabel:
    """The label map of a structure set.

    A voxel belongs to a structure if its centre lies inside. Contours of one structure in one slice count by the
    even-odd rule, so that one inside another is a hole; keyhole contours are holes by themselves. Points and open
    lines enclose nothing and are left out, with a remark.

    Raises:
        InputError: a contour that does not lie in one slice of the series, or none that does.
    """
    contours = {int(c.ReferencedROINumber): c for c in structures.get("ROIContourSequence") or []}
    drawn = [
        roi
        for roi in structures.get("StructureSetROISequence") or []
        if contours.get(int(roi.ROINumber), Dataset()).get("ContourSequence")
    ]
    if not drawn:
        raise InputError("the structure set has no contour", where=grid.series)
    found, remarks = [], []
    for value, roi in enumerate(drawn, start=1):
        sequence = contours[int(roi.ROINumber)].ContourSequence
        closed = [one for one in sequence if str(one.get("ContourGeometricType")).upper() in _CLOSED]
        if len(closed) < len(sequence):
            remarks.append(f"'{_name(roi)}': {len(sequence) - len(closed)} points or open lines are left out")
        found.append(Structure(value, _name(roi), _filled(closed, _name(roi), grid)))
    return label_map(grid.geometry.shape, found, remarks)


def _name(roi: Dataset) -> str:
    return " ".join(str(roi.get("ROIName") or "").split()) or f"structure {roi.ROINumber}"


def _filled(contours: list[Dataset], name: str, grid: SeriesGrid) -> np.ndarray:
    """Voxels (N, 3) inside the contours."""
    columns, rows, slices = grid.geometry.shape
    planes: dict[int, np.ndarray] = defaultdict(lambda: np.zeros((columns, rows), bool))
    to_voxel = np.linalg.inv(LPS_FROM_RAS @ grid.geometry.affine)
    for contour in contours:
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        voxels = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        depth = voxels[:, 2]
        plane = int(np.rint(depth.mean()))
        if np.ptp(depth) > _FLAT or not 0 <= plane < slices:
            raise InputError(
                f"a contour of '{name}' does not lie in one slice of the series (slice numbers {depth.min():.2f} to "
                f"{depth.max():.2f} of 0 to {slices - 1})",
                where=grid.series,
                remedy="Export the structure set in the planes of its own series.",
            )
        if len(points) >= 3:
            planes[plane] ^= polygon2mask((columns, rows), voxels[:, :2])
    return np.concatenate(
        [np.empty((0, 3), np.int64)]
        + [np.insert(np.argwhere(mask), 2, plane, axis=1) for plane, mask in sorted(planes.items())]
    )
