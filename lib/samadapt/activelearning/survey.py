"""What strategies need to know of every case: computed once, and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samadapt.activelearning.observe import case_descriptor, describe, heads_apart, spread_of_answers
from samadapt.activelearning.strategy import Candidate
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import Volume, read_volume
from samadapt.evaluation.metrics import dice, mean
from samadapt.files import atomic_path
from samadapt.inference.examine import Examination, examine
from samadapt.model import AdaptedModel

FORMAT = "samadapt-survey-2"

DESCRIPTORS = frozenset({"descriptor", "slice_descriptors"})
"""Of the frozen encoder alone."""

OPINIONS = frozenset({"examination", "variants", "spread", "disagreement", "label_dice"})
"""Of one version of the model."""

Record = dict[str, Any]


class Survey:
    """Findings by case, one JSON file each, with the descriptors beside it as ``.npy``.

    What was found by another version of the model, in an image that has changed since, or for another label counts as
    absent, and so does whatever is damaged. Descriptors of different backbones do not fit together: give each backbone
    its own folder. What was read stays in memory until it changes: strategies ask for all cases at once.

    Args:
        folder: made with the first finding.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[str, tuple[list[int], Record]] = {}
        self._rows: dict[str, tuple[list[int], np.ndarray]] = {}

    def candidate(
        self, case_id: str, image: Path, version: str | None, proposed: float = 0.0, label_file: Path | None = None
    ) -> Candidate:
        """What is known of a case; nothing is computed.

        Args:
            case_id: its id.
            image: file, or folder of a DICOM series.
            version: of the model in service; None where there is none.
            proposed: see ``Candidate``.
            label_file: the label that ``look`` was given, to notice when it changes.
        """
        record = self._read(case_id, image)
        slices = self._slices(case_id, record)
        return Candidate(
            case_id,
            descriptor=None if slices is None else case_descriptor(slices),
            slice_descriptors=slices,
            proposed=proposed,
            **_opinions(record, version, label_file),
        )

    def missing(
        self,
        case_id: str,
        image: Path,
        version: str | None,
        needs: Collection[str],
        label_file: Path | None = None,
    ) -> frozenset[str]:
        """Which of ``needs`` ``look`` would have to compute.

        Where there is no model its opinions are not missed. What was found to be undefined (how far the heads are apart
        of a model that takes no boxes) is not missing. ``label_dice`` of a case without label is: do not ask for it.
        """
        record = self._read(case_id, image)
        known = set(OPINIONS if version is None else _opinions(record, version, label_file))
        if self._slices(case_id, record) is not None:
            known |= DESCRIPTORS
        return frozenset(needs) & (DESCRIPTORS | OPINIONS) - known

    def look(
        self,
        case_id: str,
        image: Path,
        needs: Collection[str],
        *,
        plain: AdaptedModel,
        volume: Volume | None = None,
        model: AdaptedModel | None = None,
        version: str | None = None,
        earlier: Sequence[AdaptedModel] = (),
        cache: SliceCache | None = None,
        label: np.ndarray | None = None,
        label_file: Path | None = None,
        unknown: Collection[str] = (),
        proposed: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Candidate:
        """Compute what is missing, keep each part as soon as it is there, and say all that is known.

        Args:
            case_id: its id.
            image: file, or folder of a DICOM series.
            needs: names of ``Candidate``'s fields; those that are kept already cost nothing.
            plain: the backbone as it came.
            volume: the image, if it has been read already; else it is read where something is missing.
            model: the one in service, trained; None computes descriptors alone.
            version: its name.
            earlier: versions before it, the latest last; they are asked for ``variants`` and ``spread``.
            cache: where embeddings are looked up and kept.
            label: (I,J,K) indices of the model's labels, the label of the case, ``IGNORE`` where nobody has labelled;
                None where it has none.
            label_file: where it was read from; without it, nobody notices when the label changes.
            unknown: names of classes that nobody has looked for in the case.
            proposed: see ``Candidate``.
            progress: called with (slices done, slices in all) while the model looks at the whole volume.

        Raises:
            InputError: the image cannot be read.
        """
        version = None if model is None else version
        asked = needs if label is not None else set(needs) - {"label_dice"}
        todo = self.missing(case_id, image, version, asked, label_file)
        if todo:
            stamp = _stamp(image)  # before reading: a change that comes in between is noticed the next time
            volume = volume or read_volume(image)
            if todo & DESCRIPTORS:
                self._keep_slices(case_id, stamp, describe(plain, volume, cache))
            if model is not None and version is not None and todo & OPINIONS:
                known = self.candidate(case_id, image, version, label_file=label_file)
                look_at_it = _Look(model, volume, earlier, cache, label, unknown, progress)
                for finding in look_at_it.findings(todo & OPINIONS, known.examination):
                    self._keep_opinions(case_id, stamp, version, finding, _label_stamp(label_file))
        return self.candidate(case_id, image, version, proposed, label_file)

    # ---- on disk

    def _path(self, case_id: str) -> Path:
        return self._folder / f"{hashlib.sha256(case_id.encode()).hexdigest()[:32]}.json"

    def _read(self, case_id: str, image: Path) -> Record:
        """The record of a case if it is of this image as it is now; else an empty one."""
        try:
            stamp = _stamp(image)
        except OSError:
            return {}
        return self._record(case_id, stamp)

    def _record(self, case_id: str, stamp: list[int]) -> Record:
        path = self._path(case_id)
        try:
            state = _stamp(path)
            if self._records.get(case_id, (None,))[0] != state:
                self._records[case_id] = (state, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}
        record = self._records[case_id][1]
        fits = isinstance(record, dict) and record.get("format") == FORMAT
        return record if fits and record.get("id") == case_id and record.get("image") == stamp else {}

    def _write(self, case_id: str, stamp: list[int], changes: Record) -> None:
        """Replace parts of a record; what was of another image goes."""
        record = self._record(case_id, stamp) | {"format": FORMAT, "id": case_id, "image": stamp} | changes
        with atomic_path(self._path(case_id)) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")

    def _keep_opinions(
        self, case_id: str, stamp: list[int], version: str, finding: Record, label: list[int] | None
    ) -> None:
        record = self._record(case_id, stamp)
        before = record.get("opinions") if record.get("version") == version else None
        opinions = (before if isinstance(before, dict) else {}) | finding
        changes = {"version": version, "opinions": opinions}
        self._write(case_id, stamp, changes | ({"label": label} if "label_dice" in finding else {}))

    def _keep_slices(self, case_id: str, stamp: list[int], slices: np.ndarray) -> None:
        numbers = np.flatnonzero(np.isfinite(slices).all(axis=1))
        buffer = io.BytesIO()
        np.save(buffer, slices[numbers], allow_pickle=False)
        data = buffer.getvalue()
        with atomic_path(self._path(case_id).with_suffix(".npy")) as temporary:
            temporary.write_bytes(data)
        described = {"slices": len(slices), "numbers": numbers.tolist(), "crc32": zlib.crc32(data)}
        self._write(case_id, stamp, {"descriptors": described})

    def _slices(self, case_id: str, record: Record) -> np.ndarray | None:
        """(N,D), see ``describe``; None where they are not kept, or what is kept is not what was written."""
        try:
            described = record["descriptors"]
            path = self._path(case_id).with_suffix(".npy")
            state = [*_stamp(path), described["crc32"]]
            if self._rows.get(case_id, (None,))[0] != state:
                data = path.read_bytes()
                if zlib.crc32(data) != described["crc32"]:
                    return None
                self._rows[case_id] = (state, np.load(io.BytesIO(data), allow_pickle=False))
            rows = self._rows[case_id][1]
            slices = np.full((int(described["slices"]), rows.shape[1]), np.nan, dtype=np.float32)
            slices[described["numbers"]] = rows
            return slices
        except (OSError, KeyError, TypeError, ValueError, IndexError):
            return None


@dataclass(frozen=True)
class _Look:
    """One model before one volume; see ``Survey.look`` for the fields."""

    model: AdaptedModel
    volume: Volume
    earlier: Sequence[AdaptedModel]
    cache: SliceCache | None
    label: np.ndarray | None
    unknown: Collection[str]
    progress: Callable[[int, int], None] | None

    def findings(self, todo: Collection[str], examination: Examination | None) -> Iterator[Record]:
        """Yields what is found, as JSON by name of the field; the most expensive part comes first."""
        if examination is None or "label_dice" in todo:
            mask, examination = examine(self.model, self.volume, self.progress, self.cache)
            yield {"examination": examination.to_dict()} | self._agreement(mask)
        if "spread" in todo:
            spread = spread_of_answers(self.model, self.volume, examination, self.earlier, self.cache)
            yield {"spread": None if spread is None else np.round(spread, 5).tolist()}
        if "disagreement" in todo:
            yield {"disagreement": heads_apart(self.model, self.volume, examination, self.cache)}
        if "variants" in todo:
            labels = self.model.info.labels
            others = [one for one in self.earlier if one.info.labels == labels]
            yield {"variants": [examine(one, self.volume, cache=self.cache)[1].to_dict() for one in others]}

    def _agreement(self, mask: np.ndarray) -> Record:
        if self.label is None:
            return {}
        value = mean(dice(mask, self.label, self.model.info.labels, self.unknown).values())
        return {"label_dice": None if math.isnan(value) else value}


def _opinions(record: Record, version: str | None, label_file: Path | None) -> dict[str, Any]:
    """Fields of ``Candidate`` that are known of this version, undefined ones as None; damaged ones are not."""
    if version is None or record.get("version") != version:
        return {}
    kept, known = record.get("opinions"), {}
    for name, read in _READERS.items():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            known[name] = read(kept[name])  # type: ignore[index]
    if record.get("label") != _label_stamp(label_file):
        known.pop("label_dice", None)
    return known


def _spread(value: Any) -> np.ndarray | None:
    return None if value is None else np.asarray(value, dtype=np.float64)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "examination": Examination.from_dict,
    "variants": lambda value: tuple(Examination.from_dict(one) for one in value),
    "spread": _spread,
    "disagreement": _number,
    "label_dice": _number,
}


def _stamp(path: Path) -> list[int]:
    """When a file was changed (ns) and its size in bytes; of a folder, the last change in it and the sum of sizes.

    Raises:
        OSError: it is not there.
    """
    states = [path.stat(), *(file.stat() for file in path.iterdir())] if path.is_dir() else [path.stat()]
    return [max(state.st_mtime_ns for state in states), sum(state.st_size for state in states)]


def _label_stamp(path: Path | None) -> list[int] | None:
    """``_stamp`` of a label; None without one, or where it has gone."""
    try:
        return None if path is None else _stamp(path)
    except OSError:
        return None
