"""Labels by name: what a class is called decides, never which value someone's file gave it."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from samadapt.errors import ConfigError, InputError

if TYPE_CHECKING:
    from torch import Tensor  # importing it takes seconds, and names alone do not need it

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, "Tensor")

BACKGROUND = "background"
MAX_LABELS = 254
"""Masks are uint8, and 255 is ``IGNORE``."""

IGNORE = 255
"""Voxels of a mask in the model's order that nobody has labelled: they are neither learned from nor measured on. (OHIF
takes 255 for "leave unchanged".)"""

HIGHEST_VALUE = 65535
"""The largest voxel value of a label that comes in: 16 bits, as far as DICOM's segment numbers go."""

IGNORED_NAMES = ("ignore", "unlabelled", "unlabeled")
"""Segments of these names become ``IGNORE``; none of them is ever a class."""

_FORMS = 'Give names in order: "spleen,liver", ["spleen", "liver"] or {"spleen": 1, "liver": 2}.'


def same_name(name: str) -> str:
    """The form in which names are compared: case, surplus white space and the form of accents do not count."""
    return unicodedata.normalize("NFC", " ".join(unicodedata.normalize("NFC", name).split()).casefold())


def class_names(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are classes: each once, in order, without background and ``IGNORED_NAMES``."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(same_name(name), name)
    return [name for key, name in found.items() if key != BACKGROUND and key not in IGNORED_NAMES]


@dataclass(frozen=True)
class LabelMap:
    """The classes of a model, in order and without background.

    Args:
        names: ``names[n]`` has index ``n + 1``; 0 is background.

    Raises:
        ConfigError: no name, an empty one, the same name twice, "background", one of ``IGNORED_NAMES``, or more than
            254 names.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        names = tuple(self.names)
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise _config("every label needs a name", names)
        names = tuple(" ".join(name.split()) for name in names)
        counts = Counter(same_name(name) for name in names)
        twice = [name for name in names if counts[same_name(name)] > 1]
        if twice:
            raise _config(f"the same label name twice: {', '.join(twice)}", names)
        if BACKGROUND in counts:
            raise _config("background is not a label: it is always index 0", names)
        if ignored := [name for name in names if same_name(name) in IGNORED_NAMES]:
            raise _config(f"'{ignored[0]}' is not a label: it names what nobody has labelled", names)
        if len(names) > MAX_LABELS:
            raise _config(f"{len(names)} labels, where a mask holds at most {MAX_LABELS}", names)
        object.__setattr__(self, "names", names)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Index (1 to K) of a class.

        Raises:
            InputError: a name that is not a class of this model.
        """
        found = self.find(name)
        if found is None:
            raise InputError(f"unknown label '{name}'", remedy=f"The model's labels are: {', '.join(self.names)}.")
        return found

    def find(self, name: str) -> int | None:
        """Index (1 to K) of a class, None where there is no such class."""
        return self._indices.get(same_name(name))

    @property
    def _indices(self) -> dict[str, int]:
        return {same_name(name): n for n, name in enumerate(self.names, start=1)}

    def to_dict(self) -> dict[str, int]:
        """Name -> index, the form that MONAI Label and OHIF take."""
        return {name: n for n, name in enumerate(self.names, start=1)}

    @classmethod
    def from_config(cls, value: str | Sequence[str] | Mapping[Any, Any]) -> LabelMap:
        """Labels as people write them.

        Args:
            value: a list of names in order; name -> index or index -> name, indices 1 to K without a gap
                (``background: 0`` may stand among them); the same as JSON text; or names parted by commas.

        Raises:
            ConfigError: anything else.
        """
        if isinstance(value, str):
            text = value.strip()
            value = _json(text) if text[:1] in ("[", "{") else [part for part in text.split(",") if part.strip()]
        if isinstance(value, Mapping):
            return cls(_names_in_order(value))
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return cls(tuple(value))
        raise _config("not a list of labels", value)

    @classmethod
    def from_json(cls, path: str | Path) -> LabelMap:
        """Labels from a file: what :meth:`from_config` takes, or an object with that under ``"labels"``.

        Raises:
            ConfigError: unreadable, not JSON, or not labels; it names the file.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            if isinstance(value, dict) and isinstance(value.get("labels"), list | dict | str):
                value = value["labels"]
            return cls.from_config(value)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot be read as JSON ({error})", where=path, remedy=_FORMS) from error
        except ConfigError as error:
            raise ConfigError(error.what, where=path, remedy=error.remedy) from error


@dataclass(frozen=True)
class RemapReport:
    """What happened when a label was brought into a model's order.

    Args:
        mapped: model class -> number of voxels.
        renamed: name in the file -> class it was taken for, where they differ.
        absent: model classes that the label does not speak of (not in its names; without names: without a voxel).
        empty: classes that the label names but has no voxel of.
        extra: names that the model does not know -> number of voxels, now background.
        unknown_values: voxel values without a name -> number of voxels, now background.
        ignored: number of voxels that are now ``IGNORE``.
        slices: how many slices show a voxel that is not ``IGNORE``, of how many; None where nothing is ignored.
        unknown: model classes that nobody has looked for in this image: its background may be any of them.
    """

    mapped: dict[str, int] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    extra: dict[str, int] = field(default_factory=dict)
    unknown_values: dict[int, int] = field(default_factory=dict)
    ignored: int = 0
    slices: tuple[int, int] | None = None
    unknown: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether every class was there, or is said to be unknown, and nothing was dropped."""
        return not (set(self.absent) - set(self.unknown) or self.extra or self.unknown_values)

    @property
    def partly(self) -> str:
        """What of the image is not labelled, for people; empty where everything is."""
        parts = []
        if self.slices and self.slices[0] < self.slices[1]:
            parts.append(f"{self.slices[0]} of {self.slices[1]} slices are labelled")
        elif self.ignored:
            parts.append(f"{self.ignored} voxels are left out as not labelled")
        if self.unknown:
            parts.append(f"background may also be {' or '.join(self.unknown)}")
        return "; ".join(parts)

    def __str__(self) -> str:
        parts = [", ".join(f"{name} {count} voxels" for name, count in self.mapped.items()) or "no labelled voxel"]
        if self.renamed:
            parts.append("renamed: " + ", ".join(f"'{old}' to '{new}'" for old, new in self.renamed.items()))
        if absent := [name for name in self.absent if name not in self.unknown]:
            parts.append("absent: " + ", ".join(absent))
        if self.empty:
            parts.append("empty: " + ", ".join(self.empty))
        if self.extra:
            dropped = ", ".join(f"'{name}' ({count} voxels)" for name, count in self.extra.items())
            parts.append(f"not the model's labels, taken as background: {dropped}")
        if self.unknown_values:
            dropped = ", ".join(f"{value} ({count} voxels)" for value, count in self.unknown_values.items())
            parts.append(f"values without a name, taken as background: {dropped}")
        if self.partly:
            parts.append(self.partly)
        return "; ".join(parts)


def values_from_label_info(label_info: Any) -> dict[int, str]:
    """Voxel value -> name from MONAI Label's ``label_info``, as Slicer and OHIF send it on submit.

    Args:
        label_info: list of ``{"name": str, "idx": int}``; whole numbers may come as text. An entry for background
            with ``idx`` 0 is left out. Two values may have the same name (two segments of one class).

    Raises:
        InputError: anything else: no list, a missing name or idx, an idx outside 1 to ``HIGHEST_VALUE``, the same idx
            twice.
    """
    if not isinstance(label_info, list | tuple):
        raise _malformed(f"it is {label_info!r}")
    values: dict[int, str] = {}
    for entry in label_info:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
            raise _malformed(f"an entry without a name: {entry!r}")
        name, value = " ".join(entry["name"].split()), whole_number(entry.get("idx"))
        if value == 0 and same_name(name) == BACKGROUND:
            continue
        if value is None or not 1 <= value <= HIGHEST_VALUE:
            raise _malformed(f"'{name}' has idx {entry.get('idx')!r}")
        if value in values:
            raise _malformed(f"idx {value} stands for both '{values[value]}' and '{name}'")
        values[value] = name
    return values


def remap(
    mask: np.ndarray,
    values: Mapping[int, str] | None,
    labels: LabelMap,
    renames: Mapping[str, str] | None = None,
    left_out: np.ndarray | None = None,
) -> tuple[np.ndarray, RemapReport]:
    """Bring a label into the model's order, by name.

    Args:
        mask: whole numbers >= 0, any shape.
        values: value -> name. None: the model's own order is assumed, and 255 is ``IGNORE``.
        labels: the model's classes.
        renames: name in the file -> the model's name for it.
        left_out: bool, of the mask's shape: voxels that become ``IGNORE`` whatever they are, and that the report does
            not count as anything else.

    Returns:
        uint8 mask of the same shape with the model's indices (0 = background, ``IGNORE`` = not labelled), and what was
        done.

    Raises:
        InputError: a rename to a name that the model does not have; negative or fractional values.
    """
    if mask.dtype.kind not in "bui" or (mask.size and mask.min() < 0):
        raise InputError("a label holds whole numbers from 0 up")
    counts = _count(mask if left_out is None else mask[~left_out])
    counts.pop(0, None)
    names = {**dict(enumerate(labels.names, start=1)), IGNORE: IGNORED_NAMES[0]} if values is None else dict(values)
    targets, renamed, extra = _targets(names, labels, _renames(renames or {}, labels))
    result = _lookup(mask, targets)
    if left_out is not None:
        result[left_out] = IGNORE
    classes = {value: labels.names[index - 1] for value, index in targets.items() if 0 < index != IGNORE}
    mapped: Counter[str] = Counter()
    for value, name in classes.items():
        if counts.get(value):
            mapped[name] += counts[value]
    spoken_of = set(classes.values()) if values is not None else set(mapped)
    report = RemapReport(
        mapped={name: mapped[name] for name in labels.names if name in mapped},
        renamed=renamed,
        absent=tuple(name for name in labels.names if name not in spoken_of),
        empty=tuple(name for name in labels.names if name in spoken_of and name not in mapped),
        extra=_sum_by_name(extra, counts),
        unknown_values={value: n for value, n in sorted(counts.items()) if value not in names},
        ignored=int((result == IGNORE).sum()),
    )
    return result, report


def resize_label(mask: ArrayOrTensor, size: Sequence[int]) -> ArrayOrTensor:
    """Resize a label, numpy or torch, to ``size`` (one length per axis); it never invents a class.

    Every new pixel takes the value of the old pixel whose area holds the new one's centre.

    Raises:
        InputError: not one length per axis, or a length below 1.
    """
    if len(size) != mask.ndim or min(size) < 1:
        raise InputError(f"a label of shape {tuple(mask.shape)} cannot be resized to {tuple(size)}")
    for axis, (old, new) in enumerate(zip(mask.shape, size, strict=True)):
        # Whole-number arithmetic for floor((n + 0.5) * old / new): exact at every border.
        nearest = (2 * np.arange(new) + 1) * old // (2 * new)
        mask = mask[(slice(None),) * axis + (nearest,)]
    return mask


def _targets(
    names: Mapping[int, str], labels: LabelMap, renames: Mapping[str, str]
) -> tuple[dict[int, int], dict[str, str], dict[int, str]]:
    """value -> model index (0 where the model has no such class, ``IGNORE`` where that is meant); name -> other name;
    value -> unknown name."""
    targets: dict[int, int] = {}
    renamed: dict[str, str] = {}
    extra: dict[int, str] = {}
    for value, name in names.items():
        target = renames.get(same_name(name), name)
        index = IGNORE if same_name(target) in IGNORED_NAMES else labels.find(target)
        targets[int(value)] = index or 0
        if index is None:
            if same_name(target) != BACKGROUND:
                extra[int(value)] = name
        elif index != IGNORE and labels.names[index - 1] != name:
            renamed[name] = labels.names[index - 1]
    return targets, renamed, extra


def _renames(renames: Mapping[str, str], labels: LabelMap) -> dict[str, str]:
    for old, new in renames.items():
        if labels.find(new) is None and same_name(new) not in (BACKGROUND, *IGNORED_NAMES):
            raise InputError(
                f"'{old}' is to be renamed to '{new}', which is not a label of the model",
                remedy=f"The model's labels are: {', '.join(labels.names)}.",
            )
    return {same_name(old): new for old, new in renames.items()}


def _sum_by_name(extra: Mapping[int, str], counts: Mapping[int, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for value, name in extra.items():
        total[name] += counts.get(value, 0)
    return dict(total)


def draw_the_same(one: np.ndarray, names: Mapping[int, str], other: np.ndarray, other_names: Mapping[int, str]) -> bool:
    """Whether two labels of one image mark the same voxels with the same names, whatever values stand for these.

    Args:
        one, other: (I,J,K) values, 0 where nothing is marked.
        names, other_names: value -> name; a value without one is known by itself.
    """
    known: dict[str, int] = {}

    def numbered(mask: np.ndarray, called: Mapping[int, str]) -> np.ndarray:
        values = np.array(sorted(values_in(mask) | {0}))
        keys = ["" if value == 0 else same_name(called.get(value, f"label {value}")) for value in values.tolist()]
        return np.array([known.setdefault(key, len(known)) for key in keys])[np.searchsorted(values, mask)]

    return np.array_equal(numbered(one, names), numbered(other, other_names))


def values_in(mask: np.ndarray) -> set[int]:
    """The values that a label holds."""
    if mask.size and mask.max() < 65536:
        seen = np.zeros(65536, bool)
        seen[mask.ravel(order="K")] = True
        return set(np.flatnonzero(seen).tolist())
    return set(np.unique(mask).tolist())


def _count(mask: np.ndarray) -> dict[int, int]:
    """Voxels per value. Counting is many times faster than sorting, but only small values fit into a table."""
    if mask.size and mask.max() < 65536:
        counts = np.bincount(mask.ravel(order="K"))
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    present, numbers = np.unique(mask, return_counts=True)
    return {int(value): int(n) for value, n in zip(present, numbers, strict=True)}


def _lookup(mask: np.ndarray, targets: Mapping[int, int]) -> np.ndarray:
    if mask.size and mask.max() < 65536:
        table = np.zeros(65536, dtype=np.uint8)
        for value, index in targets.items():
            if 0 < value < 65536:
                table[value] = index
        return table[mask.astype(np.uint16, copy=False)]
    result = np.zeros(mask.shape, dtype=np.uint8)
    for value, index in targets.items():
        if value > 0:
            result[mask == value] = index
    return result


def _names_in_order(value: Mapping[Any, Any]) -> tuple[str, ...]:
    """Names sorted by index from name -> index or index -> name; indices must be 1 to K."""
    pairs: list[tuple[int | None, Any]] = []
    for key, other in value.items():
        index = whole_number(other)
        # {"1": "spleen"} and {"spleen": 1} are told apart by which side is a number.
        pairs.append((index, key) if index is not None else (whole_number(key), other))
    if any(index is None or not isinstance(name, str) for index, name in pairs):
        raise _config("every label needs a name and a whole number", dict(value))
    pairs = [(index, name) for index, name in pairs if not (index == 0 and same_name(name) == BACKGROUND)]
    pairs.sort(key=lambda pair: pair[0] or 0)
    if [index for index, _ in pairs] != list(range(1, len(pairs) + 1)):
        raise _config(f"label indices must be 1 to {len(pairs)}, each once", dict(value))
    return tuple(name for _, name in pairs)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _config(f"not valid JSON ({error})", text) from error


def whole_number(value: Any) -> int | None:
    """A whole number that may come as 2, 2.0 or "2"; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None


def _config(what: str, value: Iterable[Any] | Any) -> ConfigError:
    shown = repr(value)
    return ConfigError(f"{what} (got {shown[:200]})", where="labels", remedy=_FORMS)


def _malformed(what: str) -> InputError:
    return InputError(
        f"cannot tell which voxel value is which label: {what}",
        where="label_info",
        remedy='Send a list of {"name": ..., "idx": ...}, one entry for each voxel value.',
    )
