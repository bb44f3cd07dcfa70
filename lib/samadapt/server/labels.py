"""Which structures there are, and in which order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import DefaultLabelTag

from samadapt.config import most_like
from samadapt.data.coverage import UNSAID, Coverage
from samadapt.data.labels import (
    BACKGROUND,
    IGNORE,
    IGNORED_NAMES,
    LabelMap,
    class_names,
    same_name,
    values_from_label_info,
)
from samadapt.errors import InputError, SamAdaptError
from samadapt.files import write_json
from samadapt.model import read_info
from samadapt.project import Project
from samadapt.server.datastore import SafeDatastore, drawn_names

logger = logging.getLogger(__name__)

WRITE_DOWN = "to learn it, add it to --conf labels or labels.json, or leave both out"


class LabelSource:
    """The label map of now. What a person has written down wins; otherwise names come from the submitted labels.

    In this order: ``--conf labels``; ``labels.json`` in the studies folder; names of the structures that are drawn in
    labels, in the order in which they first appeared, kept in the project's folder; the published model's labels.

    Args:
        configured: from ``--conf labels``.
        studies: the studies folder (a cache folder over DICOMweb).
        project: where the learned names are kept.
    """

    def __init__(self, configured: LabelMap | None, studies: Path, project: Project) -> None:
        self._configured = configured
        self._written = studies / "labels.json"
        self._learned = project.root / "labels.json"
        self._project = project
        self._learning = threading.Lock()

    def current(self) -> LabelMap | None:
        """The label map, or None as long as nobody has named a structure."""
        if self._configured:
            return self._configured
        for path in (self._written, self._learned):
            if path.is_file():
                return LabelMap.from_json(path)
        published = self._project.published()
        return read_info(published).labels if published else None

    def indices(self) -> dict[str, int]:
        """``{name: index}`` as viewers want it; empty as long as nothing is known."""
        labels = self.current()
        return labels.to_dict() if labels else {}

    def learn_from(self, datastore: SafeDatastore) -> None:
        """Learn from every final label's ``label_info``, the oldest first, unless a person has written the names down.

        A name that no label draws and the model in service does not know leaves the list; the others keep their order.
        None leaves as long as a label without names is there (its values follow that order), or while some labels
        cannot be seen.
        """
        if self._configured or self._written.is_file():
            return
        infos = _final_infos(datastore)
        kept = not datastore.knows_all_labels() or any(not info.get("label_info") for info in infos)
        with self._learning:
            self._bring_up_to_date([name for info in infos for name in _drawn_names(info)], kept)

    def _bring_up_to_date(self, drawn: Iterable[str], keep_all: bool) -> None:
        listed = self.current()
        before = listed.names if listed else ()
        learned = self._in_service()
        used = {same_name(name) for name in (*drawn, *(learned or ()))}
        kept = [name for name in before if keep_all or learned is None or same_name(name) in used]
        now = class_names([*kept, *(learned or ()), *drawn])
        if now and tuple(now) != before:
            write_json(self._learned, now)
        elif not now:
            self._learned.unlink(missing_ok=True)

    def _in_service(self) -> tuple[str, ...] | None:
        """What the published model knows; None where its file cannot be read."""
        published = self._project.published()
        try:
            return read_info(published).labels.names if published else ()
        except SamAdaptError as error:
            logger.warning("the labels of %s are unknown: %s", published, error)
            return None


def _final_infos(datastore: SafeDatastore) -> list[dict[str, Any]]:
    """What came with each final label, the oldest first."""
    labels = [entry["labels"].get(DefaultLabelTag.FINAL.value) for entry in datastore.json()["objects"].values()]
    infos = [label["info"] for label in labels if label]
    return sorted(infos, key=lambda info: (info.get("ts", 0), info.get("name", "")))


def _drawn_names(info: Mapping[str, Any]) -> list[str]:
    """As ``drawn_names``; none where its ``label_info`` is none."""
    try:
        return drawn_names(info)
    except InputError as error:
        logger.warning("the label names of %s are left out: %s", info.get("name"), error)
        return []


def label_warnings(
    submitted: Mapping[str, Any],
    present: Collection[int],
    labels: LabelMap | None,
    coverage: Coverage = UNSAID,
    slices: tuple[int, int] | None = None,
) -> list[str]:
    """What is odd about a stored label, or not labelled in it, for the annotator who has just submitted it.

    Args:
        submitted: with its ``label_info``, which may be missing.
        present: values in the mask, without 0.
        labels: the label map of now.
        coverage: of the label.
        slices: how many slices are labelled, of how many; None: all.
    """
    unknown = _unknown(submitted, present, labels, coverage) if labels else ()
    partly = []
    if slices and not slices[0]:
        partly.append(f"none of its {slices[1]} slices counts as labelled: nothing is learned from it")
    elif slices and slices[0] < slices[1]:
        partly.append(f"{slices[0]} of {slices[1]} slices are labelled; nothing is learned from the others")
    if unknown:
        partly.append(f"the label does not speak of {', '.join(unknown)}: its background may be any of them")
    return [*_odd(submitted, present, labels, unknown), *partly]


def newcomers(submitted: Mapping[str, Any], before: LabelMap | None) -> list[str]:
    """What a label draws under names that were not there ``before``: new structures, or mistyped; for its annotator."""
    if before is None:
        return []
    names = class_names(name for name in _drawn_names(submitted) if before.find(name) is None)
    guesses = {name: most_like(name, before.names) for name in names}
    return [
        f"{name!r} is a new structure, beside {', '.join(before.names)}"
        + (f" (did you mean {guess!r}?)" if guess else "")
        for name, guess in guesses.items()
    ]


def _unknown(
    submitted: Mapping[str, Any], present: Collection[int], labels: LabelMap, coverage: Coverage
) -> tuple[str, ...]:
    entries = submitted.get("label_info")
    values = dict(enumerate(labels.names, start=1)) if not entries else values_from_label_info(entries)
    named = {same_name(name) for value, name in values.items() if entries or value in present}
    return coverage.unknown(labels, tuple(name for name in labels.names if same_name(name) not in named))


def _odd(
    submitted: Mapping[str, Any], present: Collection[int], labels: LabelMap | None, unknown: Collection[str]
) -> list[str]:
    if not present:
        return ["the mask is empty"]
    known = labels.names if labels else ()
    entries = submitted.get("label_info")
    if entries is None:
        order = ", ".join(f"{value} = {name}" for value, name in enumerate(known, start=1))
        if order and IGNORE in present:
            order += f", {IGNORE} = not labelled"
        assumed = f"they are taken for {order}" if order else "nothing can be learned from them"
        return [f"the label's values have no names: {assumed}"]
    named = values_from_label_info(entries)
    nameless = sorted(set(present) - set(named))
    warnings = [f"value {value} has no name in label_info and is not learned" for value in nameless]
    structures: dict[str, list[int]] = {}
    for value in sorted(set(present) & set(named)):
        structures.setdefault(same_name(named[value]), []).append(value)
    for values in structures.values():
        name = named[values[0]]
        if same_name(name) in (BACKGROUND, *IGNORED_NAMES):
            continue
        if len(values) > 1:
            warnings.append(f"values {', '.join(map(str, values))} are all {name!r} and are learned as one structure")
        if labels and labels.find(name) is None:
            warnings.append(f"{name!r} is none of the labels ({', '.join(known)}) and becomes background; {WRITE_DOWN}")
        if any(same_name(name) == same_name(other) for other in unknown):
            warnings.append(f"{name!r} is drawn but not among the labelled classes, and is not learned from this label")
    return warnings
