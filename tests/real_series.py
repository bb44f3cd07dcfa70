"""The real DICOM series in ../shared/data, with the tumours that experts drew in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CT = DATA / "dicom_ct_rtstruct"
MR = DATA / "dicom_sts_mr_rtstruct"


def stack(folder: Path) -> list[Dataset]:
    """The images of a series from foot to head, as slices k of the volume lie."""
    images = [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))]
    return sorted(images, key=lambda image: float(image.ImagePositionPatient[2]))


def as_somebody_else(images: Sequence[Dataset], patient: str) -> Sequence[Dataset]:
    """The same images as another patient's study."""
    study, series = generate_uid(), generate_uid()
    for image in images:
        image.PatientName = image.PatientID = patient
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    return images


def written(images: Sequence[Dataset], folder: Path) -> Path:
    folder.mkdir()
    for n, image in enumerate(images):
        image.save_as(folder / f"{n:03}.dcm", write_like_original=False)
    return folder


def truth_of(folder: Path) -> np.ndarray:
    """The tumour, (I,J,K)."""
    (file,) = (folder / "labels").glob("*.nii.gz")
    return np.asarray(nibabel.load(file).dataobj) > 0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def voxel_of(mask: np.ndarray) -> list[int]:
    """A voxel in the middle of the slice that shows most of a mask."""
    k = int(mask.sum(axis=(0, 1)).argmax())
    i, j = (int(np.median(index)) for index in np.nonzero(mask[:, :, k]))
    return [i, j, k]
