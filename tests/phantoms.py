"""Series and masks that look different from every side, in every way that a scanner may store them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.uid import generate_uid

from make_dicom import write_stack

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


@dataclass(frozen=True)
class Kind:
    """How a series lies and is stored."""

    row: tuple[float, float, float] = (1, 0, 0)
    column: tuple[float, float, float] = (0, 1, 0)
    gap: float = 2.0
    thickness: float = 2.0
    spacing: tuple[float, float] = (0.5, 0.75)
    slices: int = 6
    stored_backwards: bool = False
    modality: str = "CT"


def _unit(*vector: float) -> tuple[float, float, float]:
    made = np.array(vector) / np.linalg.norm(vector)
    return (float(made[0]), float(made[1]), float(made[2]))


KINDS = {
    "axial": Kind(),
    "sagittal": Kind(row=(0, 1, 0), column=(0, 0, -1)),
    "coronal": Kind(row=(1, 0, 0), column=(0, 0, -1), modality="MR"),
    "oblique": Kind(row=_unit(0.8, 0.48, 0.36), column=_unit(-0.6, 0.64, 0.48), modality="MR"),
    "flipped": Kind(row=(-1, 0, 0), column=(0, 1, 0)),
    "stored backwards": Kind(stored_backwards=True),
    "long pixels": Kind(spacing=(3.0, 0.5)),
    "single slice": Kind(slices=1),
    "gapped": Kind(gap=7.0, thickness=3.0, modality="MR"),
}


def write_phantom(folder: Path, kind: Kind, shape: tuple[int, int] = (8, 10), **tags) -> Path:
    """A series of ``shape`` (columns, rows); every voxel has a value of its own."""
    columns, rows = shape
    normal = np.cross(kind.row, kind.column)
    positions = [tuple(np.array([-20.0, 13.0, 40.0]) + n * kind.gap * normal) for n in range(kind.slices)]
    volume = np.arange(kind.slices * rows * columns, dtype=np.int16).reshape(kind.slices, rows, columns)
    order = slice(None, None, -1 if kind.stored_backwards else 1)
    defaults = {
        "StudyInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "ImageOrientationPatient": [*kind.row, *kind.column],
        "PixelSpacing": list(kind.spacing),
        "SliceThickness": kind.thickness,
        "Modality": kind.modality,
        "SOPClassUID": MR_IMAGE if kind.modality == "MR" else "1.2.840.10008.5.1.4.1.1.2",
    }
    return write_stack(folder, volume[order], positions[order], **{**defaults, **tags})


def octants(shape: tuple[int, int, int], values: tuple[int, ...] = (2, 5)) -> np.ndarray:
    """A mask with another number of voxels in each octant, so that every flip or swap of axes shows."""
    generator = np.random.default_rng(7)
    mask = np.zeros(shape, np.uint8)
    for octant in np.ndindex(2, 2, 2):
        number = 1 + octant[0] + 2 * octant[1] + 4 * octant[2]
        part = tuple(
            slice(half * (size // 2), size if half else max(size // 2, 1))
            for half, size in zip(octant, shape, strict=True)
        )
        inside = mask[part]
        if inside.size:
            chosen = generator.choice(inside.size, min(number, inside.size), replace=False)
            inside[np.unravel_index(chosen, inside.shape)] = values[number % len(values)]
    return mask
