"""What one studies folder keeps of its adaptation, under ``<studies>/.samadapt``: models, ledger, training state."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from samadapt.errors import InputError
from samadapt.files import write_json

FOLDER = ".samadapt"
_VERSION = re.compile(r"v(\d{4,})")


class Project:
    """Paths and small records; nothing is created before something is written.

    Args:
        studies: the studies folder (over DICOMweb: the host's cache folder of that store).
    """

    def __init__(self, studies: str | Path) -> None:
        self.root = Path(studies) / FOLDER
        self.models = self.root / "models"
        self.training = self.root / "training"
        self.cache = self.root / "cache"
        self.ledger = self.root / "ledger.json"
        self.history = self.models / "history.json"
        self._published = self.root / "published.json"
        self._status = self.training / "status.json"

    def published(self) -> Path | None:
        """The model file that answers annotators; None before the first training."""
        name = self.published_record().get("model")
        if not isinstance(name, str):
            return None
        path = self.models / Path(name).name
        return path if path.is_file() else None

    def publish(self, model: Path, event: Mapping[str, Any] | None = None) -> None:
        """Let ``model``, a file in the models folder, answer from now on. One atomic rename.

        Args:
            model: the file.
            event: what the history will say of it (``samadapt.versions``); kept here, so that no kill can lose it.

        Raises:
            InputError: there is no such model file.
        """
        if model.parent != self.models or not model.is_file():
            raise InputError("not a model of this project", where=model, remedy=f"Its models are in {self.models}.")
        write_json(self._published, {"model": model.name, "time": time.time(), "event": event})

    def published_record(self) -> dict[str, Any]:
        """What ``publish`` wrote last; ``{}`` before the first."""
        record = _read(self._published)
        return record if isinstance(record, dict) else {}

    def next_model(self) -> Path:
        """Path of the next version, ``v0001.safetensors`` and so on; no name is used twice, be its file deleted."""
        files = [path.stem for path in self.models.glob("v*.safetensors")] if self.models.is_dir() else []
        names = [*files, *self._names_in_history()]
        versions = [int(match.group(1)) for name in names if (match := _VERSION.fullmatch(name))]
        return self.models / f"v{max(versions, default=0) + 1:04d}.safetensors"

    def _names_in_history(self) -> list[str]:
        try:
            events = _read(self.history)
        except InputError:  # whoever reads the history refuses it; no training is lost for its sake
            return []
        return [str(event.get("version")) for event in events or () if isinstance(event, dict)]

    def status(self) -> dict[str, Any]:
        """The last training's progress, ``{}`` before the first. A training whose process is gone is "interrupted"."""
        status = _read(self._status)
        if not isinstance(status, dict):
            return {}
        if status.get("state") == "running" and not _alive(status):
            return {**status, "state": "interrupted", "message": "stopped before its end; the next training resumes it"}
        return status

    def write_status(self, **values: Any) -> None:
        """Replace the progress record; this process is noted as its writer."""
        process = psutil.Process()
        write_json(self._status, {"pid": process.pid, "pid_started": process.create_time(), **values})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON ({error})", where=path, remedy="Remove the file.") from error


def _alive(status: dict[str, Any]) -> bool:
    """Whether the very process that wrote the status still runs (process ids are used again)."""
    try:
        process = psutil.Process(int(status["pid"]))
        return process.create_time() == status["pid_started"] and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, ValueError, psutil.Error):
        return status.get("pid") == os.getpid()
