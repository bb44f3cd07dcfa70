"""Structures that were drawn on a DICOM series -> one label map on the series' own grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset

LABEL_MODALITIES = ("SEG", "RTSTRUCT")

MANUFACTURER = "samadapt"
"""In the SEGs that we write, by which we know them again."""


@dataclass(frozen=True, eq=False)
class DicomLabel:
    """What a SEG or RTSTRUCT says about one series.

    Attributes:
        mask: (I, J, K) uint8 or uint16 on the series' grid (see ``samadapt.data.dicom.SeriesGrid``).
        values: value in the mask -> name. Structures without a voxel are among them.
        remarks: what could not be kept as it was, sentences for people.
    """

    mask: np.ndarray
    values: dict[int, str]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Structure:
    """One structure: its value in the label map, its name, and its voxels as (N, 3) indices, any order."""

    value: int
    name: str
    voxels: np.ndarray


def label_map(shape: tuple[int, int, int], structures: Sequence[Structure], remarks: Sequence[str] = ()) -> DicomLabel:
    """Paint structures into one label map, the largest first.

    A label map holds one value per voxel. Where structures overlap the smaller one stays visible, because what lies
    inside another (a tumour in its organ) would vanish otherwise; a remark says how many voxels the larger one lost.
    """
    highest = max((structure.value for structure in structures), default=0)
    mask = np.zeros(shape, np.uint8 if highest <= 255 else np.uint16)
    names = {structure.value: structure.name for structure in structures}
    lost: Counter[tuple[int, int]] = Counter()
    for structure in sorted(structures, key=lambda one: len(one.voxels), reverse=True):
        at = tuple(np.unique(structure.voxels, axis=0).T)
        below, counts = np.unique(mask[at], return_counts=True)
        lost.update({(int(v), structure.value): int(n) for v, n in zip(below, counts, strict=True) if v})
        mask[at] = structure.value
    overlaps = [
        f"{count} voxels belong to both '{names[larger]}' and '{names[smaller]}'; they are kept as '{names[smaller]}'"
        for (larger, smaller), count in sorted(lost.items())
    ]
    return DicomLabel(mask, dict(sorted(names.items())), (*remarks, *overlaps))


def is_label_object(header: Dataset) -> bool:
    """Whether DICOM attributes are those of a SEG or RTSTRUCT."""
    return str(header.get("Modality", "")).upper() in LABEL_MODALITIES


def is_own(header: Dataset) -> bool:
    """Whether a SEG holds a label that was submitted through samadapt, on this server or another."""
    return str(header.get("Manufacturer") or "") == MANUFACTURER


def creator_of(header: Dataset) -> str:
    """Who drew a SEG or RTSTRUCT; "" where it does not say."""
    return " ".join(str(header.get("ContentCreatorName") or "").replace("^", " ").split())


def image_of(label: Dataset) -> str:
    """SeriesInstanceUID of the images that a SEG or RTSTRUCT was drawn on; "" where it does not say."""
    for series in label.get("ReferencedSeriesSequence") or []:
        return str(series.get("SeriesInstanceUID") or "")
    for frame in label.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                return str(series.get("SeriesInstanceUID") or "")
    return ""


def time_of(label: Dataset) -> str:
    """When a SEG or RTSTRUCT was drawn, "YYYYMMDDHHMMSS" in the time of its maker; "" where it does not say."""
    for kind in ("Content", "StructureSet", "InstanceCreation", "Series"):
        if day := str(label.get(f"{kind}Date") or ""):
            return day + str(label.get(f"{kind}Time") or "").split(".")[0].ljust(6, "0")
    return ""
