"""One DICOM series -> voxels and affine; everything that would make a wrong volume is refused with its reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813 - its customary name
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from samadapt.data.geometry import LPS_FROM_RAS, Geometry
from samadapt.errors import InputError

NOT_IMAGES = frozenset({"RTSTRUCT", "RTPLAN", "RTDOSE", "SEG", "SR", "PR", "KO", "REG", "FID", "DOC"})
"""Modalities of DICOM objects that lie beside images but are none."""

UNEVEN = 0.1
"""Largest deviation of one gap between slices from the usual gap, as a part of it."""

_FILES_ASKED_FOR_PATIENT = 5

_HEADER_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "ImageType",
    "SeriesInstanceUID",
    "SeriesDescription",
    "Modality",
    "PatientID",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SpacingBetweenSlices",
    "SliceThickness",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]


@dataclass(frozen=True, eq=False)
class Series:
    """What a DICOM series holds: ``array`` (I, J, K) float32 or (I, J, K, 3) uint8, ``affine`` 4x4 voxel -> RAS mm."""

    array: np.ndarray
    affine: np.ndarray
    modality: str


@dataclass(frozen=True, eq=False)
class SeriesGrid:
    """The voxel grid of a series, without its voxels.

    Attributes:
        geometry: shape and affine, as :func:`read_series` makes them.
        series: SeriesInstanceUID.
        frames: for each k: SOPInstanceUID and frame number (from 1; always 1 in single-frame objects).
    """

    geometry: Geometry
    series: str
    frames: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class _Slice:
    path: Path
    header: Dataset


@dataclass(frozen=True, eq=False)
class _Layout:
    """Slices in order along k (or the one multi-frame object, its frames in ``frame_order``), and the affine."""

    slices: list[_Slice]
    affine: np.ndarray
    frame_order: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class _Plane:
    """Directions (LPS unit vectors) and millimetres along i and j, and the normal that slices are sorted by."""

    along_i: np.ndarray
    along_j: np.ndarray
    spacing: tuple[float, float]

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.along_i, self.along_j)


def is_dicom(path: Path) -> bool:
    """Whether it is a file with DICOM's mark (``DICM`` after 128 bytes)."""
    if not path.is_file():  # to open a pipe would take for ever
        return False
    try:
        with open(path, "rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_files(folder: Path) -> Iterator[Path]:
    """Every DICOM file under ``folder``, hidden files and folders left out, in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from dicom_files(path)
        elif is_dicom(path):
            yield path


def patient_id(folder: Path) -> str | None:
    """PatientID of the DICOM files under ``folder``; None where the first few have none.

    A damaged file counts as one without: reading the series will name the damage.
    """
    for path in islice(dicom_files(folder), _FILES_ASKED_FOR_PATIENT):
        with suppress(OSError, EOFError, ValueError, KeyError, InvalidDicomError):
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
            if name := str(header.get("PatientID") or "").strip():
                return name
    return None


def read_series(path: Path) -> Series:
    """Read a folder (subfolders included) with one image series, or one DICOM file.

    Slices are sorted along the normal of the image plane, ascending, as ITK (and so MONAI Label and Slicer) does.
    Values are rescaled to the modality's unit (HU for CT); GDCM inverts MONOCHROME1, so that bright is always high.
    Objects that are no images (RTSTRUCT, SEG, ...) are skipped. A tilted gantry gives a sheared affine.

    Raises:
        InputError: no image, several series, several images at one position (4-D), missing or uneven slices,
            slices of different size or direction, a film over time.
    """
    layout = _layout(path, _one_series(path))
    header = layout.slices[0].header
    array = _pixels([s.path for s in layout.slices], colour=int(header.get("SamplesPerPixel") or 1) > 1)
    if layout.frame_order is not None:
        array = array[:, :, layout.frame_order]
    return Series(array, layout.affine, modality(header))


def series_grid(headers: Iterable[Dataset], where: str | Path) -> SeriesGrid:
    """The grid that :func:`read_series` would give for these images of one series.

    Args:
        headers: the images' attributes, with or without pixels, in any order.
        where: what to call the series in messages.

    Raises:
        InputError: as :func:`read_series`.
    """
    slices = [_Slice(Path(str(header.SOPInstanceUID)), header) for header in headers]
    if not slices:
        raise InputError("the series has no image", where=where)
    layout = _layout(Path(where), slices)
    first = layout.slices[0].header
    if layout.frame_order is None:
        frames = [(str(s.header.SOPInstanceUID), 1) for s in layout.slices]
    else:
        frames = [(str(first.SOPInstanceUID), int(n) + 1) for n in layout.frame_order]
    shape = (int(first.Columns), int(first.Rows), len(frames))
    return SeriesGrid(Geometry(shape, layout.affine), str(first.SeriesInstanceUID), tuple(frames))


def _layout(path: Path, slices: list[_Slice]) -> _Layout:
    if any("LOCALIZER" in (s.header.get("ImageType") or ()) for s in slices):
        raise InputError("a scout (localizer), not a scan", where=path, remedy="Label the scan that was planned on it.")
    if any(int(s.header.get("NumberOfFrames") or 1) > 1 for s in slices):
        return _layout_of_frames(path, slices)
    _check_alike(path, slices)
    return _Layout(*_place(path, slices))


def _one_series(path: Path) -> list[_Slice]:
    found: dict[str, list[_Slice]] = defaultdict(list)
    others: set[str] = set()
    for file in dicom_files(path) if path.is_dir() else [path]:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))
        if "Rows" in header and modality(header) not in NOT_IMAGES:
            found[str(header.get("SeriesInstanceUID", ""))].append(_Slice(file, header))
        else:
            others.add(modality(header))
    if not found:
        seen = f"only {', '.join(sorted(others))}" if others else "no DICOM file at all"
        raise InputError(
            f"no DICOM image here ({seen})", where=path, remedy="Name the folder that holds the slices of one series."
        )
    if len(found) > 1:
        listed = "; ".join(_describe(uid, slices) for uid, slices in sorted(found.items()))
        raise InputError(
            f"{len(found)} DICOM series in one folder: {listed}",
            where=path,
            remedy="Put each series into its own folder.",
        )
    return next(iter(found.values()))


def _describe(uid: str, slices: list[_Slice]) -> str:
    header = slices[0].header
    title = str(header.get("SeriesDescription", "")).strip() or "without description"
    return f"{modality(header)} '{title}' ({len(slices)} files, UID {uid})"


def modality(header: Dataset) -> str:
    """Modality as an image states it, in capitals; "unknown" where it does not."""
    return str(header.get("Modality", "")).strip().upper() or "unknown"


def _check_alike(path: Path, slices: list[_Slice]) -> None:
    first = slices[0].header
    for name in ("Rows", "Columns", "SamplesPerPixel", "ImageOrientationPatient", "PixelSpacing"):
        expected = first.get(name)
        for other in slices[1:]:
            value = other.header.get(name)
            same = (value is None) == (expected is None) and (
                value is None or np.allclose(np.asarray(value, float), np.asarray(expected, float), atol=1e-3)
            )
            if not same:
                raise InputError(
                    f"the slices of this series do not form one volume: {name} is {expected} in {slices[0].path.name} "
                    f"and {value} in {other.path.name}",
                    where=path,
                    remedy="Take out the slices that belong to another scan (scouts, for example).",
                )


def _place(path: Path, slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """Slices in order along the normal, and the affine voxel -> RAS mm."""
    first = slices[0].header
    if len(slices) > 1 and any("ImagePositionPatient" not in s.header for s in slices):
        raise InputError(
            f"{len(slices)} DICOM images without a position in space (ImagePositionPatient): their order is unknown",
            where=path,
            remedy="Export the original series, or save each image as a PNG.",
        )
    plane = _plane(first.get("ImageOrientationPatient"), _spacing(first))
    positions = np.array([s.header.get("ImagePositionPatient") or (0, 0, 0) for s in slices], dtype=float)
    thickness = float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0)
    order, affine = _stack(path, plane, positions, [s.path.name for s in slices], thickness)
    return [slices[n] for n in order], affine


def _spacing(header: Dataset) -> tuple[float, float]:
    """Millimetres along i (columns) and j (rows); DICOM stores the row spacing first."""
    rows, columns = header.get("PixelSpacing") or header.get("ImagerPixelSpacing") or (1.0, 1.0)
    return float(columns), float(rows)


def _plane(orientation: object, spacing: tuple[float, float]) -> _Plane:
    cosines = np.array(orientation if orientation is not None else (1, 0, 0, 0, 1, 0), dtype=float)
    return _Plane(cosines[:3], cosines[3:], spacing)


def _stack(
    path: Path, plane: _Plane, positions: np.ndarray, names: list[str], thickness: float
) -> tuple[np.ndarray, np.ndarray]:
    """Order (N,) of the slices at ``positions`` (N, 3, LPS mm) and the volume's affine in RAS mm."""
    depth = positions @ plane.normal
    order = np.argsort(depth, kind="stable")
    step = plane.normal * (abs(thickness) or 1.0)
    if len(order) > 1:
        _check_gaps(path, depth[order], [names[n] for n in order])
        step = (positions[order[-1]] - positions[order[0]]) / (len(order) - 1)
        across = step - plane.normal * (step @ plane.normal)
        # Rounded positions leave a drift of micrometres; only a drift one could see (gantry tilt) is kept as shear.
        if np.linalg.norm(across) * (len(order) - 1) < 0.1 * min(plane.spacing):
            step = plane.normal * (step @ plane.normal)
    lps = np.eye(4)
    lps[:3, 0] = plane.along_i * plane.spacing[0]
    lps[:3, 1] = plane.along_j * plane.spacing[1]
    lps[:3, 2] = step
    lps[:3, 3] = positions[order[0]]
    return order, LPS_FROM_RAS @ lps


def _check_gaps(path: Path, depth: np.ndarray, names: list[str]) -> None:
    gaps = np.diff(depth)
    usual = float(np.median(gaps))
    repeated = int((gaps < 0.01).sum())
    if repeated:
        raise InputError(
            f"{repeated + 1} or more images at the same position: this series is 4-D (time points, phases or echoes)",
            where=path,
            remedy="Export one time point or phase as a series of its own.",
        )
    worst = int(np.abs(gaps - usual).argmax())
    if abs(gaps[worst] - usual) > UNEVEN * usual:
        reason = "slices are missing" if gaps[worst] > 1.5 * usual else "the slices are unevenly spaced"
        raise InputError(
            f"{reason}: {gaps[worst]:.3g} mm between {names[worst]} and {names[worst + 1]}, "
            f"where the usual gap is {usual:.3g} mm",
            where=path,
            remedy="Export the whole series again, or resample it to even spacing.",
        )


def _layout_of_frames(path: Path, slices: list[_Slice]) -> _Layout:
    """An enhanced (multi-frame) object: frames are placed by their functional groups."""
    header = slices[0].header
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if len(slices) > 1 or not frames or any("PlanePositionSequence" not in frame for frame in frames):
        raise InputError(
            "a multi-frame DICOM object without a position for each frame: a film over time, not a volume",
            where=path,
            remedy="Export single frames (PNG or single-frame DICOM), or the volume as NIfTI.",
        )
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    turned = functional_group(frames[0], shared, "PlaneOrientationSequence")
    measures = functional_group(frames[0], shared, "PixelMeasuresSequence")
    plane = _plane(turned.get("ImageOrientationPatient"), _spacing(measures))
    positions = np.array([frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames], dtype=float)
    thickness = float(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 1.0)
    names = [f"frame {n + 1}" for n in range(len(frames))]
    order, affine = _stack(path, plane, positions, names, thickness)
    return _Layout(slices, affine, order)


def functional_group(frame: Dataset, shared: Dataset, name: str) -> Dataset:
    """The first item of a functional group, which may stand per frame or once for all."""
    sequence = frame.get(name) or shared.get(name)
    return sequence[0] if sequence else Dataset()


def _pixels(paths: list[Path], *, colour: bool) -> np.ndarray:
    """(I, J, K) float32, or (I, J, K, C) as stored for colour, in the order of ``paths``."""
    names = [str(path) for path in paths]
    # float32 from the start: slices of one series may have different rescale slopes.
    pixel_type = sitk.sitkUnknown if colour else sitk.sitkFloat32
    try:
        image = sitk.ReadImage(names if len(names) > 1 else names[0], pixel_type)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"the pixels cannot be read ({reason})", where=paths[0].parent, remedy="Export the series again."
        ) from error
    array = sitk.GetArrayFromImage(image)
    if image.GetDimension() == 2:
        array = array[None]
    return np.swapaxes(array, 0, 2)
