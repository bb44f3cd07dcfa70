"""Trains by itself after every so many new labels: never two at once, and it can be paused."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from samadapt.errors import SamAdaptError
from samadapt.files import write_json
from samadapt.project import Project

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
RESUMES = 3
"""A training that was cut short (the machine went down, memory ran out) is taken up again so many times in a row."""


class AutoTrain:
    """Looks every few seconds whether a training is due, and starts it.

    Due is one when ``every`` labels are newer than the last training's start, or when the last one was cut short by
    something else than somebody who stopped it.

    Args:
        every: new labels that it takes; None: trainings start by hand alone.
        project: whose trainings, and where the pause is kept.
        labels: the files of all final labels.
        running: whether a training runs or has just been asked for.
        start: starts one.
    """

    def __init__(
        self,
        every: int | None,
        project: Project,
        labels: Callable[[], Iterable[Path]],
        running: Callable[[], bool],
        start: Callable[[], Any],
    ) -> None:
        self._every = every
        self._project = project
        self._labels = labels
        self._running = running
        self._start = start
        self._file = project.root / "auto_train.json"
        self._lock = threading.Lock()
        self._last_start = 0.0
        self._resumes = 0

    def watch(self) -> None:
        """Begin to look; the thread ends with the process."""
        if self._every is not None:
            threading.Thread(target=self._watch, name="auto-train", daemon=True).start()

    def pause(self, paused: bool) -> None:
        """Start nothing until ``pause(False)``, also after a restart. A training that runs goes on."""
        self._keep(paused=paused)

    def stopped_by_hand(self) -> None:
        """Somebody stopped the training; it is not taken up again before there are enough new labels."""
        self._keep(stopped=time.time())

    def state(self) -> dict[str, Any]:
        """For ``GET /info/``: new labels that it takes (None: never by itself), those that there are, and the pause."""
        return {"every": self._every, "new_labels": self.new_labels(), "paused": bool(self._kept().get("paused"))}

    def new_labels(self) -> int:
        """Labels that no training has seen."""
        since = max(float(self._project.status().get("started", 0.0)), self._last_start)
        seen = self._kept().get("seen", {})
        return sum(when > since and seen.get(name) != when for name, when in self._times().items())

    def _times(self) -> dict[str, float]:
        return {str(path): path.stat().st_mtime for path in self._labels() if path.is_file()}

    def look(self) -> bool:
        """Start a training if one is due; whether it did."""
        with self._lock:
            if self._every is None or self._kept().get("paused") or self._running():
                return False
            if self.new_labels() >= self._every:
                self._resumes = 0
            elif self._cut_short() and self._resumes < RESUMES:
                self._resumes += 1
            else:
                return False
            self._last_start = time.time()
            # A file that a wrong clock has dated later than now would count as new for ever.
            self._keep(seen={name: when for name, when in self._times().items() if when > self._last_start})
            self._start()
            return True

    def _cut_short(self) -> bool:
        status = self._project.status()
        by_hand = float(self._kept().get("stopped", 0.0))
        return status.get("state") == "interrupted" and float(status.get("started", 0.0)) > by_hand

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                if self.look():
                    logger.info("a training has been started by itself")
            except SamAdaptError as error:
                logger.warning("no training is started by itself: %s", error)
            except Exception:
                logger.exception("no training is started by itself")

    def _kept(self) -> dict[str, Any]:
        try:
            value = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def _keep(self, **changes: Any) -> None:
        write_json(self._file, {**self._kept(), **changes})
