"""Encodes and examines the images that annotators will see next, while nobody waits for an answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from samadapt.data.volume import Volume, read_volume
from samadapt.encoding import drop_superseded
from samadapt.errors import SamAdaptError, UnavailableError
from samadapt.inference.ahead import embed_volume
from samadapt.server.models import Models

logger = logging.getLogger(__name__)

QUIET_SECONDS = 2.0
"""So long after the last request annotators count as gone for the moment."""

LOOK_SECONDS = 1.0

COME_AGAIN_SECONDS = 300.0
"""So long what could not be had (a PACS is away) is left alone."""

REMEMBERED = 8
"""Images that were on somebody's screen lately."""

_IDLE: dict[str, Any] = {"image": None, "slices_done": 0, "slices": 0}


class AheadOfNeed:
    """A background thread that fills the cache, the next samples first, and gives way to everybody.

    Args:
        models: who answers, and the cache.
        images: ids of the images to come, the most needed first.
        path_of: image id -> file; may take its time.
        training: whether a training runs; it needs the whole machine.
        wanted: for what images are looked at; once that changes, all are looked at anew.
        look: called with each image, once it is encoded, and with what waits until the machine is free.
        failed: called with each image that cannot be read, and why.
    """

    def __init__(
        self,
        models: Models,
        images: Callable[[], list[str]],
        path_of: Callable[[str], str],
        training: Callable[[], bool],
        wanted: Callable[[], Hashable],
        look: Callable[[str, Callable[[], None]], None],
        failed: Callable[[str, str], None],
    ) -> None:
        self._models = models
        self._images = images
        self._path_of = path_of
        self._training = training
        self._wanted = wanted
        self._look = look
        self._failed = failed
        self._lock = threading.Lock()
        self._waiting = 0
        self._last_request = time.monotonic()
        self._asked: list[str] = []
        self._done: set[tuple[str, Hashable]] = set()
        self._changed: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._room_made_for: str | None = None
        self._record = _IDLE

    def start(self) -> None:
        """Begin; the thread ends with the process."""
        threading.Thread(target=self._run, name="ahead-of-need", daemon=True).start()

    @contextlib.contextmanager
    def giving_way(self) -> Iterator[None]:
        """While inside, and shortly afterwards, nothing new is encoded."""
        with self._lock:
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                self._last_request = time.monotonic()

    def first(self, image: str) -> None:
        """This image is on somebody's screen now."""
        with self._lock:
            self._asked = [image, *(other for other in self._asked if other != image)][:REMEMBERED]

    def again(self, image: str) -> None:
        """Something about this image has changed."""
        with self._lock:
            self._changed.add(image)
            self._done = {(other, wanted) for other, wanted in self._done if other != image}

    def progress(self) -> dict[str, Any]:
        """For ``GET /info/``: images done and in all, and the one at hand (None: none) with its slices.

        ``cache_full``: images are examined, but only those on somebody's screen are encoded ahead.
        """
        images = self._images()
        wanted = self._wanted()
        with self._lock:
            done = sum((image, wanted) in self._done for image in images)
        full = self._models.cache.full()
        return {"images_done": done, "images": len(images), **self._record, "cache_full": full}

    def _run(self) -> None:
        while True:
            wanted, image = self._todo()
            if image is None:
                time.sleep(LOOK_SECONDS)
                continue
            with self._lock:
                self._changed.discard(image)
            try:
                self._work_on(image)
            except UnavailableError as error:
                logger.warning("%s is not encoded ahead now, but later: %s", image, error)
                self._not_before[image] = time.monotonic() + COME_AGAIN_SECONDS
                continue
            except (SamAdaptError, OSError) as error:
                logger.warning("%s is not encoded ahead: %s", image, error)
            except Exception:
                logger.exception("%s is not encoded ahead", image)
            finally:
                self._record = _IDLE
            with self._lock:
                if image not in self._changed:
                    self._done.add((image, wanted))

    def _todo(self) -> tuple[Hashable, str | None]:
        """What is wanted now (what changes later asks for another look), and of which image next."""
        try:
            wanted = self._wanted()
            return wanted, self._next(wanted)
        except Exception:  # whatever it is, it must not end the thread
            logger.exception("which images come next is not known now")
            time.sleep(COME_AGAIN_SECONDS)
            return None, None

    def _next(self, wanted: Hashable) -> str | None:
        if not self._quiet():
            return None
        images, now = self._images(), time.monotonic()
        with self._lock:
            waiting = (image for image in [*self._asked, *images] if (image, wanted) not in self._done)
            return next((image for image in waiting if now >= self._not_before.get(image, now)), None)

    def _work_on(self, image: str) -> None:
        volume = self._read(image)
        if self._room_for(image):
            self._embed(image, volume)
        self._look(image, self._wait)

    def _room_for(self, image: str) -> bool:
        """Whether to encode an image: in a full cache it would push out what was made for those that come sooner."""
        if self._models.cache.full() and self._models.version() != self._room_made_for:
            self._room_made_for = self._models.version()
            drop_superseded(self._models.cache, [self._models.current().model, self._models.prompted().model])
        with self._lock:
            return image in self._asked or not self._models.cache.full()

    def _read(self, image: str) -> Volume:
        """The image; not by way of ``Models``, whose memory is the annotators'. Where a model or a label is at fault
        instead, the image may be proposed to annotators all the same."""
        try:
            return read_volume(self._path_of(image))
        except UnavailableError:
            raise
        except (SamAdaptError, OSError) as error:
            self._failed(image, str(error))
            raise

    def _embed(self, image: str, volume: Volume) -> None:
        def show(done: int, total: int) -> None:
            self._record = {"image": image, "slices_done": done, "slices": total}

        for served in {served.version: served for served in (self._models.current(), self._models.prompted())}.values():
            embed_volume(served.model, volume, self._models.cache, show, self._wait)

    def _wait(self) -> None:
        while not self._quiet():
            time.sleep(LOOK_SECONDS / 4)

    def _quiet(self) -> bool:
        with self._lock:
            recently = time.monotonic() - self._last_request < QUIET_SECONDS
            if self._waiting or recently:
                return False
        return not self._training()
