"""Encodes and examines the images that annotators will see next, while nobody waits for an answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from samadapt.data.volume import Volume, read_volume
from samadapt.errors import SamAdaptError, UnavailableError
from samadapt.inference.ahead import embed_volume
from samadapt.server.models import Models

logger = logging.getLogger(__name__)

QUIET_SECONDS = 2.0
"""So long after the last request annotators count as gone for the moment."""

LOOK_SECONDS = 1.0
REMEMBERED = 8
"""Images that were on somebody's screen lately."""

_IDLE: dict[str, Any] = {"image": None, "slices_done": 0, "slices": 0}


class AheadOfNeed:
    """A background thread that fills the cache, the next samples first, and gives way to everybody.

    Args:
        models: who answers, and the cache.
        images: ids of the images to come, the most needed first.
        path_of: image id -> file.
        training: whether a training runs; it needs the whole machine.
        look: called with each image, once it is encoded, and with what waits until the machine is free.
        failed: called with each image that cannot be read, and why.
    """

    def __init__(
        self,
        models: Models,
        images: Callable[[], list[str]],
        path_of: Callable[[str], str],
        training: Callable[[], bool],
        look: Callable[[str, Callable[[], None]], None],
        failed: Callable[[str, str], None],
    ) -> None:
        self._models = models
        self._images = images
        self._path_of = path_of
        self._training = training
        self._look = look
        self._failed = failed
        self._lock = threading.Lock()
        self._waiting = 0
        self._last_request = time.monotonic()
        self._asked: list[str] = []
        self._done: set[tuple[str, str]] = set()
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
        self._done = {(other, version) for other, version in self._done if other != image}

    def progress(self) -> dict[str, Any]:
        """For ``GET /info/``: images done and in all, and the one at hand (None: none) with its slices."""
        images = self._images()
        version = self._models.version()
        done = sum((image, version) in self._done for image in images)
        return {"images_done": done, "images": len(images), **self._record}

    def _run(self) -> None:
        while True:
            image = self._next()
            if image is None:
                time.sleep(LOOK_SECONDS)
                continue
            try:
                self._embed(image, self._read(image))
                self._look(image, self._wait)
            except (SamAdaptError, OSError) as error:
                logger.warning("%s is not encoded ahead: %s", image, error)
            except Exception:
                logger.exception("%s is not encoded ahead", image)
            finally:
                self._record = _IDLE
            self._done.add((image, self._models.version()))

    def _next(self) -> str | None:
        if not self._quiet() or self._models.cache.full():  # else it would push out what it has just made
            return None
        version = self._models.version()
        with self._lock:
            asked = list(self._asked)
        return next((image for image in [*asked, *self._images()] if (image, version) not in self._done), None)

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
