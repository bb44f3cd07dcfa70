"""MONAI Label's datastores, made safe: no id leaves the folder, no crash loses a label, no label is stored unread.

The upstream ``LocalDatastore`` copies labels and rewrites ``datastore_v2.json`` in place, and a watcher thread changes
its dictionaries under running requests. Here every change happens under one lock (threads and processes), files are
replaced atomically, and instead of a watcher the folder is looked at when somebody asks for its contents.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag

from samadapt.data.coverage import UNSAID, Coverage, labelled_slices
from samadapt.data.labels import values_from_label_info
from samadapt.data.volume import Geometry, read_label, read_volume
from samadapt.errors import InputError, StateError
from samadapt.files import atomic_path, write_json

logger = logging.getLogger(__name__)

EXTENSIONS = ("*.nii.gz", "*.nii", "*.nrrd", "*.mha", "*.png", "*.jpg", "*.jpeg")
_ENDINGS = tuple(pattern[1:] for pattern in EXTENSIONS)
_ID = re.compile(r"(?!\.)[^/\\\x00-\x1f]+")
_TAG = re.compile(r"\w[\w-]*")


def check_tag(tag: str) -> str:
    """A label tag names a folder: letters, digits, ``_`` and ``-`` only."""
    tag = tag.value if isinstance(tag, DefaultLabelTag) else tag
    if not _TAG.fullmatch(tag):
        raise InputError(
            f"{tag!r} cannot be a label tag", where="tag", remedy="Use 'final', 'original' or another plain word."
        )
    return tag


class Submission(NamedTuple):
    """A label as it was submitted.

    Attributes:
        info: what came with it.
        present: values in the mask, without 0.
        coverage: what it covers, by its own word or by the settings.
        slices: how many slices are labelled, of how many.
    """

    info: dict[str, Any]
    present: set[int]
    coverage: Coverage
    slices: tuple[int, int]


class SafeDatastore(LocalDatastore):
    """A folder of images with ``labels/<tag>/`` below it.

    A label is saved in three steps that a restart completes or forgets as a whole, so that mask and ``label_info``
    always belong together: the mask under a temporary name; a journal file that says what is to happen (from here on
    the label is saved); then the mask's rename and the entry in ``datastore_v2.json``.

    Args:
        datastore_path: the studies folder; made if absent.
        host_options: as the base class's; extensions default to ``EXTENSIONS``, the watcher stays off.

    Attributes:
        folder: the studies folder.
        geometry_of: reads an image's grid; replace it by one that remembers images.
        assumed: what labels cover that do not say so; replace it by what the settings say.
        last_saved: the label saved last.
    """

    def __init__(self, datastore_path: str, **host_options: Any) -> None:
        self.geometry_of: Callable[[str], Geometry] = lambda path: read_volume(path).geometry
        self.assumed = UNSAID
        self.last_saved = Submission({}, set(), UNSAID, (0, 0))
        self.folder = Path(datastore_path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._exclusive = FileLock(self.folder / ".samadapt.lock")
        self._seen: tuple[int, ...] = ()
        try:
            super().__init__(datastore_path, **{"extensions": EXTENSIONS, **host_options, "auto_reload": False})
        except ValueError as error:
            raise StateError(
                f"the list of images and labels cannot be read ({error})",
                where=self.folder / "datastore_v2.json",
                remedy="Restore it from a backup, or move it away: images and labels stay, the labels' names are lost.",
            ) from error
        self._finish_interrupted_saves()

    # ---- reading

    def image_path(self, image_id: str) -> str:
        """File (or DICOM folder) of an image.

        Raises:
            InputError: no image has this id.
        """
        self._look_again()
        path = self.get_image_uri(image_id) if image_id in self._datastore.objects else ""
        if not path:
            raise InputError(
                f"there is no image {image_id!r}",
                where="image",
                remedy=f"Give the id of one of the {len(self._datastore.objects)} images (the file name without its "
                "ending); GET /datastore/?output=all lists them.",
            )
        return path

    def local_image(self, image_id: str) -> Path | None:
        """File (or DICOM folder) of an image, if it is on this machine already."""
        path = LocalDatastore.get_image_uri(self, image_id) if image_id in self._datastore.objects else ""
        return Path(path) if path else None

    def local_label(self, image_id: str) -> Path | None:
        """File of an image's final label, if it has one and it is on this machine already."""
        path = LocalDatastore.get_label_uri(self, image_id, DefaultLabelTag.FINAL)
        return Path(path) if path else None

    def last_proposed(self, image_id: str) -> float:
        """When an image was proposed last, in seconds since the epoch; 0: never."""
        entry = self._datastore.objects.get(image_id)
        proposals = entry.image.info.get("strategy", {}).values() if entry else ()
        return max((float(one.get("ts", 0)) for one in proposals), default=0.0)

    def final_labels(self) -> list[Path]:
        """The files of all labels that count."""
        folder = Path(self._datastore.label_path(DefaultLabelTag.FINAL))
        files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        return [path for path in files if not path.name.startswith(".") and path.name.endswith(_ENDINGS)]

    def list_images(self) -> list[str]:
        self._look_again()
        return super().list_images()

    def json(self) -> dict[str, Any]:
        self._look_again()
        return super().json()

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        self._look_again()
        return super().get_unlabeled_images(label_tag, labels)

    def _look_again(self) -> None:
        """Take in files that people or other processes put into, or removed from, the folder since the last look."""
        if self._folder_times() != self._seen:
            self.refresh()

    def _folder_times(self) -> tuple[int, ...]:
        folders = [Path(self._datastore.image_path()), *Path(self._datastore.label_path(None)).glob("*/")]
        return tuple(folder.stat().st_mtime_ns for folder in folders if folder.is_dir())

    # ---- changing

    def _reconcile_datastore(self) -> None:
        with self._exclusive:
            times = self._folder_times()
            super()._reconcile_datastore()
            self._seen = times

    def _remove_non_existing(self) -> int:
        """As the base class's, with one look at each folder in place of several at each file."""
        self._init_from_datastore_file()
        images, labels, gone = _present(Path(self._datastore.image_path())), {}, 0
        for image_id, entry in list(self._datastore.objects.items()):
            if self._filename(image_id, entry.image.ext) not in images:
                del self._datastore.objects[image_id]
                gone += 1
                continue
            for tag, label in list(entry.labels.items()):
                if tag not in labels:
                    labels[tag] = _present(Path(self._datastore.label_path(tag)))
                if self._filename(image_id, label.ext) not in labels[tag]:
                    del entry.labels[tag]
                    gone += 1
        return gone

    def _update_datastore_file(self, lock: bool = True) -> None:
        with self._exclusive:
            write_json(self._datastore_config_path, json.loads(self._datastore.model_dump_json(exclude={"base_path"})))
            self._config_ts = os.stat(self._datastore_config_path).st_mtime

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        with self._exclusive:
            self._init_from_datastore_file()
            super().update_image_info(image_id, info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        Coverage.from_info(info)  # refuses what later trainings would have to refuse
        with self._exclusive:
            self._init_from_datastore_file()
            super().update_label_info(label_id, label_tag, info)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an uploaded image, once it could be read. An id that is taken must be removed first."""
        own_id, extension = self._to_id(os.path.basename(image_filename))
        image_id = image_id or own_id
        if not _ID.fullmatch(image_id) or self._to_id(f"{image_id}{extension}") != (image_id, extension):
            raise InputError(f"{image_id!r} cannot be an image id", where="image", remedy="Use a plain file name.")
        self._check_extension(extension)
        read_volume(image_filename)
        with self._exclusive:
            self._reconcile_datastore()
            if image_id in self._datastore.objects:
                raise InputError(
                    f"there already is an image {image_id!r}",
                    where="image",
                    remedy="Choose another id, or delete it first.",
                )
            target = Path(self._datastore.image_path()) / f"{image_id}{extension}"
            incoming = target.with_name(f".{target.name}.incoming")  # no image's ending: nobody lists it half-copied
            shutil.copyfile(image_filename, incoming)
            os.replace(incoming, target)
            self._reconcile_datastore()
            super().update_image_info(image_id, image_info or {})
        return image_id

    def remove_image(self, image_id: str) -> None:
        self.image_path(image_id)
        with self._exclusive:
            super().remove_image(image_id)

    def remove_label(self, label_id: str, label_tag: str) -> None:
        tag = check_tag(label_tag)
        if not self.get_label_uri(label_id, tag):
            raise InputError(f"there is no label {label_id!r} with the tag {tag!r}", where="id")
        with self._exclusive:
            super().remove_label(label_id, tag)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a mask whose grid equals its image's, with what its values mean.

        Raises:
            InputError: unknown image, bad tag, unreadable mask, other grid, a ``label_info`` that is none, or labelled
                slices or classes (see ``Coverage.from_info``) that the image cannot have; nothing is stored then.
        """
        tag = check_tag(label_tag)
        self._checked_mask(image_id, label_filename, label_info)
        with self._exclusive:
            self._init_from_datastore_file()
            self._write_label(image_id, label_filename, tag, dict(label_info or {}))
        return image_id

    def _checked_mask(self, image_id: str, label_filename: str, label_info: dict[str, Any]) -> np.ndarray:
        self._check_extension(self._to_id(os.path.basename(label_filename))[1])
        geometry = self.geometry_of(self.image_path(image_id))
        try:
            mask = read_label(label_filename, geometry)
        except InputError as error:  # the file's own name is that of an upload, which says nothing to a person
            raise InputError(error.what, where=f"label of {image_id}", remedy=error.remedy) from None
        info = label_info or {}
        values = values_from_label_info(info["label_info"]) if info.get("label_info") else None
        coverage, axis = Coverage.from_info(info).or_else(self.assumed), geometry.acquisition_axis
        slices = labelled_slices(coverage.left_out(mask, values, axis), mask.shape, axis)
        self.last_saved = Submission(info, set(np.unique(mask).tolist()) - {0}, coverage, slices)
        return mask

    def _check_extension(self, extension: str) -> None:
        if f"*{extension}" not in self._extensions:
            known = ", ".join(pattern[1:] for pattern in self._extensions)
            raise InputError(f"files of type {extension!r} are not taken", where="file", remedy=f"Valid: {known}.")

    def _write_label(self, image_id: str, label_filename: str, tag: str, info: dict[str, Any]) -> None:
        extension = self._to_id(os.path.basename(label_filename))[1]
        folder = Path(self._datastore.label_path(tag))
        incoming = folder / f".{image_id}.incoming"
        with atomic_path(incoming) as temporary:
            shutil.copyfile(label_filename, temporary)
        info |= {"ts": int(os.stat(incoming).st_mtime), "name": f"{image_id}{extension}"}
        journal = folder / f".{image_id}.journal"
        write_json(journal, {"image": image_id, "tag": tag, "ext": extension, "info": info})
        self._finish_save(journal)

    def _finish_save(self, journal: Path) -> None:
        """Do what a journal says. Doing it twice is doing it once."""
        entry = json.loads(journal.read_text(encoding="utf-8"))
        image = self._datastore.objects.get(entry["image"])
        incoming = journal.with_suffix(".incoming")
        target = journal.with_name(f"{entry['image']}{entry['ext']}")
        if incoming.exists():
            os.replace(incoming, target)
        if image is not None:
            former = image.labels.get(entry["tag"])
            image.labels[entry["tag"]] = type(image.image)(ext=entry["ext"], info=entry["info"])
            self._update_datastore_file()
            if former is not None and former.ext != entry["ext"]:
                journal.with_name(f"{entry['image']}{former.ext}").unlink(missing_ok=True)
        journal.unlink()

    def _finish_interrupted_saves(self) -> None:
        with self._exclusive:
            folders = Path(self._datastore.label_path(None))
            for journal in folders.glob("*/.*.journal"):
                if ".tmp." not in journal.name:
                    logger.warning("completing the save of a label that a crash interrupted: %s", journal)
                    self._finish_save(journal)
            for folder in (self.folder, *folders.glob("*/")):
                for unfinished in [*folder.glob(".*.incoming"), *folder.glob(".*.tmp.*")]:
                    unfinished.unlink(missing_ok=True)


def _present(folder: Path) -> set[str]:
    """Names of what is in a folder; links that lead nowhere are not."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}


def _check_uid(text: str, where: str) -> None:
    if not re.fullmatch(r"\d+(\.\d+){1,31}", text) or len(text) > 64:
        raise InputError(f"{text!r} is no DICOM series UID", where=where, remedy="Give a SeriesInstanceUID.")


class SafeDicomDatastore(DICOMWebDatastore, SafeDatastore):
    """The same over DICOMweb: images and labels pass through a cache folder of the layout above."""

    def image_path(self, image_id: str) -> str:
        _check_uid(image_id, "image")
        try:
            return self.get_image_uri(image_id)
        except IndexError:
            raise InputError(
                f"the PACS has no series {image_id}", where="image", remedy="Reload the study list in the viewer."
            ) from None

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        return list(dict.fromkeys(super().get_labeled_images()))  # several SEGs of one series are one labelled image

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """As ``SafeDatastore.save_label``; a final label also becomes a DICOM SEG in the PACS.

        The host names SEG segments by position among the values present, so it gets exactly those, in order.
        """
        tag = check_tag(label_tag)
        mask = self._checked_mask(image_id, label_filename, label_info)
        entries = (label_info or {}).get("label_info")
        if tag == DefaultLabelTag.FINAL:
            present = sorted(set(np.unique(mask).tolist()) - {0})
            if not present:
                raise InputError(
                    "an empty mask cannot be stored as DICOM SEG", where=image_id, remedy="Label at least one voxel."
                )
            by_value = {int(float(entry["idx"])): entry for entry in entries or []}
            label_info = {**label_info, "label_info": [by_value.get(v, {"name": f"label {v}"}) for v in present]}
        saved = super().save_label(image_id, label_filename, tag, label_info)
        if entries is not None:
            self.update_label_info(image_id, tag, {"label_info": entries})
        return saved

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """The stored mask, else the SEG series of this UID, converted; "" where its grid is not the image's."""
        stored = str(LocalDatastore.get_label_uri(self, image_id or label_id, label_tag))
        if stored:
            return stored
        _check_uid(label_id, "label")
        try:
            return str(super().get_label_uri(label_id, label_tag, image_id))
        except InputError as error:
            logger.warning("the segmentation %s is left out: %s", label_id, error)
            return ""

    def forget_lists(self) -> None:
        """The host keeps its lists of images and labels for two hours; drop them after a save."""
        DICOMWebDatastore.list_images.cache.clear()
        DICOMWebDatastore.get_labeled_images.cache.clear()
