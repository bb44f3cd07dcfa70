"""What an annotator asked: clicks and a box, in voxels of the image as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from samadapt.errors import InputError

Voxel = tuple[int, int, int]


@dataclass(frozen=True)
class Prompts:
    """Clicks and a box on one object.

    Attributes:
        foreground: (i,j,k) inside the object, in the order in which they were clicked.
        background: (i,j,k) outside it.
        box: (i0,i1,j0,j1,k0,k1), both ends inside; each pair in any order.
    """

    foreground: Sequence[Voxel] = field(default_factory=list)
    background: Sequence[Voxel] = field(default_factory=list)
    box: Sequence[int] | None = None

    def checked(self, shape: tuple[int, int, int]) -> Prompts:
        """The same with whole numbers and an ordered box.

        Raises:
            InputError: neither a foreground click nor a box, something outside a volume of ``shape``, or a foreground
                click outside the box.
        """
        foreground = [_voxel(point, shape, "foreground") for point in self.foreground]
        background = [_voxel(point, shape, "background") for point in self.background]
        box = None if self.box is None else _box(self.box, shape)
        if not foreground and box is None:
            raise InputError(
                "there is no click inside the object and no box",
                where="foreground",
                remedy="Click inside the object, or draw a box (roi) around it.",
            )
        if box is not None:
            _refuse_outside(foreground, box)
        return Prompts(foreground, background, box)


def _refuse_outside(foreground: Sequence[Voxel], box: Sequence[int]) -> None:
    for voxel in foreground:
        if not all(box[2 * axis] <= voxel[axis] <= box[2 * axis + 1] for axis in range(3)):
            raise InputError(
                f"the click {voxel} lies outside the box {tuple(box)}",
                where="foreground",
                remedy="Move the click, enlarge the box (roi), or leave one of them out.",
            )


def _voxel(point: Sequence[float], shape: tuple[int, int, int], where: str) -> Voxel:
    if len(point) != 3:
        raise InputError(f"a click has three numbers (i, j, k), not {list(point)}", where=where)
    i, j, k = (round(float(value)) for value in point)
    if not all(0 <= value < side for value, side in zip((i, j, k), shape, strict=True)):
        raise InputError(
            f"the click ({i}, {j}, {k}) lies outside the volume of {shape[0]}x{shape[1]}x{shape[2]} voxels", where=where
        )
    return i, j, k


def _box(box: Sequence[float], shape: tuple[int, int, int]) -> tuple[int, ...]:
    if len(box) != 6:
        raise InputError(f"a box has six numbers (i0, i1, j0, j1, k0, k1), not {list(box)}", where="roi")
    ordered: list[int] = []
    for axis, side in enumerate(shape):
        low, high = sorted(round(float(value)) for value in box[2 * axis : 2 * axis + 2])
        if high < 0 or low >= side:
            raise InputError(f"the box {list(box)} lies outside the volume of {shape} voxels", where="roi")
        ordered += [max(low, 0), min(high, side - 1)]
    return tuple(ordered)
