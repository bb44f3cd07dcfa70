"""Trains by itself after every so many new labels: never two at once, and it can be paused."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from samadapt.data.volume import image_suffix
from samadapt.errors import SamAdaptError
from samadapt.files import known_sha256, write_json
from samadapt.model import read_info_if_readable
from samadapt.project import Project
from samadapt.versions import Versions

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
RESUMES = 3
"""A training that was cut short (the machine went down, memory ran out) is taken up again so many times in a row."""

RETRY_SECONDS = 60.0
"""After a training that failed, the next look that may start one is so much later; twice as much with every failure in
a row, and ``LONGEST_RETRY_SECONDS`` at most."""

LONGEST_RETRY_SECONDS = 3600.0


class AutoTrain:
    """Looks every few seconds whether a training is due, and starts it.

    Due is one when ``every`` labels are others than those that the last training to end well noted, or when the last
    one was cut short by something else than somebody who stopped it. Labels are told by their bytes, so that neither a
    wrong clock nor the moment of a submission matters.

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
        self._lock = threading.RLock()
        self._noted: tuple[list[str], dict[str, str]] = ([], {})
        self._tried: float | None = None
        self._resumes = 0
        self._failures = 0
        self._not_before = 0.0

    def watch(self) -> None:
        """Begin to look; the thread ends with the process."""
        if self._every is not None:
            threading.Thread(target=self._watch, name="auto-train", daemon=True).start()

    def pause(self, paused: bool) -> None:
        """Start nothing until ``pause(False)``, also after a restart. A training that runs goes on."""
        self._keep(paused=paused)

    def stopped_by_hand(self) -> None:
        """Somebody stopped the training; it is not taken up again before there are enough new labels."""
        now = time.time()
        self._keep(stopped=now, tried=now, seen=self._hashes())

    def state(self) -> dict[str, Any]:
        """For ``GET /info/``: new labels that it takes (None: never by itself), those that there are, and the pause."""
        return {"every": self._every, "new_labels": self.new_labels(), "paused": bool(self._kept().get("paused"))}

    def new_labels(self) -> int:
        """Labels that no training which ended well has seen."""
        noted, seen = self._last_noted(), self._seen()
        return sum(digest not in (noted.get(case), seen.get(case)) for case, digest in self._hashes().items())

    def look(self) -> bool:
        """Start a training if one is due; whether it did."""
        with self._lock:
            if self._every is None or self._kept().get("paused") or self._running():
                return False
            self._settle()
            if time.time() < self._not_before:
                return False
            if self.new_labels() >= self._every:
                self._resumes = 0
            elif self._cut_short() and self._resumes < RESUMES:
                self._resumes += 1
            else:
                return False
            self._tried = time.time()
            self._keep(tried=self._tried, seen=self._hashes())
            self._start()
            return True

    def _settle(self) -> None:
        """Find out what became of the training that was started last; after one that failed, wait."""
        if self._tried is None:
            return
        failed = not self._began_since(self._tried) or self._project.status().get("state") == "failed"
        self._tried = None
        self._failures = self._failures + 1 if failed else 0
        if failed:
            wait = min(RETRY_SECONDS * 2 ** (self._failures - 1), LONGEST_RETRY_SECONDS)
            self._not_before = time.time() + wait

    def _began_since(self, when: float) -> bool:
        return float(self._project.status().get("started", 0.0)) >= when

    def _seen(self) -> dict[str, str]:
        """Case -> SHA-256 of the labels that were there for the last training that was started or stopped here; none
        where it failed. (A label without an image is in no training's record, and must not count for ever.)"""
        kept = self._kept()
        tried, seen = float(kept.get("tried", 0.0)), kept.get("seen")
        stopped = float(kept.get("stopped", -1.0)) >= tried
        went_on = self._began_since(tried) and self._project.status().get("state") != "failed"
        return seen if isinstance(seen, dict) and (stopped or went_on) else {}

    def _last_noted(self) -> dict[str, str]:
        """Case -> SHA-256 of the labels that the last training to end noted with its model."""
        names = Versions(self._project).names()
        if names != self._noted[0]:
            self._noted = names, self._read_noted(names)
        return self._noted[1]

    def _read_noted(self, names: list[str]) -> dict[str, str]:
        for name in reversed(names):
            info = read_info_if_readable(self._project.models / f"{name}.safetensors")
            if info is not None and not info.training.get("preview"):
                return dict(info.training.get("label_sha256") or {})
        return {}

    def _hashes(self) -> dict[str, str]:
        """Case -> SHA-256 of its final label; only files that have changed are read."""
        found = {}
        for path in self._labels():
            with suppress(FileNotFoundError):  # replaced by one of another file type
                found[path.name.removesuffix(image_suffix(path.name) or "")] = known_sha256(path)
        return found

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
        with self._lock:
            write_json(self._file, {**self._kept(), **changes})
