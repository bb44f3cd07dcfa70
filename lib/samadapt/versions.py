"""Every model that was trained on a studies folder: which one is in service, what became of the others, and the way
back.

What a model is stands in its own file (``ModelInfo.training``: its manifest). What happens to it later is a list of
events in ``models/history.json``, to which is only ever added. Which one is in service is ``published.json`` alone; it
carries its event with it, so that a kill between the two files loses nothing. No version is ever deleted.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from samadapt.config import AppConfig
from samadapt.errors import InputError, NotFoundError, SamAdaptError, StateError
from samadapt.evaluation.intervals import Estimate
from samadapt.evaluation.metrics import mean
from samadapt.files import write_json
from samadapt.model import AdaptedModel, ModelInfo, read_info
from samadapt.project import Project

NAME = re.compile(r"v\d{4,}")

PUBLISHED, REFUSED, PROMOTED, ROLLED_BACK = "published", "refused", "promoted", "rolled back"
"""Events. Trainings publish and refuse; people promote and roll back."""

UNFINISHED, UNKNOWN, DAMAGED = "unfinished", "unknown", "damaged"
"""Verdicts of models that no event tells of: the training was killed just before; made before there was a history; the
file cannot be read."""

LOCK_SECONDS = 10.0

Event = dict[str, Any]


@dataclass(frozen=True)
class Version:
    """One model file.

    Attributes:
        name: ``v0001`` and so on.
        file: where it is.
        in_service: whether it answers annotators now.
        verdict: ``PUBLISHED`` or ``REFUSED`` by its training, or one of ``UNFINISHED``, ``UNKNOWN``, ``DAMAGED``.
        reason: why, in one sentence; empty where nobody knows.
        events: what happened to it, oldest first.
        info: its header; None for a damaged file.
    """

    name: str
    file: Path
    in_service: bool
    verdict: str
    reason: str
    events: list[Event]
    info: ModelInfo | None

    @property
    def manifest(self) -> dict[str, Any]:
        """What its training noted; see ``ModelInfo.training``."""
        return self.info.training if self.info else {}

    @property
    def dice(self) -> tuple[Estimate, str] | None:
        """Mean Dice over cases, and ``"held-out"`` or ``"cross-validated"``; None where nothing was measured."""
        manifest = self.manifest
        if interval := manifest.get("held_out_interval"):
            return _estimate(interval["mean"]), "held-out"
        if found := [score for score in (manifest.get("held_out_dice") or {}).values() if score is not None]:
            return Estimate(mean(found), float("nan"), float("nan"), 1), "held-out"  # made before there were intervals
        crossed = manifest.get("cross_validation") or {}
        return (_estimate(crossed["interval"]), "cross-validated") if "interval" in crossed else None

    def summary(self) -> dict[str, Any]:
        """For a list, as programs read it."""
        manifest, dice = self.manifest, self.dice
        return {
            "version": self.name,
            "in_service": self.in_service,
            "verdict": self.verdict,
            "reason": self.reason,
            "finished": manifest.get("finished"),
            "recipe": self.info.recipe.name if self.info else None,
            "cases": len(manifest.get("cases", [])),
            "held_out": len(manifest.get("held_out", [])),
            "dice": dice[0] if dice else None,
            "measured": dice[1] if dice else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything: ``summary``, the header with the manifest, and the events."""
        header = json.loads(self.info.to_json()) if self.info else None
        return {**self.summary(), "file": self.file, "model": header, "events": self.events}


class Versions:
    """The versions of one project. Safe to use from several processes.

    Args:
        project: whose.
    """

    def __init__(self, project: Project) -> None:
        self._project = project

    def events(self) -> list[Event]:
        """All events, oldest first.

        Raises:
            InputError: the history cannot be read.
        """
        events = _read(self._project.history)
        last = self._last_published()
        return events if last is None or last in events else [*events, last]

    def names(self) -> list[str]:
        """Of every version, oldest first. Cheap."""
        found = [file.stem for file in self._project.models.glob("v*.safetensors") if NAME.fullmatch(file.stem)]
        return sorted(found, key=lambda name: int(name[1:]))

    def all(self) -> list[Version]:
        """Every version, oldest first."""
        events, current = self.events(), self._project.published()
        return [_version(self._file(name), events, current) for name in self.names()]

    def manifests(self) -> Iterator[dict[str, Any]]:
        """What the trainings of all versions noted, oldest first; damaged files are left out."""
        for name in self.names():
            with suppress(SamAdaptError):
                yield read_info(self._file(name)).training

    def get(self, name: str) -> Version:
        """One version.

        Raises:
            InputError: ``name`` is no version's name.
            NotFoundError: there is no such version.
        """
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} is no version", where="version", remedy="Versions are called v0001, v0002, ...")
        file = self._file(name)
        if not file.is_file():
            raise NotFoundError(f"there is no version {name}", where="version", remedy=self._known())
        return _version(file, self.events(), self._project.published())

    def before_present(self) -> list[Path]:
        """Files of the versions that were in service before the present one, none of them rolled back; latest last."""
        return self._others(_served(self.events()))

    def since_promoted(self) -> list[Path]:
        """``before_present``, but none from before a person last promoted one: who did has weighed the loss."""
        served = _served(self.events())
        chosen = [place for place, event in enumerate(served) if event["event"] == PROMOTED]
        return self._others(served[max(chosen, default=0) :])

    def _others(self, served: list[Event]) -> list[Path]:
        """The files of these but the present one, each once."""
        names = dict.fromkeys(event["version"] for event in reversed(served))
        current = self._project.published()
        files = [self._file(name) for name in reversed(names)]
        return [file for file in files if file.is_file() and file != current]

    def publish(self, model: Path, reason: str, training: str, instead_of: str | None) -> bool:
        """Put the result of a training in service.

        Args:
            model: its file.
            reason: why.
            training: name of the training, the same for its preview and for its result.
            instead_of: the version in service when this was decided; None: there was none.

        Returns:
            False where another version has been put in service since; nothing is changed then.
        """
        with self._locked():
            current = self._project.published()
            if (current.stem if current else None) != instead_of:
                return False
            self._serve(PUBLISHED, model, "training", reason, training)
            return True

    def refuse(self, model: Path, reason: str, training: str) -> None:
        """Note that a training's result stays out of service."""
        with self._locked():
            self._append(self._event(REFUSED, model, "training", reason, training))

    def promote(self, name: str, by: str, config: AppConfig) -> Version:
        """Put a version in service because a person wants it.

        Args:
            name: which.
            by: who.
            config: where the base weights may be.

        Raises:
            InputError: see ``get``; or the file is damaged.
            StateError: it is in service already, or its base weights are not here.
        """
        version = self.get(name)
        if version.in_service:
            raise self._serves_already(name)
        return self._put_in_service(PROMOTED, version, by, config)

    def previous(self) -> Version:
        """What ``rollback`` puts in service.

        Raises:
            StateError: no other version has been in service before, or none of their files is left undamaged.
        """
        before = self._before()
        for version in before:
            if version.verdict != DAMAGED:
                return version
        raise self._no_way_back(before)

    def rollback(self, by: str, config: AppConfig) -> Version:
        """Put the version in service again that was so before the present one; once more goes back further.

        The preview that a training publishes before its result is no version to go back to, and neither is a damaged
        one.

        Args:
            by: who.
            config: where the base weights may be.

        Raises:
            StateError: see ``previous`` and ``promote``.
        """
        damaged: list[Version] = []
        for version in self._before():
            try:
                return self._put_in_service(ROLLED_BACK, version, by, config, damaged)
            except InputError:
                damaged.append(version)
        raise self._no_way_back(damaged)

    def _before(self) -> list[Version]:
        """``before_present``, latest first."""
        return [self.get(file.stem) for file in reversed(self.before_present())]

    def _no_way_back(self, damaged: Sequence[Version]) -> StateError:
        what = "no version was in service before this one"
        if damaged:
            what = f"what was in service before this one is damaged: {_listed(damaged)}"
        return StateError(what, where="rollback", remedy=self._known())

    def _put_in_service(
        self, kind: str, version: Version, by: str, config: AppConfig, damaged: Sequence[Version] = ()
    ) -> Version:
        _require_loadable(version, config)
        with self._locked():
            current = self._project.published()
            if current == version.file:
                raise self._serves_already(version.name)  # somebody else was quicker
            reason = f"instead of {current.stem}" if current else "nothing was in service"
            passed = f"; passed over, as damaged: {_listed(damaged)}" if damaged else ""
            self._serve(kind, version.file, by, f"{reason}{passed}", None)
        return self.get(version.name)

    def _serves_already(self, name: str) -> StateError:
        return StateError(f"{name} is in service already", where="version", remedy=self._known())

    def _serve(self, kind: str, model: Path, by: str, reason: str, training: str | None) -> None:
        event = self._event(kind, model, by, reason, training)
        self._append()  # the last one, should a kill have come between the two lines below
        self._project.publish(model, event)
        self._append(event)

    def _event(self, kind: str, model: Path, by: str, reason: str, training: str | None) -> Event:
        current = self._project.published()
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        return {
            "event": kind,
            "version": model.stem,
            "time": now,
            "by": by,
            "reason": reason,
            "before": current.stem if current else None,
            "training": training,
        }

    def _append(self, event: Event | None = None) -> None:
        known, events = _read(self._project.history), self.events()
        if event is not None and event not in events:
            events = [*events, event]
        if events != known:
            write_json(self._project.history, events)

    def _last_published(self) -> Event | None:
        record = self._project.published_record()
        if not record.get("model"):
            return None
        if isinstance(record.get("event"), dict):
            return dict(record["event"])
        when = datetime.datetime.fromtimestamp(float(record.get("time", 0))).astimezone()
        return {
            "event": PUBLISHED,
            "version": Path(record["model"]).stem,
            "time": when.isoformat(timespec="milliseconds"),
            "by": UNKNOWN,
            "reason": "before there was a history",
            "before": None,
            "training": None,
        }

    def _known(self) -> str:
        names = self.names()
        return f"Versions: {', '.join(names)}." if names else "Train first: there is no version yet."

    def _file(self, name: str) -> Path:
        return self._project.models / f"{name}.safetensors"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._project.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._project.root / "versions.lock")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise StateError(
                "another process is changing which model is in service", where=self._project.root, remedy="Try again."
            ) from None
        try:
            yield
        finally:
            lock.release()


def _version(file: Path, events: list[Event], current: Path | None) -> Version:
    own = [event for event in events if event["version"] == file.stem]
    judged = next((event for event in reversed(own) if event["event"] in (PUBLISHED, REFUSED)), None)
    try:
        info = read_info(file)
    except SamAdaptError as error:
        return Version(file.stem, file, file == current, DAMAGED, str(error), own, None)
    if judged is not None:
        verdict, reason = judged["event"], judged["reason"]
    elif "verdict" in info.training:
        verdict, reason = UNFINISHED, "its training was stopped before it could be published or refused"
    else:
        verdict, reason = UNKNOWN, ""
    return Version(file.stem, file, file == current, verdict, reason, own, info)


def _served(events: list[Event]) -> list[Event]:
    """The events that put versions in service of which none was rolled back; the last one is in service.

    A training's result takes the place of its own preview.
    """
    stack: list[Event] = []
    for event in events:
        if event["event"] == ROLLED_BACK:
            while stack and stack[-1]["version"] != event["version"]:
                stack.pop()
            stack = stack or [event]
        elif event["event"] in (PUBLISHED, PROMOTED):
            if stack and event["training"] and stack[-1]["training"] == event["training"]:
                stack.pop()
            stack.append(event)
    return stack


def _listed(versions: Sequence[Version]) -> str:
    return ", ".join(version.name for version in versions)


def _require_loadable(version: Version, config: AppConfig) -> None:
    """Refuse what the server could not load, before annotators meet it.

    Raises:
        InputError: the file is damaged, its labels included.
        StateError: its base weights are not here.
    """
    info = version.info or read_info(version.file)
    try:
        AdaptedModel.load(version.file, config.weights_for(info.backbone))
    except InputError:
        raise
    except SamAdaptError as error:
        raise StateError(
            f"{version.name} cannot be put in service: {error.what}", where=error.where, remedy=error.remedy
        ) from error


def _estimate(record: dict[str, Any]) -> Estimate:
    """Undo the JSON form, in which NaN is null."""
    mean_, low, high = (float("nan") if record[key] is None else float(record[key]) for key in ("mean", "low", "high"))
    return Estimate(mean_, low, high, int(record["count"]))


def _read(path: Path) -> list[Event]:
    if not path.exists():
        return []
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(events, list) or not all(_is_event(event) for event in events):
            raise ValueError("not a list of events")
    except (OSError, ValueError) as error:
        raise InputError(
            f"not a history of models ({error})",
            where=path,
            remedy="Restore it, or move it away: then only what happened until now is forgotten, and no model changes.",
        ) from error
    return events


def _is_event(value: Any) -> bool:
    return isinstance(value, dict) and {"event", "version", "training", "reason"} <= value.keys()
