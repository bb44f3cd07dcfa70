"""Which series of a PACS to fetch before anybody opens them: strategies and worklist know only what was looked at."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Collection

from samadapt.server.dicom_datastore import SafeDicomDatastore

AT_MOST = 50
"""Series that are here and that nobody has labelled or been given. As one of them is, the next is fetched."""

LEAST_FREE = 5 * 2**30
"""Bytes that stay free on the disk."""

ASK_SECONDS = 120.0
"""So long an answer holds: an idle server must not ask the PACS for its lists all the time."""


class SeriesInAdvance:
    """Names the series of a PACS for ``AheadOfNeed``: those that are here, and some more to fetch.

    What nobody has opened comes in an order that is arbitrary, so that it says something about the rest, and always the
    same, so that a server that starts anew goes on with what it has.

    Args:
        store: the PACS and what is here of it.
        upcoming: ids of all series, the most needed first.
        refused: ids of those that cannot be read.
    """

    def __init__(
        self, store: SafeDicomDatastore, upcoming: Callable[[], list[str]], refused: Callable[[], Collection[str]]
    ) -> None:
        self._store = store
        self._upcoming = upcoming
        self._refused = refused
        self._asked: float | None = None
        self._images: list[str] = []

    def images(self) -> list[str]:
        """Series to encode and examine, one after the other; the last ones have to be fetched first."""
        if self._asked is None or time.monotonic() - self._asked > ASK_SECONDS:
            self._asked = time.monotonic()
            self._images = self._choose()
        return self._images

    def image_path(self, image: str) -> str:
        """File of a series, which is fetched first if need be.

        Raises:
            InputError: it makes no volume, as its attributes or an earlier attempt tell.
            UnavailableError: the PACS does not answer, or is not done yet.
        """
        self._store.make_ready(image)
        return self._store.image_path(image)

    def _choose(self) -> list[str]:
        upcoming, unlabelled = self._upcoming(), set(self._store.get_unlabeled_images())
        here = [image for image in upcoming if self._store.local_image(image) is not None]
        unopened = sum(image in unlabelled and not self._store.last_proposed(image) for image in here)
        if shutil.disk_usage(self._store.folder).free < LEAST_FREE:
            return here
        others = unlabelled.difference(here, self._refused())
        return here + sorted(others, key=_shuffled)[: max(0, AT_MOST - unopened)]


def _shuffled(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest()
