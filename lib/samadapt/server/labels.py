"""Which structures there are, and in which order."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from monailabel.interfaces.datastore import DefaultLabelTag

from samadapt.data.labels import BACKGROUND, LabelMap, same_name, values_from_label_info
from samadapt.errors import InputError
from samadapt.files import write_json
from samadapt.model import read_info
from samadapt.project import Project
from samadapt.server.datastore import SafeDatastore

logger = logging.getLogger(__name__)


class LabelSource:
    """The label map of now. What a person has written down wins; otherwise names come from the submitted labels.

    In this order: ``--conf labels``; ``labels.json`` in the studies folder; names of submitted labels in the order in
    which they first appeared, kept in the project's folder so that no index ever moves; the published model's labels.

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

    def learn(self, names: Iterable[str]) -> None:
        """Append names that are new, unless a person has written the label map down."""
        if self._configured or self._written.is_file():
            return
        known = self.current()
        found = {same_name(name): name for name in (known.names if known else ())}
        before = len(found)
        for name in names:
            if same_name(name) != BACKGROUND:
                found.setdefault(same_name(name), name)
        if len(found) != before:
            write_json(self._learned, list(found.values()))

    def learn_from(self, datastore: SafeDatastore) -> None:
        """Learn from every final label's ``label_info``, the oldest first."""
        labels = [entry["labels"].get(DefaultLabelTag.FINAL.value) for entry in datastore.json()["objects"].values()]
        infos = [label["info"] for label in labels if label]
        for info in sorted(infos, key=lambda info: (info.get("ts", 0), info.get("name", ""))):
            try:
                values = values_from_label_info(info.get("label_info") or [])
            except InputError as error:
                logger.warning("the label names of %s are left out: %s", info.get("name"), error)
                continue
            self.learn(name for _, name in sorted(values.items()))
