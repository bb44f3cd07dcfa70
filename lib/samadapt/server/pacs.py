"""What a PACS holds, over DICOMweb: image series, and the segmentations and contours that were drawn on them."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import requests
from dicomweb_client import DICOMwebClient
from monailabel.config import settings as host
from pydicom.dataset import Dataset
from requests.adapters import HTTPAdapter

from samadapt.data.dicom import NOT_IMAGES
from samadapt.data.dicom_label import LABEL_MODALITIES, creator_of, image_of, is_own, time_of
from samadapt.data.dicom_seg import segment_names
from samadapt.data.rtstruct import structure_names
from samadapt.errors import InputError, NotFoundError, UnavailableError
from samadapt.files import write_json

logger = logging.getLogger(__name__)

FRESH_SECONDS = 30.0
"""So long a list of series is taken for true without asking again."""

_NO_ANSWER_SECONDS = 60.0
_STORED_BEFORE = 0x0111
"""PS3.18 table I.2-2: there is such an instance already."""


@dataclass(frozen=True)
class SeriesEntry:
    """One series as QIDO-RS lists it.

    Attributes:
        shared: whether another study or another patient has a series of this UID, so that it does not tell them apart.
    """

    uid: str
    study: str
    modality: str
    patient: str
    date: str
    images: int
    shared: bool = False


@dataclass(frozen=True)
class LabelEntry:
    """One SEG or RTSTRUCT object.

    Attributes:
        object: SOPInstanceUID.
        series: SeriesInstanceUID.
        study: StudyInstanceUID.
        modality: "SEG" or "RTSTRUCT".
        image: SeriesInstanceUID of the images it was drawn on; "" where it does not say.
        time: when it was drawn, "YYYYMMDDHHMMSS" in the time of its maker; "" where it does not say.
        names: value -> name.
        own: whether samadapt has written it, so that it holds a label that a person submitted.
        creator: who drew it; "" where it does not say.
        refused: why it cannot be a label; None as long as nothing speaks against it.
    """

    object: str
    series: str
    study: str
    modality: str
    image: str
    time: str
    names: dict[int, str]
    own: bool
    creator: str
    refused: str | None = None


@contextmanager
def answering(where: str) -> Iterator[None]:
    """Turn what goes wrong between us and the PACS into an error that says so."""
    try:
        yield
    except requests.RequestException as error:
        raise UnavailableError(
            f"the PACS does not answer as it should ({type(error).__name__})",
            where=where,
            remedy="Check that it runs and try again.",
        ) from error


class Pacs:
    """Asks the PACS, remembers for a moment what it said, and for good what its label objects say about themselves.

    Args:
        client: connected to it.
        wanted: QIDO-RS filters that a person has set for images; None: every image series, whatever its modality.
        folder: what is remembered of label objects.
    """

    def __init__(self, client: DICOMwebClient, wanted: Mapping[str, Any] | None, folder: Path) -> None:
        self._client = client
        self._wanted = wanted
        self._folder = folder
        self._lock = threading.Lock()
        self._listed: tuple[float, dict[str, SeriesEntry], dict[str, LabelEntry]] | None = None
        client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=100)  # else 30 s until it is away
        for scheme in ("http://", "https://"):
            client._session.mount(scheme, _Impatient())

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self._client.base_url)

    def forget(self) -> None:
        """Ask anew the next time."""
        self._listed = None

    def series(self) -> dict[str, SeriesEntry]:
        """Image series by SeriesInstanceUID, in the order of the PACS."""
        return self._lists()[0]

    def labels(self) -> dict[str, LabelEntry]:
        """Label objects of these series by SOPInstanceUID, the oldest first."""
        return self._lists()[1]

    def find(self, uid: str) -> SeriesEntry:
        """One series; one that the list does not hold (or hold yet) is asked for by name.

        Raises:
            NotFoundError: the PACS has no such series.
            InputError: it has several.
        """
        found = self.series().get(uid) or _by_uid(self._search({"SeriesInstanceUID": uid})).get(uid)
        if found is None or found.modality in NOT_IMAGES:
            raise NotFoundError(
                f"the PACS has no image series {uid}", where="image", remedy="Reload the study list in the viewer."
            )
        if found.shared:
            raise _ambiguous(uid)
        return found

    def check_unshared(self, uid: str) -> None:
        """Refuse a series whose UID another one had, too, when the PACS was asked last.

        Raises:
            InputError: it had.
        """
        listed = self._listed
        known = listed[1].get(uid) if listed else None
        if known is not None and known.shared:
            raise _ambiguous(uid)

    def metadata(self, series: SeriesEntry) -> list[Dataset]:
        """Attributes of every image of a series, as far as the PACS gives them without the pixels."""
        with answering(self.url):
            found = self._client.retrieve_series_metadata(series.study, series.uid)
        return [Dataset.from_json(one, lambda *_: None) for one in found]  # pixels stay where they are

    def fetch(self, series: SeriesEntry) -> Iterator[Dataset]:
        """The images of a series as they come, in any order: one request, which PACSs answer many times faster."""
        with answering(self.url):
            yield from self._client.iter_series(series.study, series.uid)

    def fetch_label(self, entry: LabelEntry) -> Dataset:
        """A label object with all it holds."""
        with answering(self.url):
            return self._client.retrieve_instance(entry.study, entry.series, entry.object)

    def store(self, dataset: Dataset) -> None:
        """Store one object.

        Raises:
            UnavailableError: it was not stored, because the PACS is away or refuses it.
        """
        try:
            with answering(self.url):
                answer = self._client.store_instances([dataset])
        except UnavailableError as error:
            if (status := _client_error(error)) is not None:
                raise _refused(self.url, f"HTTP status {status}") from error
            raise
        failed = [item.get("FailureReason") for item in answer.get("FailedSOPSequence") or []]
        if failed and failed != [_STORED_BEFORE]:
            raise _refused(self.url, f"reason {failed[0]}")
        self.forget()

    def refuse(self, entry: LabelEntry, why: str) -> None:
        """Remember that a label object cannot be used."""
        self._remember(LabelEntry(**{**asdict(entry), "refused": why}))
        self.forget()

    # ----

    def _lists(self) -> tuple[dict[str, SeriesEntry], dict[str, LabelEntry]]:
        with self._lock:
            listed = self._listed
            if listed is None or time.monotonic() - listed[0] > FRESH_SECONDS:
                listed = self._listed = (time.monotonic(), *self._ask())
            return listed[1], listed[2]

    def _ask(self) -> tuple[dict[str, SeriesEntry], dict[str, LabelEntry]]:
        everything = self._search({}) if self._wanted is None else self._search(self._wanted)
        images = _by_uid([entry for entry in everything if entry.modality not in NOT_IMAGES])
        drawn = [entry for modality in LABEL_MODALITIES for entry in self._search({"Modality": modality})]
        labels = [label for entry in drawn if entry.modality in LABEL_MODALITIES for label in self._labels_of(entry)]
        ordered = sorted(labels, key=lambda label: (label.time, label.object))
        return images, {label.object: label for label in ordered if label.image in images}

    def _search(self, filters: Mapping[str, Any]) -> list[SeriesEntry]:
        with answering(self.url):
            found = self._client.search_for_series(search_filters=dict(filters))
        return [_entry(Dataset.from_json(one)) for one in found]

    def _labels_of(self, series: SeriesEntry) -> list[LabelEntry]:
        """The label objects of a series. What is known of them from before is not asked for again."""
        with answering(self.url):
            found = self._client.search_for_instances(series.study, series.uid)
        uids = [str(Dataset.from_json(one).SOPInstanceUID) for one in found]
        known = [self._recall(uid) for uid in uids]
        if all(known):
            return [entry for entry in known if entry]
        entries = [_label(series, one) for one in self.metadata(series)]
        for entry in entries:
            self._remember(entry)
        return entries

    def _recall(self, uid: str) -> LabelEntry | None:
        try:
            value = json.loads((self._folder / f"{uid}.json").read_text(encoding="utf-8"))
            return LabelEntry(**{**value, "names": {int(number): name for number, name in value["names"].items()}})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _remember(self, entry: LabelEntry) -> None:
        write_json(self._folder / f"{entry.object}.json", asdict(entry))


def _client_error(error: Exception) -> int | None:
    """The status 4xx that an answer of the PACS had; None where it had none."""
    response = getattr(error.__cause__, "response", None)
    return response.status_code if response is not None and 400 <= response.status_code < 500 else None


def _refused(where: str, why: str) -> UnavailableError:
    return UnavailableError(
        f"the PACS refused the segmentation ({why})",
        where=where,
        remedy="Its own log says why: its rights to write, its disk, or a rule of its own.",
    )


def wanted_by_person() -> dict[str, Any] | None:
    """The host's search filter if somebody has set it; its default (CT alone) is nobody's wish."""
    name = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"
    return dict(getattr(host, name)) if name in host.model_fields_set else None


def check_uid(text: str, where: str) -> None:
    """Refuse what cannot be a UID, before it becomes part of a path or an address."""
    parts = text.split(".")
    if len(text) > 64 or len(parts) < 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"{text!r} is no DICOM series UID", where=where, remedy="Give a SeriesInstanceUID.")


class _Impatient(HTTPAdapter):
    """Neither client nor host set a time limit: a PACS that hangs would hang every thread that asks it."""

    def send(self, request: Any, *args: Any, **options: Any) -> Any:
        return super().send(request, *args, **{**options, "timeout": options.get("timeout") or _NO_ANSWER_SECONDS})


def _by_uid(entries: Iterable[SeriesEntry]) -> dict[str, SeriesEntry]:
    found: dict[str, SeriesEntry] = {}
    for entry in entries:
        first = found.setdefault(entry.uid, entry)
        if (first.study, first.patient) != (entry.study, entry.patient):
            found[entry.uid] = replace(first, shared=True)
    return found


def _ambiguous(uid: str) -> InputError:
    return InputError(
        "several studies or patients in the PACS have a series of this UID, so that a label could go to the wrong one",
        where=f"series {uid}",
        remedy="Let the PACS's administrator give one of them another UID.",
    )


def _entry(found: Dataset) -> SeriesEntry:
    return SeriesEntry(
        uid=str(found.get("SeriesInstanceUID", "")),
        study=str(found.get("StudyInstanceUID", "")),
        modality=str(found.get("Modality") or "unknown").upper(),
        patient=str(found.get("PatientID") or "").strip(),
        date=str(found.get("StudyDate") or ""),
        images=int(found.get("NumberOfSeriesRelatedInstances") or 0),
    )


def _label(series: SeriesEntry, found: Dataset) -> LabelEntry:
    read = segment_names if series.modality == "SEG" else structure_names
    return LabelEntry(
        object=str(found.SOPInstanceUID),
        series=series.uid,
        study=series.study,
        modality=series.modality,
        image=image_of(found),
        time=time_of(found),
        names=read(found),
        own=is_own(found),
        creator=creator_of(found),
    )
