"""STOW-RS: instances that come in are checked and written below one folder, each in one piece or not at all."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import UID

from samadapt.dicomweb.frames import check_complete
from samadapt.dicomweb.index import UIDS, Index
from samadapt.dicomweb.query import element
from samadapt.errors import InputError
from samadapt.files import atomic_path

logger = logging.getLogger(__name__)

# Failure reasons of PS3.18 table I.2-2.
PROCESSING_FAILURE = 0x0110
DUPLICATE = 0x0111
WRONG_STUDY = 0xA900
NOT_UNDERSTOOD = 0xC000


class RefusedError(Exception):
    """Why an instance is not stored: ``code`` for programs, ``reason`` for people."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Outcome:
    """What became of a request's instances: DICOM JSON, how many of each, and the refusals' reasons."""

    answer: dict[str, Any]
    stored: int
    reasons: tuple[str, ...]

    @property
    def status(self) -> int:
        """200 where all are stored, 202 for some, 409 for none."""
        return 409 if not self.stored else 202 if self.reasons else 200


def store(contents: Iterable[bytes], folder: Path, index: Index, root: str, study: str | None = None) -> Outcome:
    """Store each of ``contents``, DICOM files, as ``folder/<study>/<series>/<instance>.dcm``.

    Args:
        contents: the files' bytes.
        folder: where they go.
        index: takes them in; an instance that it has already, with the same content, counts as stored.
        root: the server's address, for the answer's.
        study: other studies' instances are refused.
    """
    stored: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    reasons: list[str] = []
    written: list[Path] = []
    for content in contents:
        read = None
        try:
            read = _checked(content, study)
            path = _write(content, read, folder, index)
            written += [path] if path else []
            address = f"{root}/studies/{read.StudyInstanceUID}/series/{read.SeriesInstanceUID}/instances"
            url = element("RetrieveURL", f"{address}/{read.SOPInstanceUID}")
            stored.append({**_named(read), **url})
        except RefusedError as refusal:
            reasons.append(refusal.reason)
            logger.warning("an instance is refused: %s", refusal.reason)
            reason = element("FailureReason", refusal.code)
            if read is None:
                others.append(reason)
            else:
                failed.append({**_named(read), **reason})
    index.add(written)
    answer = element("RetrieveURL", f"{root}/studies/{study}") if study else {}
    for keyword, items in (
        ("ReferencedSOPSequence", stored),
        ("FailedSOPSequence", failed),
        ("OtherFailuresSequence", others),
    ):
        answer |= element(keyword, *items) if items else {}
    return Outcome(answer, len(stored), tuple(reasons))


def _named(read: Dataset) -> dict[str, Any]:
    return element("ReferencedSOPClassUID", str(read.SOPClassUID)) | element(
        "ReferencedSOPInstanceUID", str(read.SOPInstanceUID)
    )


def _checked(content: bytes, study: str | None) -> FileDataset:
    try:
        handle = io.BytesIO(content)
        read = pydicom.dcmread(handle, stop_before_pixels=True)
        missing = [name for name in (*UIDS, "SOPClassUID") if not UID(str(read.get(name) or "")).is_valid]
        if missing:
            raise RefusedError(NOT_UNDERSTOOD, f"{missing[0]} is missing or no UID")
        check_complete(handle, len(content), read)
    except InputError as error:
        raise RefusedError(NOT_UNDERSTOOD, error.what) from error
    except RefusedError:
        raise
    except Exception as error:  # pydicom raises almost anything on what is no DICOM file
        raise RefusedError(NOT_UNDERSTOOD, f"no DICOM file ({type(error).__name__}: {error})") from error
    if study is not None and read.StudyInstanceUID != study:
        raise RefusedError(WRONG_STUDY, f"{read.SOPInstanceUID} is of another study: {read.StudyInstanceUID}")
    return read


def _write(content: bytes, read: Dataset, folder: Path, index: Index) -> Path | None:
    """The new file; None where the same instance is there already."""
    present = index.instance_path(str(read.SOPInstanceUID))
    if present is not None:
        if _same(present, content):
            return None
        raise RefusedError(DUPLICATE, f"there is another instance {read.SOPInstanceUID}, in {present}")
    # The UIDs were checked: digits and dots, which cannot lead out of the folder.
    path = folder / str(read.StudyInstanceUID) / str(read.SeriesInstanceUID) / f"{read.SOPInstanceUID}.dcm"
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise RefusedError(PROCESSING_FAILURE, f"{read.SOPInstanceUID} cannot be written ({error})") from error
    return path


def _same(path: Path, content: bytes) -> bool:
    """Whether both hold the same attributes; their file headers may name different programs."""
    if path.read_bytes() == content:
        return True
    one, other = pydicom.dcmread(path), pydicom.dcmread(io.BytesIO(content))
    return bool(Dataset(one) == Dataset(other))
