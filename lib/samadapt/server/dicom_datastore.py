"""The datastore over DICOMweb: series are fetched once in the background, labels go back to the PACS as DICOM SEG."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from dicomweb_client import DICOMwebClient
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.utils.others.generic import md5_digest
from pydicom.dataset import Dataset

from samadapt.data.dicom import SeriesGrid, read_series, series_grid
from samadapt.data.dicom_seg import read_seg, write_seg
from samadapt.data.labels import values_from_label_info, values_in
from samadapt.data.rtstruct import read_rtstruct
from samadapt.data.volume import read_label, write_image, write_mask
from samadapt.errors import InputError, NotFoundError, SamAdaptError, UnavailableError
from samadapt.files import write_json
from samadapt.server.datastore import DRAWN, SafeDatastore, Version, author_of, in_order_of
from samadapt.server.fetching import Fetching, Progress
from samadapt.server.outbox import Outbox, outbox_folder
from samadapt.server.pacs import LabelEntry, Pacs, SeriesEntry, check_uid, wanted_by_person
from samadapt.server.precedence import Claim, objection

logger = logging.getLogger(__name__)

FINAL = DefaultLabelTag.FINAL.value
_DAY = 24 * 3600.0


class SafeDicomDatastore(SafeDatastore):
    """Series of a PACS as images, its SEG and RTSTRUCT objects as labels.

    The cache folder has the layout of a studies folder: each series that somebody needed as one NIfTI file, labels
    below ``labels/``; the images' attributes lie in ``.dicom/``. The arguments are those with which the host makes its
    own store.

    Args:
        client: connected to the PACS.
        search_filter: the host's; its default (CT alone) is not applied unless somebody has set it.
        cache_path: where the cache folder lies; None: in the home folder, as the host does it.
        fetch_by_frame: not used; instances are fetched whole.
        convert_to_nifti: not used; always done.
    """

    def __init__(
        self,
        client: DICOMwebClient,
        search_filter: Mapping[str, Any] | None = None,
        cache_path: str | None = None,
        fetch_by_frame: bool = False,
        convert_to_nifti: bool = True,
    ) -> None:
        parent = Path(cache_path) if cache_path else Path.home() / ".cache" / "monailabel" / "dicom"
        folder = parent / md5_digest(client.base_url)
        self._attributes = folder / ".dicom"
        self._pacs = Pacs(client, wanted_by_person(), self._attributes / "labels")
        self._fetching = Fetching(self._fetch)
        self._taking_in: dict[str, threading.RLock] = {}
        self._outbox = Outbox(outbox_folder(folder), self._pacs.store)
        super().__init__(str(folder))

    def name(self) -> str:
        return self._pacs.url

    def begin(self) -> None:
        """Send the labels that the PACS did not get before this server started."""
        self._outbox.keep_only(lambda one: self._objects(one.image) if one.image else {one.object})
        self._outbox.begin()

    def not_in_pacs(self) -> list[dict[str, Any]]:
        """Labels that count here and that the PACS has yet to get, the oldest first."""
        return [asdict(one) for one in self._outbox.waiting()]

    # ---- images

    def list_images(self) -> list[str]:
        """Every image series of the PACS; those that are here already, where it does not answer."""
        try:
            return list(self._pacs.series())
        except UnavailableError as error:
            logger.warning("%s", error)
            return super().list_images()

    def image_path(self, image_id: str) -> str:
        """File of a series, which is fetched first if need be.

        Raises:
            InputError: no series of this UID, or one that makes no volume.
            UnavailableError: the PACS does not answer, or is not done yet.
        """
        check_uid(image_id, "image")
        self._pacs.check_unshared(image_id)
        path = self._here(image_id)
        if path is None:
            self._fetching.wait(image_id)
            path = self._here(image_id)
        if path is None:  # it was here, and somebody has removed it
            self._fetching.forget(image_id)
            raise UnavailableError("the series has to be fetched again", where=image_id, remedy="Ask again.")
        return str(path)

    def get_image_uri(self, image_id: str) -> str:
        """File of a series, at once: where it will lie, if it is only being fetched."""
        check_uid(image_id, "image")
        if (path := self._here(image_id)) is not None:
            return str(path)
        self._fetching.start(image_id)
        return str(self.folder / f"{image_id}.nii")

    def make_ready(self, image_id: str) -> None:
        """Start fetching a series, after a look at its attributes: slices that make no volume are told by them."""
        if self._here(image_id) is None:
            metadata = self._pacs.metadata(self._pacs.find(image_id))
            _grid_before_fetching(metadata, image_id)
            self._refuse_as_before(image_id, len(metadata))
            self._fetching.start(image_id)

    def progress(self, image_id: str) -> Progress | None:
        """How far the fetch of a series is; None where nobody has asked for it."""
        check_uid(image_id, "image")
        return Progress("ready") if self._here(image_id) else self._fetching.progress(image_id)

    def start_fetching(self, image_id: str) -> Progress:
        """Fetch a series in the background, unless it is here."""
        check_uid(image_id, "image")
        return Progress("ready") if self._here(image_id) else self._fetching.start(image_id)

    def _here(self, image_id: str) -> Path | None:
        if image_id not in self._datastore.objects:
            return None
        path = Path(LocalDatastore.get_image_uri(self, image_id))
        return path if path.is_file() and self._headers_file(image_id).is_file() else None

    def _headers_file(self, image_id: str) -> Path:
        return self._attributes / f"{image_id}.json"

    def _headers(self, image_id: str) -> list[Dataset]:
        return [Dataset.from_json(one) for one in json.loads(self._headers_file(image_id).read_text(encoding="utf-8"))]

    def grid(self, image_id: str) -> SeriesGrid:
        """The grid of a series that is here, with the names of its slices."""
        return series_grid(self._headers(image_id), image_id)

    def _fetch(self, uid: str, tell: Callable[[int, int], None]) -> None:
        """Fetch a series, check it and make a NIfTI file of it (in a thread of ``Fetching``)."""
        started = time.monotonic()
        series = self._pacs.find(uid)
        metadata = self._pacs.metadata(series)
        _grid_before_fetching(metadata, uid)
        tell(0, len(metadata))
        headers: list[Dataset] = []
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self._attributes_folder()) as folder:
            for image in self._pacs.fetch(series):
                image.save_as(Path(folder) / f"{len(headers):06}.dcm", write_like_original=False)
                headers.append(_without_pixels(image))
                tell(len(headers), len(metadata))
            if len(headers) != len(metadata):
                raise UnavailableError(f"{len(headers)} of {len(metadata)} images came", where=f"series {uid}")
            try:
                read = read_series(Path(folder))
            except InputError as error:
                refused = {"images": len(headers), "what": error.what, "remedy": error.remedy}
                write_json(self._refusal_file(uid), refused)
                raise InputError(error.what, where=f"series {uid}", remedy=error.remedy) from None
        self._refusal_file(uid).unlink(missing_ok=True)
        write_json(self._headers_file(uid), [header.to_json_dict() for header in headers])
        write_image(self.folder / f"{uid}.nii", read)
        self._list(series)
        logger.info("series %s: %d images in %.1f s", uid, len(headers), time.monotonic() - started)

    def _refusal_file(self, uid: str) -> Path:
        return self._attributes / "refused" / f"{uid}.json"

    def _refuse_as_before(self, uid: str, images: int) -> None:
        """Refuse what could not be read when it was fetched, also before a restart, unless images have come since."""
        path = self._refusal_file(uid)
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if before and before["images"] == images:
            raise InputError(before["what"], where=f"series {uid}", remedy=before["remedy"])

    def _attributes_folder(self) -> Path:
        """The folder, without what fetches of former days left behind when they were interrupted."""
        self._attributes.mkdir(parents=True, exist_ok=True)
        for left in self._attributes.glob(".fetch-*"):
            if time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left, ignore_errors=True)
        return self._attributes

    def _list(self, series: SeriesEntry) -> None:
        """Enter a series that has just come into the list, and its patient into the folder's."""
        with self._exclusive:
            self._reconcile_datastore()
            self._datastore.objects[series.uid].image.info |= _attributes_of(series)
            self._update_datastore_file()
            if series.patient:
                path = self.folder / "patients.json"
                known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                write_json(path, {**known, series.uid: series.patient})

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """Attributes by which viewers open a series, and what was noted about it; the PACS.s of one to come."""
        if image_id in self._datastore.objects:
            return dict(super().get_image_info(image_id))
        series = self._pacs.series().get(image_id)
        return _attributes_of(series) if series else {}

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Nothing is noted about series that are not here yet."""
        if image_id in self._datastore.objects:
            super().update_image_info(image_id, info)

    def known_id(self, image_id: str) -> str:
        check_uid(image_id, "image")
        return image_id

    # ---- labels

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Series with a final label, in the store or in the PACS."""
        images = self.list_images()
        found = {*LocalDatastore.get_labeled_images(self), *(entry.image for entry in self._usable())}
        return [image for image in images if image in found]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        labelled = set(self.get_labeled_images())
        return [image for image in self.list_images() if image not in labelled]

    def json(self) -> dict[str, Any]:
        """As the base class's, with the labels of the PACS that nobody has needed yet: their names count already."""
        content = super().json()
        latest = {entry.image: entry for entry in self._usable()}  # the oldest come first
        for image, entry in latest.items():
            record = content["objects"].setdefault(image, {"image": {"ext": ".nii", "info": {}}, "labels": {}})
            record["labels"].setdefault(FINAL, {"ext": "", "info": _info_of(entry)})
        return content

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """The stored mask; where only the PACS has a label, that one, read now; "" where there is none."""
        image = image_id or label_id
        check_uid(image, "label")
        if label_tag == FINAL:
            self.take_in(image)
        return str(LocalDatastore.get_label_uri(self, image, label_tag))

    def latest_label(self, image_id: str) -> Version | None:
        """As the base class's; labels that others have stored in the PACS are read first.

        Raises:
            NotFoundError: neither the PACS nor the cache has such a series.
        """
        check_uid(image_id, "image")
        if image_id not in self.list_images():
            raise NotFoundError(
                f"there is no series {image_id}", where="image", remedy="GET /datastore/?output=all lists them."
            )
        self.take_in(image_id)
        return super().latest_label(image_id)

    def knows_all_labels(self) -> bool:
        """Whether the PACS has told which labels it holds."""
        try:
            self._pacs.labels()
        except UnavailableError:
            return False
        return True

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Fetches every labelled series and label that is not here yet."""
        for image in self.get_labeled_images():
            try:
                self.take_in(image)
            except SamAdaptError as error:
                logger.warning("%s is left out: %s", image, error)
        return list(super().datalist(full_path))

    def take_in(self, image_id: str) -> None:
        """Read the label objects that the PACS has of a series and that are not known yet; the latest one counts.

        Raises:
            InputError: the series makes no volume.
            UnavailableError: the PACS does not answer.
        """
        # Before what is known: the PACS gets no label of ours whose object is not known here already.
        listed = [entry for entry in self._usable() if entry.image == image_id]
        with self._taking_in.setdefault(image_id, threading.RLock()):
            known = self._objects(image_id)
            for entry in [one for one in listed if one.object not in known]:
                try:
                    self._take_in(entry)
                except UnavailableError:
                    raise
                # pydicom and highdicom raise almost anything on a damaged object; the other labels count all the same.
                except Exception as error:
                    logger.warning("the %s %s cannot be a label: %s", entry.modality, entry.object, error)
                    self._pacs.refuse(entry, str(error) or type(error).__name__)

    def _take_in(self, entry: LabelEntry) -> None:
        path = self.image_path(entry.image)
        grid = self.grid(entry.image)
        read = read_seg if entry.modality == "SEG" else read_rtstruct
        label = read(self._pacs.fetch_label(entry), grid)
        if not label.mask.any():
            raise InputError("nothing is drawn in it", where=entry.object)
        info = {**_info_of(entry), "remarks": list(label.remarks), DRAWN: sorted(values_in(label.mask) - {0})}
        claim = Claim.of(entry.own, info["ts"], _drawn(label.mask, label.values))
        with tempfile.TemporaryDirectory() as folder, self._exclusive:
            file = Path(folder) / f"{entry.image}.nii.gz"
            write_mask(file, label.mask, self.geometry_of(path), label.values)
            self._init_from_datastore_file()
            present = self._claim(entry.image)
            if present is not None and (why := objection(claim, present)):
                logger.warning("the %s %s of %s does not count: %s", entry.modality, entry.object, entry.image, why)
                self._keep(entry.image, file, {**info, "remarks": [*info["remarks"], f"this does not count: {why}"]})
                return
            self._write_label(entry.image, str(file), FINAL, info, made=info["ts"])

    def _claim(self, image_id: str) -> Claim | None:
        """What the label that counts can say for itself; None where there is none."""
        path = self.local_label(image_id)
        if path is None:
            return None
        info = self.get_label_info(image_id, FINAL)
        names = values_from_label_info(info["label_info"]) if info.get("label_info") else {}
        mask = read_label(path, self.geometry_of(self.image_path(image_id)))
        return Claim.of("source" not in info, int(info.get("ts", 0)), _drawn(mask, names))

    def _objects(self, image_id: str) -> set[str]:
        """SOPInstanceUIDs of all labels of an image that are known here."""
        return {str(version.info.get("object")) for version in self.label_versions(image_id)}

    def _usable(self) -> list[LabelEntry]:
        try:
            return [entry for entry in self._pacs.labels().values() if entry.refused is None]
        except UnavailableError as error:
            logger.warning("%s", error)
            return []

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """As ``SafeDatastore.save_label``; a final label also becomes a DICOM SEG in the PACS.

        It is stored here first. Where the PACS does not take it, it counts all the same and is sent again later; of an
        empty mask there is no SEG. Remarks say so.
        """
        self.image_path(image_id)
        if str(getattr(label_tag, "value", label_tag)) == FINAL:
            self.take_in(image_id)  # what others have stored meanwhile is a version before this one
        return super().save_label(image_id, label_filename, label_tag, label_info)

    def _store_checked(self, image_id: str, file: str, tag: str, info: dict[str, Any], mask: np.ndarray) -> None:
        info.pop("source", None)  # with it, a label would count as another program's
        seg = self._seg_of(image_id, mask, info) if tag == FINAL else None
        if seg is None:
            super()._store_checked(image_id, file, tag, info, mask)
            return
        info |= {"object": str(seg.SOPInstanceUID), "series": str(seg.SeriesInstanceUID)}
        waiting = self._outbox.put(seg)
        try:
            super()._store_checked(image_id, file, tag, info, mask)
        except BaseException:
            self._outbox.withdraw(waiting)
            raise
        try:
            self._outbox.send(waiting)
        except SamAdaptError as error:
            logger.error("the label of %s is stored here, but not yet in the PACS: %s", image_id, error)
            self._remark(f"the label is stored here and counts, but is not yet in the PACS, and is sent again: {error}")

    def _seg_of(self, image_id: str, mask: np.ndarray, info: dict[str, Any]) -> Dataset | None:
        """The DICOM SEG of a label; None, and a remark, where there can be none."""
        if not mask.any():
            self._remark("nothing is drawn: the empty label counts, but the PACS gets no DICOM SEG of it")
            return None
        names = values_from_label_info(info["label_info"]) if info.get("label_info") else {}
        number = len(self.label_versions(image_id)) + 1
        try:
            return write_seg(
                mask, names, self.grid(image_id), self._headers(image_id), author_of(info), datetime.now(), number
            )
        # highdicom raises almost anything on odd attributes of the images; the label counts all the same.
        except Exception as error:
            logger.exception("no DICOM SEG can be made of the label of %s", image_id)
            self._remark(f"the label counts, but no DICOM SEG can be made of it for the PACS: {error}")
            return None

    def seg_file(self, series_dir: str, label: str, label_info: Any, use_itk: bool = True) -> str:
        """A mask as a DICOM SEG file, which the caller deletes; with the arguments of the host's converter.

        Args:
            series_dir: its last part is the series UID.
            label: the mask's file.
            label_info: names of its values.
            use_itk: not used.
        """
        uid = Path(series_dir).name
        mask = read_label(label, self.geometry_of(self.image_path(uid)))
        seg = write_seg(mask, values_from_label_info(label_info), self.grid(uid), self._headers(uid))
        handle, name = tempfile.mkstemp(suffix=".dcm")
        os.close(handle)
        seg.save_as(name, write_like_original=False)
        return name

    def _in_order(self, image_id: str, mask: np.ndarray, slices: Any) -> np.ndarray:
        return in_order_of([uid for uid, _ in self.grid(image_id).frames], mask, slices)

    def forget_lists(self) -> None:
        """Ask the PACS anew what it holds."""
        self._pacs.forget()


def _grid_before_fetching(metadata: list[Dataset], uid: str) -> None:
    """Refuse what the attributes alone tell; a PACS may keep too few of them for that."""
    if not metadata:
        raise NotFoundError("the series is empty", where=f"series {uid}")
    if len({str(one.get("PatientID") or "") for one in metadata}) > 1:
        raise InputError(
            "images of several patients in one series", where=f"series {uid}", remedy="Give each a series of its own."
        )
    if all("Rows" in one and ("ImagePositionPatient" in one or "NumberOfFrames" in one) for one in metadata):
        series_grid(metadata, f"series {uid}")


def _attributes_of(series: SeriesEntry) -> dict[str, Any]:
    info = {"SeriesInstanceUID": series.uid, "StudyInstanceUID": series.study, "Modality": series.modality}
    return {**info, "PatientID": series.patient}


def _without_pixels(image: Dataset) -> Dataset:
    """The standard attributes of an image, small enough to keep."""
    kept = Dataset()
    for element in image:
        if element.tag.group < 0x5000 and not element.tag.is_private and element.VR not in ("OB", "OW", "UN"):
            kept.add(element)
    return kept


def _drawn(mask: np.ndarray, names: Mapping[int, str]) -> list[str]:
    """Names of the values that a mask holds."""
    return [names.get(value, f"label {value}") for value in values_in(mask) - {0}]


def _info_of(entry: LabelEntry) -> dict[str, Any]:
    """What is kept of a label from the PACS; only another program's has a ``source``."""
    info = {
        "label_info": [{"name": name, "idx": value} for value, name in entry.names.items()],
        "ts": _seconds(entry.time),
        "object": entry.object,
        "series": entry.series,
    }
    if not entry.own:
        return {**info, "source": f"{entry.modality} in the PACS"}
    return {**info, "client_id": entry.creator} if entry.creator else info


def _seconds(moment: str) -> int:
    """Epoch seconds of "YYYYMMDDHHMMSS", taken for local time; 0 where it is none."""
    try:
        return int(time.mktime(time.strptime(moment[:14], "%Y%m%d%H%M%S")))
    except (ValueError, OverflowError):
        return 0
