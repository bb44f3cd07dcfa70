"""Fetches series in the background and says how far it is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from samadapt.errors import InputError, NotFoundError, SamAdaptError, UnavailableError

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0
"""So long a request waits for a series before it is told to come again."""

REFUSED_SECONDS = 60.0
"""So long a series that was refused is not looked at again: its missing slices may have come meanwhile."""

_SERIES_AT_ONCE = 2

Fetch = Callable[[str, Callable[[int, int], None]], None]


@dataclass
class Progress:
    """How far the fetch of one series is.

    Attributes:
        state: "fetching", "ready", "refused" (cannot be used as it is) or "failed" (may be tried again).
        done: images that are here.
        total: of how many; 0 as long as that is unknown.
        error: why it is refused or failed.
    """

    state: str = "fetching"
    done: int = 0
    total: int = 0
    error: SamAdaptError | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    end: float = 0.0

    def may_be_tried_again(self) -> bool:
        """Whether a new fetch might end otherwise."""
        return self.state == "failed" or (self.state == "refused" and time.monotonic() - self.end > REFUSED_SECONDS)


class Fetching:
    """Starts each fetch once, however many ask for it.

    Args:
        fetch: called in a thread with a series UID and with what it is to tell its progress to.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._known: dict[str, Progress] = {}
        self._pool = ThreadPoolExecutor(_SERIES_AT_ONCE, "series")

    def progress(self, uid: str) -> Progress | None:
        """Of the last fetch; None where nobody has asked for the series."""
        return self._known.get(uid)

    def start(self, uid: str) -> Progress:
        """Fetch a series unless that has begun or is done; what failed is tried again."""
        with self._lock:
            known = self._known.get(uid)
            if known is None or known.may_be_tried_again():
                known = self._known[uid] = Progress()
                self._pool.submit(self._run, uid, known)
            return known

    def wait(self, uid: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Start a fetch and wait for its end.

        Raises:
            SamAdaptError: what the fetch failed with.
            UnavailableError: it is not over yet.
        """
        progress = self.start(uid)
        if not progress.ended.wait(seconds):
            raise UnavailableError(
                f"the series is being fetched, {progress.done} of {progress.total or '?'} images are here",
                where=uid,
                remedy="Ask again in a moment.",
            )
        if progress.error:
            raise progress.error

    def forget(self, uid: str) -> None:
        """Let the series be fetched again."""
        with self._lock:
            self._known.pop(uid, None)

    def _run(self, uid: str, progress: Progress) -> None:
        def tell(done: int, total: int) -> None:
            progress.done, progress.total = done, total

        try:
            self._fetch(uid, tell)
            progress.state = "ready"
        except SamAdaptError as error:
            final = isinstance(error, InputError) and not isinstance(error, NotFoundError)
            progress.state, progress.error = "refused" if final else "failed", error
        except Exception as error:  # a thread's error reaches nobody unless it is kept
            logger.exception("fetching the series %s failed", uid)
            progress.state = "failed"
            progress.error = UnavailableError(
                f"the series could not be fetched ({type(error).__name__}: {error})", where=uid, remedy="Try again."
            )
        finally:
            progress.end = time.monotonic()
            progress.ended.set()
