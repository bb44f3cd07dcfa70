"""SEG and RTSTRUCT files that lie in a folder beside the series they were drawn on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from samadapt.data.dicom import SeriesGrid, dicom_files
from samadapt.data.dicom_label import DicomLabel, is_label_object, time_of
from samadapt.data.dicom_seg import read_seg, segment_names
from samadapt.data.geometry import Geometry
from samadapt.data.rtstruct import read_rtstruct, structure_names


def latest_label(folder: Path) -> Path | None:
    """The SEG or RTSTRUCT under ``folder`` that was drawn last; None where there is none."""
    found = []
    for path in dicom_files(folder):
        with suppress(OSError, EOFError, ValueError, KeyError, InvalidDicomError):  # damage is told by the reader
            if is_label_object(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Modality"])):
                found.append((time_of(pydicom.dcmread(path, stop_before_pixels=True)), path))
    return max(found)[1] if found else None


def names_of(path: Path) -> dict[int, str]:
    """Value -> name of the structures of a SEG or RTSTRUCT file."""
    label = pydicom.dcmread(path, stop_before_pixels=True)
    return segment_names(label) if _is_seg(label) else structure_names(label)


def read_label_object(path: Path, geometry: Geometry) -> DicomLabel:
    """The label map of a SEG or RTSTRUCT file on a series' grid.

    Raises:
        InputError: as ``read_seg`` and ``read_rtstruct``.
    """
    label = pydicom.dcmread(path)
    return (read_seg if _is_seg(label) else read_rtstruct)(label, SeriesGrid(geometry, str(path), ()))


def _is_seg(label: Dataset) -> bool:
    return str(label.get("Modality")).upper() == "SEG"
