"""Which part of an image its label speaks of: some slices, some classes. The rest is unknown, not background."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from samadapt.data.labels import IGNORE, IGNORED_NAMES, LabelMap, RemapReport, remap, same_name, whole_number
from samadapt.errors import InputError

ALL, NONEMPTY, NAMED = "all", "nonempty", "named"
SLICES, CLASSES = "labelled_slices", "labelled_classes"
"""Keys of a submission's ``params``."""


@dataclass(frozen=True)
class Coverage:
    """What a label says of its own completeness.

    Attributes:
        slices: numbers, from 0 and rising, of the labelled slices across the acquisition axis of the image as stored;
            ``"nonempty"``: those in which anything is drawn; ``"all"``; None: it does not say.
        classes: names of the classes that were looked for; ``"named"``: those that its ``label_info`` names (without
            names: those that it shows); ``"all"``; None: it does not say.
    """

    slices: tuple[int, ...] | str | None = None
    classes: tuple[str, ...] | str | None = None

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Coverage:
        """From what a label was submitted with: ``labelled_slices`` and ``labelled_classes``, both optional.

        Raises:
            InputError: neither a word that is understood, nor a list of slice numbers, or of names.
        """
        return cls(_slices(info.get(SLICES)), _classes(info.get(CLASSES)))

    def or_else(self, assumed: Coverage) -> Coverage:
        """The same, with ``assumed`` where this one does not say."""
        slices = assumed.slices if self.slices is None else self.slices
        return Coverage(slices, assumed.classes if self.classes is None else self.classes)

    def left_out(self, label: np.ndarray, values: Mapping[int, str] | None, axis: int) -> np.ndarray | None:
        """The voxels that nobody has labelled.

        Args:
            label: (I,J,K) whole numbers, as submitted.
            values: value -> name; None: 255 is what is to be ignored.
            axis: the image's acquisition axis.

        Returns:
            bool (I,J,K); None where everything is labelled.

        Raises:
            InputError: a slice that the image does not have.
        """
        ignored = np.zeros_like(label, bool)
        for value in _ignored_values(values):  # np.isin takes seconds for a large volume
            ignored |= label == value
        numbers = self._numbers((label != 0) & ~ignored, axis)
        if numbers is not None:
            others = np.ones(label.shape[axis], bool)
            others[numbers] = False
            np.moveaxis(ignored, axis, 0)[others] = True
        return ignored if ignored.any() else None

    def unknown(self, labels: LabelMap, absent: tuple[str, ...]) -> tuple[str, ...]:
        """The classes of ``labels`` that nobody has looked for; ``absent`` as ``RemapReport.absent``."""
        if self.classes is None or self.classes == ALL:
            return ()
        if self.classes == NAMED:
            return absent
        known = {same_name(name) for name in self.classes}
        return tuple(name for name in labels.names if same_name(name) not in known)

    def _numbers(self, drawn: np.ndarray, axis: int) -> list[int] | None:
        """The labelled slices; None for all. ``drawn`` (I,J,K) is where the label shows anything."""
        if self.slices is None or self.slices == ALL:
            return None
        if self.slices == NONEMPTY:
            return [int(n) for n in np.flatnonzero(np.moveaxis(drawn, axis, 0).any(axis=(1, 2)))]
        count = drawn.shape[axis]
        numbers = [int(number) for number in self.slices]
        if outside := [number for number in numbers if number >= count]:
            raise InputError(
                f"there is no slice {outside[0]}",
                where=SLICES,
                remedy=f"Count from 0 to {count - 1}, across axis {axis} of the image as stored.",
            )
        return numbers


UNSAID = Coverage()


def check_nameless(present: Collection[int], where: str | None = None) -> None:
    """Refuse a mask without names that holds 0 and 255 alone.

    Drawing programs write masks so, with 255 for the structure. Without a name it means that nobody has labelled there:
    nothing would be learned from the label.

    Args:
        present: its values; 0 does not matter.
        where: for the error.

    Raises:
        InputError: it is such a mask.
    """
    if set(present) - {0} == {IGNORE}:
        raise InputError(
            f"the mask's only value is {IGNORE}, which without a name means that nobody has labelled there",
            where=where,
            remedy=f"Write 1 (the first structure) instead of {IGNORE}, or name it when you submit the label: "
            f'"label_info": [{{"name": ..., "idx": {IGNORE}}}] in params.',
        )


def remap_covered(
    label: np.ndarray, values: Mapping[int, str] | None, labels: LabelMap, coverage: Coverage, axis: int
) -> tuple[np.ndarray, RemapReport]:
    """Bring a label into the model's order, with ``IGNORE`` where nobody has labelled.

    A voxel of a class that is drawn although it is not among ``labelled_classes`` becomes background, which then may be
    any of the unknown classes.

    Args:
        label: (I,J,K) whole numbers, as submitted.
        values: value -> name; None: the model's own order.
        labels: the model's classes.
        coverage: of the label.
        axis: the image's acquisition axis.

    Returns:
        As ``remap``.

    Raises:
        InputError: as ``remap``, as ``check_nameless``, or a labelled slice that the image does not have.
    """
    mask, report = remap(label, values, labels, left_out=coverage.left_out(label, values, axis))
    if values is None and report.ignored and not report.mapped:
        check_nameless(np.unique(label).tolist())
    unknown = coverage.unknown(labels, report.absent)
    if drawn := [labels.index(name) for name in unknown if name in report.mapped]:
        mask[np.isin(mask, drawn)] = 0
    mapped = {name: count for name, count in report.mapped.items() if name not in unknown}
    slices = _counted(mask, report, axis)
    return mask, dataclasses.replace(report, mapped=mapped, unknown=unknown, slices=slices)


def labelled_slices(left_out: np.ndarray | None, shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """How many slices across ``axis`` have a labelled voxel, of how many; ``left_out`` as ``Coverage.left_out``."""
    if left_out is None:
        return shape[axis], shape[axis]
    return int((~np.moveaxis(left_out, axis, 0)).any(axis=(1, 2)).sum()), shape[axis]


def _counted(mask: np.ndarray, report: RemapReport, axis: int) -> tuple[int, int] | None:
    return labelled_slices(mask == IGNORE, mask.shape, axis) if report.ignored else None


def _ignored_values(values: Mapping[int, str] | None) -> list[int]:
    return [IGNORE] if values is None else [n for n, name in values.items() if same_name(name) in IGNORED_NAMES]


def _slices(value: Any) -> tuple[int, ...] | str | None:
    if value is None or value in (ALL, NONEMPTY):
        return value
    numbers = [whole_number(item) for item in value] if isinstance(value, list | tuple) else []
    if not numbers or any(number is None or number < 0 for number in numbers):
        raise InputError(
            f"{value!r} names no slices",
            where=SLICES,
            remedy=f'Send a list of slice numbers that count from 0, "{NONEMPTY}" or "{ALL}".',
        )
    return tuple(sorted({number for number in numbers if number is not None}))


def _classes(value: Any) -> tuple[str, ...] | str | None:
    if value is None or value in (ALL, NAMED):
        return value
    names = list(value) if isinstance(value, list | tuple) else []
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(
            f"{value!r} names no classes",
            where=CLASSES,
            remedy=f'Send a list of the names that were looked for, "{NAMED}" or "{ALL}".',
        )
    return tuple(" ".join(name.split()) for name in names)
