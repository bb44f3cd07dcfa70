"""DICOM objects that the PACS has yet to get: kept as files until it has them, and sent again by themselves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from samadapt.data.dicom_label import creator_of, image_of, time_of
from samadapt.errors import SamAdaptError
from samadapt.files import atomic_path

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 300.0
"""Between two tries; the pause doubles from one to the next."""

NOT_TRIED = "not sent yet"


@dataclass(frozen=True)
class Waiting:
    """One object that the PACS does not have.

    Attributes:
        object: SOPInstanceUID.
        image: SeriesInstanceUID of the images it was drawn on.
        author: who drew it; "" where it does not say.
        time: when it was drawn, "YYYYMMDDHHMMSS".
        reason: why it is not there yet.
    """

    object: str
    image: str
    author: str
    time: str
    reason: str = NOT_TRIED


def outbox_folder(store: Path) -> Path:
    """Where a folder with labels of a PACS's images keeps the SEGs that the PACS has yet to get."""
    return store / ".dicom" / "outbox"


def waiting_in(folder: Path) -> list[Waiting]:
    """What an outbox's folder holds, the oldest first. An unreadable file is named by its name alone."""
    return sorted((_described(path) for path in folder.glob("[!.]*.dcm")), key=lambda one: (one.time, one.object))


class Outbox:
    """Sends each object once it is told to, and goes on trying where that fails. Every method is for any thread.

    An object is put in before its label is saved, so that no crash leaves a label that the PACS never gets; as long as
    whoever has put it in has neither sent nor withdrawn it, nobody else sends it.

    Args:
        folder: where the objects wait; made when it is needed.
        send: stores one object in the PACS, or raises a ``SamAdaptError``. To send the same twice must do no harm.
    """

    def __init__(self, folder: Path, send: Callable[[Dataset], None]) -> None:
        self._folder = folder
        self._send = send
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._thread: threading.Thread | None = None

    def put(self, dataset: Dataset) -> str:
        """Keep an object for its label's save, to be followed by ``send`` or ``withdraw``; returns its UID."""
        uid = str(dataset.SOPInstanceUID)
        with self._lock:
            self._held.add(uid)
        with atomic_path(self._path(uid)) as temporary:
            dataset.save_as(temporary, write_like_original=False)
        return uid

    def send(self, uid: str) -> None:
        """Send what was put in; where that fails, it is tried again in the background.

        Raises:
            SamAdaptError: why it failed this time.
        """
        try:
            self._deliver(uid)
        finally:
            self._let_go(uid)
            self.begin()

    def withdraw(self, uid: str) -> None:
        """Take back what was put in: there is no label to it."""
        self._path(uid).unlink(missing_ok=True)
        self._let_go(uid)

    def keep_only(self, known: Callable[[Waiting], Collection[str]]) -> None:
        """Remove objects that a crash left without a label: those whose UID ``known`` does not return for them."""
        for one in waiting_in(self._folder):
            if one.object not in known(one):
                logger.warning("the SEG %s belongs to no label that was saved, and is not sent", one.object)
                self._path(one.object).unlink(missing_ok=True)

    def waiting(self) -> list[Waiting]:
        """What the PACS does not have yet, the oldest first."""
        found = waiting_in(self._folder)
        return [Waiting(**{**vars(one), "reason": self._reasons.get(one.object, NOT_TRIED)}) for one in found]

    def begin(self) -> None:
        """Send in the background whatever waits, until nothing does."""
        with self._lock:
            if self._thread is None and any(self._folder.glob("[!.]*.dcm")):
                self._thread = threading.Thread(target=self._go_on, name="outbox", daemon=True)
                self._thread.start()

    # ----

    def _go_on(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            for one in waiting_in(self._folder):
                self._try(one.object)
            with self._lock:
                if not any(self._folder.glob("[!.]*.dcm")):
                    self._thread = None
                    return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _try(self, uid: str) -> None:
        with self._lock:
            if uid in self._held:
                return
            self._held.add(uid)
        try:
            self._deliver(uid)
            logger.info("the label %s is in the PACS now", uid)
        except SamAdaptError as error:
            logger.warning("the label %s is still not in the PACS: %s", uid, error)
        except Exception as error:  # whatever is wrong with this one must not end the thread that sends the others
            logger.exception("the label %s could not be sent", uid)
            self._reasons[uid] = f"{type(error).__name__}: {error}"
        finally:
            self._let_go(uid)

    def _deliver(self, uid: str) -> None:
        path = self._path(uid)
        if not path.is_file():  # sent meanwhile
            return
        try:
            self._send(pydicom.dcmread(path))
        except SamAdaptError as error:
            self._reasons[uid] = str(error)
            raise
        path.unlink(missing_ok=True)
        self._reasons.pop(uid, None)

    def _let_go(self, uid: str) -> None:
        with self._lock:
            self._held.discard(uid)

    def _path(self, uid: str) -> Path:
        return self._folder / f"{uid}.dcm"


def _described(path: Path) -> Waiting:
    try:
        read = pydicom.dcmread(path, stop_before_pixels=True)
        return Waiting(path.stem, image_of(read), creator_of(read), time_of(read))
    # pydicom raises almost anything on a damaged file, which is shown as waiting all the same.
    except Exception as error:
        return Waiting(path.stem, "", "", "", f"cannot be read ({type(error).__name__}: {error})")
