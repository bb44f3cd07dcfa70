"""Which images a studies folder holds, which of them are labelled, and whose they are."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from samadapt.data.coverage import UNSAID, Coverage
from samadapt.data.dicom import dicom_files, patient_id
from samadapt.data.labels import values_from_label_info
from samadapt.data.volume import LOSSY, SUFFIXES, image_suffix
from samadapt.errors import InputError

DATASTORE_FILE = "datastore_v2.json"
PATIENTS_FILE = "patients.json"
FINAL = "final"

Submitted = TypeVar("Submitted")

PATIENT_PATTERNS = (
    re.compile(r"(patient[-_]?\d+)(?![a-z0-9])", re.IGNORECASE),
    re.compile(r"(sub-[a-z0-9]+)(?![a-z0-9])", re.IGNORECASE),
    re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?![A-Z0-9])"),
)
"""Case ids that name their patient at the start: ``patient001_12`` (ACDC), ``sub-01_ses-2`` (BIDS), TCGA barcodes."""


@dataclass(frozen=True)
class Case:
    """One image, and its label if it has one.

    Args:
        id: MONAI Label's image id: the file name without its suffix, or the folder name of a DICOM series.
        image: file, or folder with one DICOM series.
        label: the label that counts as ground truth, None where the case is not labelled.
        values: label value -> name as submitted with the label, None where the label came without names.
        patient: whose image it is, None where that is unknown.
        coverage: which slices and classes the label speaks of.
    """

    id: str
    image: Path
    label: Path | None = None
    values: dict[int, str] | None = None
    patient: str | None = None
    coverage: Coverage = UNSAID


def assume(cases: Iterable[Case], coverage: Coverage) -> list[Case]:
    """The cases, where labels that do not say what they cover cover this."""
    return [replace(case, coverage=case.coverage.or_else(coverage)) for case in cases]


def find_cases(studies: str | Path) -> list[Case]:
    """Every image of a studies folder, sorted by id.

    Two layouts are understood, of files or of DICOM folders (one series each):

    - MONAI Label's: images in the folder itself, labels in ``labels/final`` (only those count), names of label
      values, and what a label covers, in ``datastore_v2.json``;
    - plain: ``images/`` and ``labels/`` with the same names, or images in the folder itself and ``labels/``.

    A DICOM folder without such a label is labelled by the latest SEG or RTSTRUCT inside it, if there is one, with the
    names in it.

    Hidden files and folders are ignored. Where one id has several files, the one that the datastore names wins, else
    the first by suffix (.nii.gz before .nii before .nrrd ...).

    The patient comes from ``patients.json`` (case id -> patient) in the folder, else from DICOM's PatientID, else
    from the id where it follows one of :data:`PATIENT_PATTERNS`.

    Raises:
        InputError: no such folder, a broken datastore_v2.json or patients.json, names of label values, or labelled
            slices or classes, that cannot be understood.
    """
    studies = Path(studies)
    if not studies.is_dir():
        raise InputError("no such folder", where=studies, remedy="Name the folder that holds the images.")
    datastore = _datastore(studies)
    images = _images(studies, datastore)
    labels = _labels(studies, datastore, images)
    drawn = {case_id: found for case_id, image in images.items() if case_id not in labels and (found := _drawn(image))}
    patients = _patients(studies)
    return [
        Case(
            id=case_id,
            image=image,
            label=labels.get(case_id) or drawn.get(case_id),
            values=_names_drawn(drawn[case_id])
            if case_id in drawn
            else _submitted(studies, datastore, case_id, _values)
            if case_id in labels
            else None,
            patient=patients.get(case_id) or _patient(case_id, image),
            coverage=_submitted(studies, datastore, case_id, Coverage.from_info) if case_id in labels else UNSAID,
        )
        for case_id, image in sorted(images.items())
    ]


def _datastore(studies: Path) -> dict[str, Any]:
    """MONAI Label's own record of the folder, {} where there is none."""
    path = studies / DATASTORE_FILE
    value = _read_json(path) if path.exists() else {}
    if not isinstance(value.get("objects", {}), dict):
        raise InputError("not a MONAI Label datastore", where=path, remedy="Remove the file; the server rebuilds it.")
    return value


def _images(studies: Path, datastore: Mapping[str, Any]) -> dict[str, Path]:
    folder = studies / str(datastore.get("images_dir", ""))
    images = _members(folder)
    for case_id, record in datastore.get("objects", {}).items():
        named = folder / f"{case_id}{_part(record, 'image').get('ext', '')}"
        if image_suffix(named.name) and named.is_file():
            images[case_id] = named
    plain = _members(studies / "images")
    # Beside a plain images/ there may lie DICOM folders that those images were made from.
    return images if any(image.is_file() for image in images.values()) or not plain else plain


def _labels(studies: Path, datastore: Mapping[str, Any], images: Mapping[str, Path]) -> dict[str, Path]:
    folder = studies / str(datastore.get("labels_dir", "labels"))
    in_images = any(image.parent == studies / "images" for image in images.values())
    # A server once started over a plain folder leaves an empty labels/final behind; the plain labels still count.
    final = (folder / FINAL).is_dir() and not in_images
    found = _members(folder / FINAL if final else folder)
    for case_id, record in datastore.get("objects", {}).items():
        named = folder / FINAL / f"{case_id}{_final(record).get('ext', '')}"
        if final and image_suffix(named.name) and named.is_file():
            found[case_id] = named
    return {case_id: path for case_id, path in found.items() if case_id in images and _may_be_label(path)}


def _drawn(image: Path) -> Path | None:
    """The latest SEG or RTSTRUCT that lies in the folder of a DICOM series."""
    if not image.is_dir():
        return None
    from samadapt.data.dicom_label_file import latest_label  # its libraries take a second to import

    return latest_label(image)


def _names_drawn(label: Path) -> dict[int, str]:
    from samadapt.data.dicom_label_file import names_of

    return names_of(label)


def _may_be_label(path: Path) -> bool:
    return path.is_file() and image_suffix(path.name) not in LOSSY


def _members(folder: Path) -> dict[str, Path]:
    """Id -> image file or DICOM folder directly inside ``folder``."""
    members: dict[str, tuple[int, Path]] = {}
    if not folder.is_dir():
        return {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        suffix = image_suffix(path.name)
        if path.is_dir():
            if path.name not in ("images", "labels") and next(dicom_files(path), None) is not None:
                members.setdefault(path.name, (len(SUFFIXES), path))
        elif suffix is not None:
            rank, case_id = SUFFIXES.index(suffix), path.name[: -len(suffix)]
            if case_id not in members or rank < members[case_id][0]:
                members[case_id] = (rank, path)
    return {case_id: path for case_id, (_, path) in members.items()}


def _values(info: Mapping[str, Any]) -> dict[int, str] | None:
    label_info = info.get("label_info") or _part(info, "params").get("label_info")
    return values_from_label_info(label_info) if label_info else None


def _submitted(
    studies: Path, datastore: Mapping[str, Any], case_id: str, read: Callable[[Mapping[str, Any]], Submitted]
) -> Submitted:
    """What ``read`` makes of that with which a case's label was submitted."""
    info = _part(_final(datastore.get("objects", {}).get(case_id)), "info")
    try:
        return read(info)
    except InputError as error:
        raise InputError(
            f"label of '{case_id}': {error.what}", where=studies / DATASTORE_FILE, remedy="Submit that label again."
        ) from error


def _part(record: Any, name: str) -> dict[str, Any]:
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}


def _final(record: Any) -> dict[str, Any]:
    return _part(_part(record, "labels"), FINAL)


def _patients(studies: Path) -> dict[str, str]:
    path = studies / PATIENTS_FILE
    return {str(case): str(patient) for case, patient in _read_json(path).items()} if path.exists() else {}


def _patient(case_id: str, image: Path) -> str | None:
    if image.is_dir():
        return patient_id(image)
    matches = (pattern.match(case_id) for pattern in PATIENT_PATTERNS)
    return next((match.group(1) for match in matches if match), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = _read_settled(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON ({error})", where=path, remedy="Mend or remove the file.") from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=path, remedy="Mend or remove the file.")
    return value


def _read_settled(path: Path) -> Any:
    """The file's JSON; a server that is just rewriting it (not atomically) is given half a second."""
    for _ in range(5):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            time.sleep(0.1)
    return json.loads(path.read_text(encoding="utf-8"))
