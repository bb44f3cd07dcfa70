"""Writes small DICOM files of every kind that the reader must tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.1"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_image(path: Path, pixels: np.ndarray, position: Sequence[float] | None, **tags: Any) -> Path:
    """One single-frame image; ``pixels`` (rows, columns) int16 or (rows, columns, 3) uint8."""
    data = _blank(path, pixels, str(tags.pop("SOPClassUID", CT_IMAGE)))
    if position is not None:
        data.ImagePositionPatient = list(position)
        data.ImageOrientationPatient = list(AXIAL)
    data.PixelSpacing = [0.5, 0.75]
    data.SliceThickness = 2.0
    data.RescaleSlope, data.RescaleIntercept = 1.0, 0.0
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, write_like_original=False)
    return path


def write_stack(folder: Path, volume: np.ndarray, positions: Sequence[Sequence[float]], **tags: Any) -> Path:
    """A series: ``volume`` (slices, rows, columns), one file a slice, named in the order given."""
    tags = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), **tags}
    for n, (pixels, position) in enumerate(zip(volume, positions, strict=True)):
        write_image(folder / f"slice_{n:03}.dcm", pixels, position, **tags)
    return folder


def write_multiframe(path: Path, volume: np.ndarray, positions: Sequence[Sequence[float]] | None) -> Path:
    """An enhanced CT: ``volume`` (frames, rows, columns); without positions the frames have no place."""
    data = _blank(path, volume[0], ENHANCED_CT_IMAGE)
    data.NumberOfFrames = len(volume)
    data.PixelData = volume.astype(np.int16).tobytes()
    shared, measures, orientation, scale = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.75], 2.0
    orientation.ImageOrientationPatient = list(AXIAL)
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 2.0, -10.0, "HU"
    shared.PixelMeasuresSequence = DicomSequence([measures])
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    shared.PixelValueTransformationSequence = DicomSequence([scale])
    data.SharedFunctionalGroupsSequence = DicomSequence([shared])
    if positions is not None:
        data.PerFrameFunctionalGroupsSequence = DicomSequence([_placed(position) for position in positions])
    data.save_as(path, write_like_original=False)
    return path


def write_rtstruct(path: Path) -> Path:
    """A DICOM object that is no image."""
    data = _file(path, "1.2.840.10008.5.1.4.1.1.481.3")
    data.Modality = "RTSTRUCT"
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, write_like_original=False)
    return path


def _placed(position: Sequence[float]) -> Dataset:
    frame, plane = Dataset(), Dataset()
    plane.ImagePositionPatient = list(position)
    frame.PlanePositionSequence = DicomSequence([plane])
    return frame


def _blank(path: Path, pixels: np.ndarray, sop_class: str) -> FileDataset:
    data = _file(path, sop_class)
    data.Modality, data.PatientID = "CT", "P7"
    data.Rows, data.Columns = pixels.shape[:2]
    colour = pixels.ndim == 3
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    bits = 8 if colour else 16
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = 0 if colour else 1
    data.PixelData = np.ascontiguousarray(pixels.astype(np.uint8 if colour else np.int16)).tobytes()
    return data


def _file(path: Path, sop_class: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.UID(sop_class)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.is_little_endian, data.is_implicit_VR = True, False
    data.SOPClassUID, data.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID = generate_uid(), generate_uid()
    return data
