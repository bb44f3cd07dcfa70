"""MONAI Label's datastores, made safe: no id leaves the folder, no crash loses a label, no label is stored unread.

The upstream ``LocalDatastore`` copies labels and rewrites ``datastore_v2.json`` in place, and a watcher thread changes
its dictionaries under running requests. Here every change happens under one lock (threads and processes), files are
replaced atomically, and instead of a watcher the folder is looked at when somebody asks for its contents.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag

from samadapt.data.coverage import CLASSES, SLICES, UNSAID, Coverage, check_nameless, labelled_slices
from samadapt.data.labels import IGNORE, LabelMap, draw_the_same, values_from_label_info, values_in
from samadapt.data.volume import LOSSY, Geometry, read_label, read_volume, write_mask
from samadapt.errors import InputError, NotFoundError, StateError
from samadapt.files import atomic_path, known_sha256, write_json

logger = logging.getLogger(__name__)

EXTENSIONS = ("*.nii.gz", "*.nii", "*.nrrd", "*.mha", "*.png", "*.jpg", "*.jpeg")
_ENDINGS = tuple(pattern[1:] for pattern in EXTENSIONS)
_MASKS = tuple(ending for ending in _ENDINGS if ending not in LOSSY)
RAW = (".bin", ".bin.gz")
BASED_ON, DRAWN, CONFIRMED = "based_on", "drawn", "confirmed"
"""Of a label's ``info``: the version that its annotator began with (None: no label); the values that it shows; whether
it was the same before somebody was asked to check it."""

_LONGEST_NAME = 64
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


def sent_mask(file: str, shape: tuple[int, int, int], image_id: str, info: dict[str, Any]) -> np.ndarray:
    """As ``raw_mask``, where ``info`` (which loses it) does not say another ``shape``.

    Raises:
        InputError: it does, or as ``raw_mask``.
    """
    if (said := info.pop("shape", None)) is not None and said != list(shape):
        raise InputError(
            f"the voxels' shape is {said}, the image's {list(shape)}",
            where="shape",
            remedy="Send the image's own grid: i fastest, then j, then k.",
        )
    return raw_mask(Path(file), shape, image_id)


def raw_mask(path: Path, shape: tuple[int, int, int], image_id: str) -> np.ndarray:
    """Voxels as OHIF holds them -> (I, J, K): i fastest, then j, then k; one byte each, or two (little endian).

    Raises:
        InputError: not as many as the image has, or a damaged ``.gz``.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"the voxels cannot be unpacked ({error})", where=f"label of {image_id}") from None
    voxels = int(np.prod(shape))
    if len(content) not in (voxels, 2 * voxels):
        raise InputError(
            f"{len(content)} bytes of voxels came, where the image has {' x '.join(map(str, shape))} = {voxels} voxels "
            "(one or two bytes each)",
            where=f"label of {image_id}",
            remedy="Send the mask of the whole volume of this image.",
        )
    kind = np.uint8 if len(content) == voxels else np.dtype("<u2")
    return np.frombuffer(content, kind).reshape(shape, order="F")


def in_order_of(frames: Sequence[str], mask: np.ndarray, slices: Any) -> np.ndarray:
    """``mask`` (I, J, K), whose slices are named by ``slices``, with its slices in the order of ``frames``.

    Raises:
        InputError: not the same names.
    """
    if not isinstance(slices, list) or sorted(map(str, slices)) != sorted(frames):
        raise InputError(
            f"these are not the {len(frames)} images of the series",
            where="slices",
            remedy="Send one SOPInstanceUID for each slice, in the order of the voxels, or leave it out.",
        )
    place = {str(uid): n for n, uid in enumerate(slices)}
    return mask[:, :, [place[uid] for uid in frames]]


def author_of(info: dict[str, Any]) -> str | None:
    """Who made a label: by name, if that came with it, else as the viewer calls itself; None where nothing says it."""
    return info.get("author") or info.get("client_id")


def drawn_names(info: Mapping[str, Any]) -> list[str]:
    """Names of the values that a label shows, in the values' order; of labels of former days, all that it lists.

    Raises:
        InputError: its ``label_info`` is none.
    """
    values = values_from_label_info(info.get("label_info") or [])
    return [name for value, name in sorted(values.items()) if value in info.get(DRAWN, values)]


def _check_nameless(present: set[int], labels: LabelMap | None) -> None:
    """Values without names are taken for the label map's, which is a guess; refuse where it must be wrong."""
    check_nameless(present, "label_info")
    unknown = sorted(present - set(range(1, len(labels.names) + 1)) - {IGNORE}) if labels else []
    if labels and unknown:
        order = ", ".join(f"{index} = {name}" for index, name in enumerate(labels.names, start=1))
        raise InputError(
            f"the mask holds {', '.join(map(str, unknown[:5]))}, and nothing says which structure that is",
            where="label_info",
            remedy=f'Send "label_info" in params: a list of {{"name": ..., "idx": ...}}. Without it: {order}.',
        )


def _told(info: dict[str, Any]) -> str:
    """Who made a label, and when, for people."""
    who = author_of(info) or info.get("source") or "by an unnamed person"
    return f"{who}, {time.strftime('%Y-%m-%d %H:%M', time.localtime(float(info.get('ts', 0))))}"


def check_text(info: Mapping[str, Any], key: str, article: str = "a") -> None:
    """Refuse a value that is neither a text nor left out."""
    if not isinstance(info.get(key), str | None):
        raise InputError(f"{article} {key} is a text", where=key, remedy="Send one, or leave it out.")


def _check_people(info: dict[str, Any]) -> None:
    """Names of people and programs are texts, or left out (MONAI Label's own client sends null)."""
    check_text(info, "client_id")
    check_text(info, "author", "an")
    if len(info.get("author") or "") > _LONGEST_NAME:
        raise InputError(
            f"an author's name has {_LONGEST_NAME} characters at most", where="author", remedy="Send a shorter one."
        )


def _version_name(file: Path, info: dict[str, Any]) -> str:
    """A label's name among all that its image ever had; it keeps it when another label takes its place."""
    moment = time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(float(info.get("ts", 0))))
    made = json.dumps([known_sha256(file), info.get("client_id"), info.get("author"), info.get("label_info")])
    return f"{moment}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"


class Submission(NamedTuple):
    """A label as it was submitted.

    Attributes:
        info: what came with it.
        present: values in the mask, without 0.
        coverage: what it covers, by its own word or by the settings.
        slices: how many slices are labelled, of how many.
        remarks: what else the annotator should know.
        version: the stored label's name among its image's versions; None where it is no final label.
    """

    info: dict[str, Any]
    present: set[int]
    coverage: Coverage
    slices: tuple[int, int]
    remarks: tuple[str, ...] = ()
    version: str | None = None


class Version(NamedTuple):
    """A label that counts, or once counted, for an image.

    Attributes:
        name: its own among the versions of the image; the same as long as the label is kept.
        path: of its file.
        info: what came with it.
        served: whether it is the one that counts.
    """

    name: str
    path: Path
    info: dict[str, Any]
    served: bool

    def structures(self) -> list[str]:
        """As ``drawn_names``, each once."""
        return list(dict.fromkeys(drawn_names(self.info)))

    def to_dict(self) -> dict[str, Any]:
        """For HTTP replies."""
        said = ("author", "client_id", "label_info", "source", "restored", "remarks")
        kept = {key: self.info.get(key) for key in said}
        structures = {"structures": self.structures()}
        return {"name": self.name, "time": self.info.get("ts"), **kept, **structures, "served": self.served}


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
        known_labels: the label map of now; replace it where one is known.
        last_saved: the label that this thread saved last.
    """

    def __init__(self, datastore_path: str, **host_options: Any) -> None:
        self.geometry_of: Callable[[str], Geometry] = lambda path: read_volume(path).geometry
        self.assumed = UNSAID
        self.known_labels: Callable[[], LabelMap | None] = lambda: None
        self._saved = threading.local()
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

    @property
    def last_saved(self) -> Submission:
        return getattr(self._saved, "submission", Submission({}, set(), UNSAID, (0, 0)))

    def begin(self) -> None:
        """What a server does once, before its first request."""
        self.take_in_plain_labels()

    def take_in_plain_labels(self) -> list[str]:
        """Let masks that lie in ``labels/`` itself, where the terminal reads them too, count as final labels.

        Copies of those whose image never had a final label; the others are older than what people have submitted since.

        Returns:
            Ids of the images whose masks are taken in. What cannot be is named in the log, with the remedy.
        """
        there = _present(Path(self._datastore.label_path(None)))
        plain = {image: file for image in self.list_images() if (file := self._plain_label(image, there)) is not None}
        if plain and self.known_labels() is None:
            logger.warning(
                "%d masks in %s are not used, as nobody has said what their values mean: start the server with "
                '--conf labels "first,second", or write labels.json',
                len(plain),
                self.folder / "labels",
            )
            return []
        taken = []
        for image, file in plain.items():
            try:
                self.save_label(image, str(file), DefaultLabelTag.FINAL.value, {"source": "the folder labels"})
                taken.append(image)
            except InputError as error:
                logger.warning("%s is not used: %s. %s", file, error.what, error.remedy)
        if taken:
            logger.info("%d masks in %s count as final labels from now on", len(taken), self.folder / "labels")
        return taken

    def _plain_label(self, image_id: str, there: Collection[str]) -> Path | None:
        """Of the files that lie ``there``, the mask of an image that never had a final label."""
        name = next((name for ending in _MASKS if (name := f"{image_id}{ending}") in there), None)
        if name is None or self.local_label(image_id) is not None or self._versions(image_id).is_dir():
            return None
        return Path(self._datastore.label_path(None)) / name

    def in_viewer(self, image_id: str, numbers: list[int]) -> dict[str, Any]:
        """What a next sample's reply says of slices where viewers count them in another way than the image does."""
        return {}

    def not_in_pacs(self) -> list[dict[str, Any]]:
        """Labels that have yet to reach the PACS; a folder's labels need not."""
        return []

    # ---- reading

    def make_ready(self, image_id: str) -> None:
        """Whatever the next request for this image needs done first.

        Raises:
            InputError: no such image, or one that cannot be read.
        """
        self.geometry_of(self.image_path(image_id))

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

    def known_id(self, image_id: str) -> str:
        """The id itself.

        Raises:
            InputError: no image has it.
        """
        self.image_path(image_id)
        return image_id

    def local_image(self, image_id: str) -> Path | None:
        """File (or DICOM folder) of an image, if it is on this machine already."""
        path = LocalDatastore.get_image_uri(self, image_id) if image_id in self._datastore.objects else ""
        return Path(path) if path else None

    def local_label(self, image_id: str) -> Path | None:
        """File of an image's final label, if it has one and it is on this machine already."""
        path = LocalDatastore.get_label_uri(self, image_id, DefaultLabelTag.FINAL)
        return Path(path) if path else None

    def is_confirmed(self, image_id: str) -> bool:
        """Whether somebody was asked to check an image's final label, and submitted it as it was."""
        return bool(LocalDatastore.get_label_info(self, image_id, DefaultLabelTag.FINAL).get(CONFIRMED))

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

    def knows_all_labels(self) -> bool:
        """Whether ``json`` lists every label there is: a store elsewhere may not answer."""
        return True

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
        """Let a label count no longer. A final one is kept as a version, which can be restored."""
        tag = check_tag(label_tag)
        if not self.get_label_uri(label_id, tag):
            raise InputError(f"there is no label {label_id!r} with the tag {tag!r}", where="id")
        with self._exclusive:
            if tag == DefaultLabelTag.FINAL and (latest := self._served(label_id)) is not None:
                self._keep(label_id, latest.path, latest.info)
            super().remove_label(label_id, tag)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a mask whose grid equals its image's, with what its values mean. The label before it is kept.

        Args:
            image_id: the image, by whatever name ``known_id`` takes; raw voxels are those of what is named.
            label_filename: an image file, or raw voxels (``.bin``, ``.bin.gz``; see ``raw_mask``).
            label_tag: "final" counts.
            label_info: ``label_info`` and whatever else came with the label. With ``based_on`` (the name of a version,
                or None for "there was no label") it only takes the place of that version.

        Raises:
            InputError: unknown image, bad tag, unreadable mask, other grid, a ``label_info`` that is none, none at all
                for values that the label map does not have or for 255 alone, or labelled slices or classes (see
                ``Coverage.from_info``) that the image cannot have; nothing is stored then.
            StateError: another label counts now than ``based_on`` says; nothing is stored then.
        """
        tag = check_tag(label_tag)
        info = dict(label_info or {})
        _check_people(info)
        named, image_id = image_id, self.known_id(image_id)
        with self._as_image(named, label_filename, info) as file:
            mask = self._checked_mask(image_id, file, info)
            if tag == DefaultLabelTag.FINAL and not info.get("label_info"):
                _check_nameless(self.last_saved.present, self.known_labels())
            self._store_checked(image_id, file, tag, info, mask)
        return image_id

    def _store_checked(self, image_id: str, file: str, tag: str, info: dict[str, Any], mask: np.ndarray) -> None:
        with self._exclusive:
            self._init_from_datastore_file()
            if tag == DefaultLabelTag.FINAL and BASED_ON in info:
                self._check_base(image_id, info[BASED_ON])
            info[CONFIRMED] = tag == DefaultLabelTag.FINAL and self._confirms(image_id, mask, info)
            if info[CONFIRMED]:
                self._remark("nothing was changed, so the label counts as checked")
            self._write_label(image_id, file, tag, info)
            if tag == DefaultLabelTag.FINAL and (stored := self._served(image_id)) is not None:
                self._saved.submission = self.last_saved._replace(version=stored.name)

    def _confirms(self, image_id: str, mask: np.ndarray, info: dict[str, Any]) -> bool:
        """Whether the label that counts draws the same, and the image was proposed since then.

        Only labelled images are proposed for their label. Who merely submits twice has not looked twice.
        """
        latest = self._served(image_id)
        if latest is None or self.last_proposed(image_id) < float(latest.info.get("ts", 0)):
            return False
        names, former = (values_from_label_info(one.get("label_info") or []) for one in (info, latest.info))
        try:
            return draw_the_same(mask, names, self.version_mask(image_id, latest)[0], former)
        except InputError:  # another image has taken the place of the one that it was drawn on
            return False

    def _check_base(self, image_id: str, base: Any) -> None:
        """Refuse to replace a label that its annotator does not know of."""
        if not isinstance(base, str | None):
            raise InputError(
                "the label before it is named by a text", where=BASED_ON, remedy="Send a version's name, or null."
            )
        latest = self._served(image_id)
        if latest is not None and latest.name != base:
            raise StateError(
                f"another label came meanwhile ({_told(latest.info)})",
                where=BASED_ON,
                remedy=f"Look at it first; to replace it (it is kept as a version), send {latest.name!r}.",
            )

    @contextmanager
    def _as_image(self, name: str, file: str, info: dict[str, Any]) -> Iterator[str]:
        """An image file of what was sent; raw voxels of what ``name`` names become one on the image's own grid."""
        if not file.endswith(RAW):
            yield file
            return
        geometry = self.geometry_of(self.image_path(name))
        mask = sent_mask(file, self._shape_shown(name, geometry), name, info)
        if (slices := info.pop("slices", None)) is not None:
            mask = self._in_order(name, mask, slices)
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "label.nii.gz"
            write_mask(written, self._as_stored(name, mask, geometry), geometry)
            yield str(written)

    def _shape_shown(self, name: str, geometry: Geometry) -> tuple[int, int, int]:
        """Shape of the grid on which viewers see what ``name`` names."""
        return geometry.shape

    def _as_stored(self, name: str, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        """A mask on that grid -> on the image's."""
        return mask

    def _in_order(self, name: str, mask: np.ndarray, slices: Any) -> np.ndarray:
        """A mask with its slices in their order in the grid; ``slices`` names them as they come."""
        raise InputError(
            "only DICOM series have slices with names", where="slices", remedy="Leave it out for this image."
        )

    # ---- versions

    def label_versions(self, image_id: str) -> list[Version]:
        """Every label that was ever final for an image, the newest first; the one that counts is among them."""
        found = []
        for note in self._versions(image_id).glob("[!.]*.json"):
            entry = json.loads(note.read_text(encoding="utf-8"))
            file = note.with_name(entry["file"])
            if file.is_file():
                found.append(Version(note.stem, file, entry["info"], served=False))
        if (latest := self._served(image_id)) is not None:
            found.append(latest)
        return sorted(found, key=lambda one: (one.served, one.info.get("ts", 0), one.name), reverse=True)

    def _served(self, image_id: str) -> Version | None:
        path = self.local_label(image_id)
        if path is None or not path.is_file():
            return None
        info = self.get_label_info(image_id, DefaultLabelTag.FINAL)
        return Version(_version_name(path, info), path, info, served=True)

    def latest_label(self, image_id: str) -> Version | None:
        """The label that counts; None where there is none.

        Raises:
            InputError: no such image.
        """
        return self._served(self.known_id(image_id))

    def label_version(self, image_id: str, name: str) -> Version:
        """One of ``label_versions``.

        Raises:
            InputError: no such image.
            NotFoundError: no version of this name.
        """
        known = self.label_versions(self.known_id(image_id))
        found = next((version for version in known if version.name == name), None)
        if found is None:
            raise NotFoundError(
                f"the label has no version {name!r}",
                where="version",
                remedy="GET /samadapt/label/versions?image=... lists them.",
            )
        return found

    def version_mask(self, image_id: str, version: Version) -> tuple[np.ndarray, Geometry]:
        """A version's voxels (I,J,K) on the grid that ``image_id`` names, with that grid.

        Raises:
            InputError: a file that does not lie on the image's grid (another one has taken the image's place).
        """
        geometry = self.geometry_of(self.image_path(image_id))
        return read_label(version.path, geometry), geometry

    def restore_label(self, image_id: str, name: str, info: dict[str, Any]) -> str:
        """Let an earlier version count again, as the newest; ``info`` says who wants that (see ``save_label``).

        Raises:
            InputError, NotFoundError, StateError: as ``label_version`` and ``save_label``.
        """
        version = self.label_version(image_id, name)
        if version.served:
            raise InputError("this version counts already", where="version", remedy="Choose an earlier one.")
        kept = {key: version.info[key] for key in ("label_info", SLICES, CLASSES) if key in version.info}
        again = {**kept, **info, "restored": name}
        return self.save_label(self.known_id(image_id), str(version.path), DefaultLabelTag.FINAL.value, again)

    def _versions(self, image_id: str) -> Path:
        return Path(self._datastore.label_path(None)) / "versions" / image_id

    def _keep_former(self, image_id: str) -> None:
        """Keep the final label, which is about to be replaced. Doing it twice is doing it once."""
        former = self.local_label(image_id)
        if former is not None and former.is_file():
            info = self.get_label_info(image_id, DefaultLabelTag.FINAL)
            self._keep(image_id, former, info)
            self._remark(f"the label before it ({_told(info)}) is kept as a version")

    def _keep(self, image_id: str, file: Path, info: dict[str, Any]) -> None:
        name, folder = _version_name(file, info), self._versions(image_id)
        target = folder / f"{name}{self._to_id(file.name)[1]}"
        with atomic_path(target) as temporary:
            shutil.copyfile(file, temporary)
        write_json(folder / f"{name}.json", {"file": target.name, "info": info})

    def _remark(self, sentence: str) -> None:
        self._saved.submission = self.last_saved._replace(remarks=(*self.last_saved.remarks, sentence))

    # ---- checking and writing

    def _checked_mask(self, image_id: str, label_filename: str, label_info: dict[str, Any]) -> np.ndarray:
        self._check_extension(self._to_id(os.path.basename(label_filename))[1])
        geometry = self.geometry_of(self.image_path(image_id))
        try:
            mask = read_label(label_filename, geometry)
        except InputError as error:  # the file's own name is that of an upload, which says nothing to a person
            raise InputError(error.what, where=f"label of {image_id}", remedy=error.remedy) from None
        info = label_info
        values = values_from_label_info(info["label_info"]) if info.get("label_info") else None
        coverage, axis = Coverage.from_info(info).or_else(self.assumed), geometry.acquisition_axis
        slices = labelled_slices(coverage.left_out(mask, values, axis), mask.shape, axis)
        present = values_in(mask) - {0}
        info[DRAWN] = sorted(present)
        self._saved.submission = Submission(info, present, coverage, slices)
        return mask

    def _check_extension(self, extension: str) -> None:
        if f"*{extension}" not in self._extensions:
            known = ", ".join(pattern[1:] for pattern in self._extensions)
            raise InputError(f"files of type {extension!r} are not taken", where="file", remedy=f"Valid: {known}.")

    def _write_label(
        self, image_id: str, label_filename: str, tag: str, info: dict[str, Any], made: int | None = None
    ) -> None:
        """Put a label in its place. ``made``: epoch seconds; None: now."""
        extension = self._to_id(os.path.basename(label_filename))[1]
        folder = Path(self._datastore.label_path(tag))
        incoming = folder / f".{image_id}.incoming"
        with atomic_path(incoming) as temporary:
            shutil.copyfile(label_filename, temporary)
        if tag == DefaultLabelTag.FINAL:
            self._keep_former(image_id)
        moment = int(os.stat(incoming).st_mtime) if made is None else made
        info |= {"ts": moment, "name": f"{image_id}{extension}"}
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
