"""Volumes of a studies folder (NIfTI, NRRD, MHA) as DICOM series, so that OHIF can open them.

The series lie below ``FOLDER/.samadapt/dicomweb/converted``, one folder each, with a record beside it that says which
case it shows. Their UIDs follow from case and content: the same volume has the same ones on every machine.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat

from samadapt.data.cases import Case, find_cases
from samadapt.data.geometry import LPS_FROM_RAS, Geometry, turn_to_series
from samadapt.data.volume import PICTURES, Volume, image_suffix, read_volume
from samadapt.errors import InputError, SamAdaptError
from samadapt.files import write_json
from samadapt.project import FOLDER

logger = logging.getLogger(__name__)

_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
_ASSUMED = "MR"
"""The modality of volumes whose files do not tell and whose values are no Hounsfield units. OHIF's mode for MONAI Label
opens no others."""

_LEVELS = 65535
_SKEW = 1e-3
"""Largest cosine between rows and columns: DICOM takes them for perpendicular."""


@dataclass(frozen=True)
class Converted:
    """One volume's series.

    Attributes:
        case: id of the case.
        patient: PatientID.
        study: StudyInstanceUID.
        series: SeriesInstanceUID.
        instances: SOPInstanceUIDs in the order of k (``turn_to_series``).
        modified: of the volume's file, in nanoseconds, and its size: another file is another series.
        size: in bytes.
    """

    case: str
    patient: str
    study: str
    series: str
    instances: tuple[str, ...]
    modified: int
    size: int


def folder_in(studies: Path) -> Path:
    """Where the series of a studies folder lie."""
    return studies / FOLDER / "dicomweb" / "converted"


def records(folder: Path) -> list[Converted]:
    """The series that are complete; damaged records are left out (the series is made again)."""
    return [record for path in sorted(folder.glob("[!.]*.json")) if (record := _read(path)) is not None]


def convert_all(
    studies: Path,
    done: Callable[[list[Path]], None],
    progress: Callable[[int, int], None] = lambda ready, total: None,
) -> dict[str, str]:
    """Bring the series up to date with the volumes of ``studies``.

    Args:
        studies: the folder; pictures (PNG, ...) and DICOM folders in it are passed over.
        done: is given the files of each new series when all of them are there.
        progress: volumes done, of how many.

    Returns:
        File -> why it cannot be a series.
    """
    folder = folder_in(studies)
    cases = [case for case in find_cases(studies) if case.image.is_file() and _may_be_series(case.image)]
    known = {record.case: record for record in records(folder)}
    for gone in known.keys() - {case.id for case in cases}:
        _remove(folder, known[gone])
    for left in folder.glob(".*"):  # of a process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    problems = {}
    for number, case in enumerate(cases):
        progress(number, len(cases))
        try:
            made = _up_to_date(case, known.get(case.id), folder)
        except (SamAdaptError, OSError) as error:
            problems[str(case.image)] = error.what if isinstance(error, SamAdaptError) else str(error)
            logger.warning("%s is not offered to OHIF: %s", case.image, problems[str(case.image)])
            continue
        if made is not None:
            done(sorted((folder / made.series).iterdir()))
    progress(len(cases), len(cases))
    return problems


def write_series(volume: Volume, case: str, patient: str, folder: Path) -> tuple[str, str, list[str]]:
    """Write a grey volume as a DICOM series, one file a slice, into ``folder``, which must be empty.

    Whole numbers of 16 bits keep their values; others are stored in 65536 steps between the smallest and the largest.

    Returns:
        StudyInstanceUID, SeriesInstanceUID, and the SOPInstanceUIDs in the order of k.

    Raises:
        InputError: colour, or a grid whose rows and columns are not perpendicular.
    """
    if volume.is_colour:
        raise InputError("colour volumes are not offered to OHIF", where=volume.path)
    turn = turn_to_series(volume.geometry)
    slope, intercept = _scale(volume.array)
    shared = _shared(volume, turn.turned, case, patient)
    shared.RescaleSlope, shared.RescaleIntercept = DSfloat(slope, True), DSfloat(intercept, True)
    shared.PixelRepresentation = int(_is_signed(volume.array))
    array = turn.forward(volume.array[0])
    instances = []
    for k in range(array.shape[2]):
        uid = _uid("instance", case, volume.digest, str(k))
        plane = np.rint((array[:, :, k].T.astype(np.float64) - intercept) / slope)
        _write_slice(folder / f"{k:05}.dcm", shared, uid, k, turn.turned, plane)
        instances.append(uid)
    return str(shared.StudyInstanceUID), str(shared.SeriesInstanceUID), instances


def _read(path: Path) -> Converted | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        record = Converted(**{**entry, "instances": tuple(entry["instances"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if (path.parent / record.series).is_dir() else None


def _may_be_series(path: Path) -> bool:
    return image_suffix(path.name) is not None and image_suffix(path.name) not in PICTURES


def _remove(folder: Path, record: Converted) -> None:
    (folder / f"{record.series}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / record.series, ignore_errors=True)


def _up_to_date(case: Case, known: Converted | None, folder: Path) -> Converted | None:
    """The new series of a case; None where the one that is there shows the same file."""
    stat, patient = case.image.stat(), case.patient or case.id
    if known and (known.modified, known.size, known.patient) == (stat.st_mtime_ns, stat.st_size, patient):
        return None
    volume = read_volume(case.image)
    incoming = folder / f".{generate_uid()}"  # hidden: nobody takes half a series for a whole one
    incoming.mkdir(parents=True)
    try:
        study, series, instances = write_series(volume, case.id, patient, incoming)
        record = Converted(case.id, patient, study, series, tuple(instances), stat.st_mtime_ns, stat.st_size)
        if known:
            _remove(folder, known)
        shutil.rmtree(folder / series, ignore_errors=True)
        incoming.rename(folder / series)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    write_json(folder / f"{series}.json", asdict(record))
    return record


def _uid(*sources: str) -> str:
    return str(generate_uid(entropy_srcs=["samadapt", *sources]))


def _is_signed(array: np.ndarray) -> bool:
    """Whether all values are whole and fit into int16, so that they can be stored as they are."""
    low, high = float(array.min()), float(array.max())
    return low >= -32768 and high <= 32767 and all(_whole(plane) for plane in _planes(array))


def _planes(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[..., k] for k in range(array.shape[-1]))


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.rint(values)).all())


def _scale(array: np.ndarray) -> tuple[float, float]:
    """Slope and intercept: value = slope * stored + intercept."""
    if _is_signed(array):
        return 1.0, 0.0
    low, high = float(array.min()), float(array.max())
    if low == high:
        return 1.0, low
    # What is stored is the rounded text of these, so the same must be used for storing.
    return float(DSfloat((high - low) / _LEVELS, True)), float(DSfloat(low, True))


def _shared(volume: Volume, grid: Geometry, case: str, patient: str) -> pydicom.Dataset:
    """The attributes that all slices have.

    Raises:
        InputError: see ``write_series``.
    """
    lps = LPS_FROM_RAS @ grid.affine
    rows, columns = (lps[:3, axis] / grid.spacing[axis] for axis in (0, 1))
    if abs(float(rows @ columns)) > _SKEW:
        raise InputError(
            "its rows and columns are not perpendicular, which DICOM cannot say",
            where=volume.path,
            remedy="Resample it to a rectangular grid; it can be labelled in 3D Slicer as it is.",
        )
    modality = volume.modality if volume.modality in _CLASSES else _ASSUMED
    made = pydicom.Dataset()
    made.SpecificCharacterSet = "ISO_IR 192"
    made.ImageType = ["DERIVED", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"]
    made.SOPClassUID, made.Modality = _CLASSES[modality], modality
    made.PatientName, made.PatientID = patient, patient
    made.PatientBirthDate = made.PatientSex = made.StudyDate = made.StudyTime = ""
    made.AccessionNumber = made.ReferringPhysicianName = ""
    made.Manufacturer, made.DerivationDescription = "samadapt", f"converted from {volume.path.name}"[:1024]
    made.StudyInstanceUID = _uid("study", case, volume.digest)
    made.SeriesInstanceUID = _uid("series", case, volume.digest)
    made.FrameOfReferenceUID, made.PositionReferenceIndicator = _uid("frame", case, volume.digest), ""
    made.StudyID, made.SeriesNumber = "1", 1
    made.StudyDescription = made.SeriesDescription = case[:64]
    made.Columns, made.Rows = grid.shape[:2]
    made.ImageOrientationPatient = [DSfloat(value, True) for value in (*rows, *columns)]
    made.PixelSpacing = [DSfloat(grid.spacing[1], True), DSfloat(grid.spacing[0], True)]
    made.SliceThickness = made.SpacingBetweenSlices = DSfloat(grid.spacing[2], True)
    low, high = np.percentile(volume.array.reshape(-1)[:: max(1, volume.array.size // 500_000)], [0.5, 99.5])
    made.WindowCenter, made.WindowWidth = DSfloat((low + high) / 2, True), DSfloat(max(high - low, 1e-3), True)
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.RescaleType = "HU" if modality == "CT" else "US"
    return made


def _write_slice(path: Path, shared: pydicom.Dataset, uid: str, k: int, grid: Geometry, plane: np.ndarray) -> None:
    """``plane``: (rows, columns) of whole numbers."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = shared.SOPClassUID, UID(uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset(str(path), shared.copy(), file_meta=meta, preamble=b"\0" * 128)
    made.is_little_endian, made.is_implicit_VR = True, False
    made.SOPInstanceUID, made.InstanceNumber = UID(uid), k + 1
    corner = (LPS_FROM_RAS @ grid.affine @ np.array([0, 0, k, 1]))[:3]
    made.ImagePositionPatient = [DSfloat(value, True) for value in corner]
    made.PixelData = plane.astype("<i2" if shared.PixelRepresentation else "<u2").tobytes()
    made.save_as(path, write_like_original=False)
