"""What a folder of DICOM files holds, in an SQLite file that survives restarts.

Only new and changed files are read when the folder is looked at again. A file that cannot be used is left out and
named with the reason; of several files with one SOP instance UID the first by name counts, the others are named: as
copies, or as conflicts where they hold something else.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID, MediaStorageDirectoryStorage

from samadapt.data.dicom import is_dicom
from samadapt.dicomweb.frames import check_complete, decoded
from samadapt.dicomweb.metadata import attributes
from samadapt.errors import InputError
from samadapt.files import sha256_of

logger = logging.getLogger(__name__)

STUDY_KEYWORDS = (
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDescription",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "StudyID",
)
SERIES_KEYWORDS = (
    "SeriesInstanceUID",
    "Modality",
    "SeriesDescription",
    "SeriesNumber",
    "SeriesDate",
    "SeriesTime",
    "BodyPartExamined",
    "ProtocolName",
    "Manufacturer",
    "PerformedProcedureStepStartDate",
    "PerformedProcedureStepStartTime",
)
INSTANCE_KEYWORDS = (
    "SOPInstanceUID",
    "SOPClassUID",
    "InstanceNumber",
    "Rows",
    "Columns",
    "BitsAllocated",
    "NumberOfFrames",
    "ContentDate",
    "ContentTime",
    "InstanceCreationDate",
    "InstanceCreationTime",
)
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")

Progress = Callable[[int, int], None]

_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, modified INTEGER, size INTEGER,
    study TEXT, series TEXT, instance TEXT, modality TEXT, header TEXT, metadata TEXT, problem TEXT);
CREATE INDEX IF NOT EXISTS by_uid ON files (study, series, instance, path);
CREATE INDEX IF NOT EXISTS by_instance ON files (instance, path);
CREATE TABLE IF NOT EXISTS pixels (path TEXT PRIMARY KEY, modified INTEGER, size INTEGER, digest TEXT);
"""
_COLUMNS = "path, modified, size, study, series, instance, modality, header, metadata, problem"

# Of several files with one instance UID, the first by name.
_TWICE = """
SELECT f.path, f.modified, f.size, f.study, f.series, MIN(o.path), o.modified, o.size, o.study, o.series
FROM files f JOIN files o ON o.instance = f.instance AND o.path < f.path
WHERE f.problem IS NULL AND o.problem IS NULL GROUP BY f.path
"""
_PATIENT = """json_extract(header, '$."00100020".Value[0]')"""

_COUNTED = "problem IS NULL AND NOT EXISTS (SELECT 1 FROM files o WHERE o.instance = f.instance AND o.path < f.path)"


@dataclass(frozen=True)
class Found:
    """One study, series or instance.

    Attributes:
        header: its DICOM JSON attributes (those of all levels above it too), tag -> element.
        modalities: of its series.
        series: how many series it has.
        instances: how many instances it has.
    """

    header: dict[str, Any]
    modalities: tuple[str, ...]
    series: int
    instances: int


@dataclass(frozen=True)
class _Pair:
    """Two files with one SOP instance UID: ``path``, and ``first``, which counts."""

    path: str
    modified: int
    size: int
    study: str
    series: str
    first: str
    first_modified: int
    first_size: int
    first_study: str
    first_series: str

    @property
    def first_file(self) -> tuple[str, int, int]:
        return self.first, self.first_modified, self.first_size


class Index:
    """The DICOM files below ``folders``, found by their UIDs. Every method may be called from any thread.

    Args:
        folders: where the files are; hidden files and folders inside are left out.
        database: the SQLite file; made if absent, and made anew where it is damaged.
    """

    def __init__(self, folders: Iterable[Path], database: Path) -> None:
        self.folders = [Path(folder).resolve() for folder in folders]
        self._lock = threading.RLock()
        database.parent.mkdir(parents=True, exist_ok=True)
        self._connection = _open(database)
        self._not_dicom: tuple[str, ...] = ()

    # ---- looking at the folder

    def update(self, progress: Progress = lambda done, total: None) -> None:
        """Take in new and changed files, drop those that are gone; ``progress(files done, of)`` goes along.

        What is found can be asked for folder by folder, so that no series is seen with a part of its slices.
        """
        files = [path for folder in self.folders for path in _walk(folder)]
        known = self._known()
        self._drop(known.keys() - {str(path) for path in files})
        done = 0
        for _, group in groupby(files, key=lambda path: path.parent):
            changed = []
            for path in group:
                done += 1
                if known.get(str(path)) != _stat(path):
                    changed.append(path)
                    progress(done, len(files))
            self.add(changed)
        taken = self._known().keys()
        self._not_dicom = tuple(str(path) for path in files if str(path) not in taken and not is_dicom(path))
        self._compare_copies()
        progress(done, len(files))

    def add(self, paths: Iterable[Path]) -> None:
        """Take in files that are new or have changed."""
        rows = {path: _row(path, *stat) for path in paths if (stat := _stat(path))}
        self._drop(str(path) for path, row in rows.items() if row is None)
        self._put([row for row in rows.values() if row is not None])

    # ---- asking

    def studies(self) -> list[Found]:
        return self._group("study", ())

    def series(self, study: str | None = None) -> list[Found]:
        return self._group("study, series", (study,))

    def instances(self, study: str | None = None, series: str | None = None) -> list[Found]:
        return self._group("study, series, instance", (study, series))

    def paths(self, study: str, series: str | None = None, instance: str | None = None) -> list[Path]:
        """Files of a study, series or instance, in the order of their names; empty where it is unknown."""
        where, values = _where((study, series, instance))
        rows = self._ask(f"SELECT path FROM files f WHERE {_COUNTED}{where} ORDER BY path", values)
        return [Path(row[0]) for row in rows]

    def instance_path(self, instance: str) -> Path | None:
        """The file that counts for a SOP instance UID, whatever its study."""
        rows = self._ask(f"SELECT path FROM files f WHERE {_COUNTED} AND instance = ?", [instance])
        return Path(rows[0][0]) if rows else None

    def metadata(self, path: Path, make: Callable[[Path], str]) -> str:
        """What ``make(path)`` says of a file; it is made once and kept until the file changes."""
        rows = self._ask("SELECT metadata FROM files WHERE path = ?", [str(path)])
        if rows and rows[0][0]:
            return str(rows[0][0])
        text = make(path)
        with self._changing() as connection:
            connection.execute("UPDATE files SET metadata = ? WHERE path = ?", [text, str(path)])
        return text

    def problems(self) -> dict[str, str]:
        """File -> why it is left out, duplicates among them."""
        broken = self._ask("SELECT path, problem FROM files WHERE problem IS NOT NULL ORDER BY path", [])
        copies = {pair.path: f"the same instance as {pair.first}, which is used" for pair in self._pairs()}
        return {**dict(broken), **copies, **self._instance_conflicts()}

    def conflicts(self) -> dict[str, str]:
        """What bears a UID that belongs to something else: file or series UID -> with what it is in conflict."""
        rows = self._ask(
            f"SELECT series, COUNT(DISTINCT study), COUNT(DISTINCT IFNULL({_PATIENT}, '')) FROM files f "
            f"WHERE {_COUNTED} GROUP BY series HAVING COUNT(DISTINCT study || ' ' || IFNULL({_PATIENT}, '')) > 1",
            [],
        )
        shared = {
            series: f"conflict: one series UID for {studies} studies and {patients} patients; it cannot be labelled"
            for series, studies, patients in rows
        }
        return {**self._instance_conflicts(), **shared}

    def not_dicom(self) -> tuple[str, ...]:
        """Files that were no DICOM files when the folder was looked at last."""
        return self._not_dicom

    def counts(self) -> dict[str, int]:
        """Numbers of studies, series and instances that can be asked for."""
        query = f"SELECT COUNT(DISTINCT study), COUNT(DISTINCT series), COUNT(*) FROM files f WHERE {_COUNTED}"
        studies, series, instances = self._ask(query, [])[0]
        return {"studies": studies, "series": series, "instances": instances}

    # ---- inside

    def _pairs(self) -> list[_Pair]:
        return [_Pair(*row) for row in self._ask(_TWICE)]

    def _compare_copies(self) -> None:
        """Read the pixels of files with one instance UID, where they have not been compared before."""
        for pair in self._pairs():
            for path, modified, size in ((pair.path, pair.modified, pair.size), pair.first_file):
                if self._pixels(path, modified, size) is None:
                    with self._changing() as connection:
                        row = (path, modified, size, _pixel_digest(Path(path), modified))
                        connection.execute("INSERT OR REPLACE INTO pixels VALUES (?, ?, ?, ?)", row)

    def _pixels(self, path: str, modified: int, size: int) -> str | None:
        query = "SELECT digest FROM pixels WHERE path = ? AND modified = ? AND size = ?"
        rows = self._ask(query, [path, modified, size])
        return str(rows[0][0]) if rows else None

    def _instance_conflicts(self) -> dict[str, str]:
        found = {}
        for pair in self._pairs():
            one, other = self._pixels(pair.path, pair.modified, pair.size), self._pixels(*pair.first_file)
            if (pair.study, pair.series) != (pair.first_study, pair.first_series):
                found[pair.path] = f"conflict: it has the instance UID of {pair.first}, of another series; that is used"
            elif one is not None and other is not None and one != other:
                found[pair.path] = f"conflict: it has the instance UID of {pair.first}, but other pixels; that is used"
        return found

    def _group(self, level: str, uids: tuple[str | None, ...]) -> list[Found]:
        where, values = _where(uids)
        rows = self._ask(
            "SELECT MIN(path), header, GROUP_CONCAT(DISTINCT modality), COUNT(DISTINCT series), COUNT(*) "
            f"FROM files f WHERE {_COUNTED}{where} GROUP BY {level} ORDER BY {level}",
            values,
        )
        return [
            Found(json.loads(header), tuple(sorted((modalities or "").split(","))), series, instances)
            for _, header, modalities, series, instances in rows
        ]

    def _known(self) -> dict[str, tuple[int, int]]:
        return {path: (modified, size) for path, modified, size in self._ask("SELECT path, modified, size FROM files")}

    def _drop(self, paths: Iterable[str]) -> None:
        with self._changing() as connection:
            connection.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])

    def _put(self, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            with self._changing() as connection:
                connection.executemany(f"INSERT OR REPLACE INTO files ({_COLUMNS}) VALUES ({marks})", rows)

    def _ask(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, tuple(values)).fetchall()

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._connection:
            yield self._connection


def _open(database: Path) -> sqlite3.Connection:
    try:
        return _prepared(database)
    except sqlite3.DatabaseError:
        logger.warning("%s is damaged and is made anew", database)
        for leftover in database.parent.glob(f"{database.name}*"):
            leftover.unlink()
        return _prepared(database)


def _prepared(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database, check_same_thread=False)  # the index's lock keeps threads apart
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(_TABLES)
    return connection


def _where(uids: Iterable[str | None]) -> tuple[str, list[str]]:
    given = [(name, uid) for name, uid in zip(("study", "series", "instance"), uids, strict=False) if uid is not None]
    return "".join(f" AND {name} = ?" for name, _ in given), [uid for _, uid in given]


def _walk(folder: Path) -> Iterator[Path]:
    """Files below ``folder``, those of one folder together, hidden ones left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent, name)


def _stat(path: Path) -> tuple[int, int] | None:
    """Time of change and size; None for what is gone or no plain file (to open a pipe would take for ever)."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size) if S_ISREG(stat.st_mode) else None


def _row(path: Path, modified: int, size: int) -> tuple[Any, ...] | None:
    """What the index keeps of a file; None for one that is no DICOM file at all."""
    if not is_dicom(path):
        return None
    try:
        header = _header(path)
    # pydicom raises almost anything on a damaged file; whatever it is, this file is left out and named.
    except Exception as error:
        reason = error.what if isinstance(error, InputError) else f"cannot be read ({type(error).__name__}: {error})"
        logger.warning("%s is left out: %s", path, reason)
        return (str(path), modified, size, None, None, None, None, None, None, reason)
    if header is None:
        return None
    uids = [str(header[name].value) for name in UIDS]
    text = json.dumps(attributes(header))
    return (str(path), modified, size, *uids, str(header.get("Modality") or ""), text, None, None)


def _pixel_digest(path: Path, modified: int) -> str:
    """Of what is seen of a file; of its bytes, where it has no pixels that could be decoded here."""
    try:
        array = decoded(path, modified)
    except InputError:
        return sha256_of(path)
    return sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def _header(path: Path) -> Dataset | None:
    """The attributes that can be asked for; None for a DICOMDIR.

    Raises:
        InputError: the file is not whole, or says not of which series it is.
    """
    with open(path, "rb") as handle:
        read = pydicom.dcmread(handle, stop_before_pixels=True)
        if read.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None
        missing = [name for name in (*UIDS, "SOPClassUID") if not read.get(name)]
        if missing:
            raise InputError(f"without {', '.join(missing)}")
        wrong = [name for name in UIDS if not UID(read[name].value).is_valid]
        if wrong:
            raise InputError(f"{wrong[0]} is no UID: {read[wrong[0]].value!r}")
        check_complete(handle, os.fstat(handle.fileno()).st_size, read)
    header = Dataset()
    for name in (*STUDY_KEYWORDS, *SERIES_KEYWORDS, *INSTANCE_KEYWORDS):
        if name in read:
            header[name] = read[name]
    if "SpecificCharacterSet" in read:
        header.SpecificCharacterSet = read.SpecificCharacterSet
    return header
