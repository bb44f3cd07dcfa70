"""One object by clicks or a box: in a slice, or carried through the volume.

LiteMedSAM was trained on boxes alone and answers a bare click with nothing. A click therefore becomes a ladder of
square boxes of growing size around it, decoded in one batch; each answer's own tight box is decoded again, and the
model's own predicted IoU ranks what comes out of that. Clicks that the result does not obey are mended locally, so
that a correction never throws away what was right elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from samadapt.data.slice_cache import SliceCache
from samadapt.data.slices import put_slice, take_slice, voxel_to_pixel
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.encoding import SliceEncoder
from samadapt.errors import InputError
from samadapt.inference.prompts import Prompts, Voxel
from samadapt.model import AdaptedModel

__all__ = ["Prompts", "segment_object", "segment_slice"]

LADDER = tuple(np.geomspace(6, 110, 11) / 256)
"""Half-sides of the boxes around a click, in parts of the model frame."""

CORRECTION = (1.0, 1.5, 2.25)
"""Half-sides of the boxes around a correcting click, in depths of the error there."""

INSIDE, OUTSIDE = 1, 0

SMALLEST_PATCH = 5
"""Depth of an error, in cells of the mask, from which the model is asked what it is; slimmer ones are drawn."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Answers = tuple[Tensor, Tensor]
T = TypeVar("T")

REMEMBERED_VIEWS, REMEMBERED_SLICES, REMEMBERED_ANSWERS = 2, 64, 96
"""How much stays in memory: volumes, embeddings of each, and answers, which every further click on a slice needs again
(the first click's, and at most three fields for each correction)."""

LEAST_IOU, LEAST_OVERLAP = 0.5, 0.4
AREA_CHANGE = (0.35, 2.2)
"""A neighbouring slice continues the object if the model's predicted IoU, the overlap (IoU) with the slice before and
the change of the area stay within these."""


def segment_slice(
    model: AdaptedModel, volume: Volume, axis: int, index: int, prompts: Prompts, cache: SliceCache | None = None
) -> np.ndarray:
    """Segment the object in one slice.

    Args:
        model: plain or trained.
        volume: the image.
        axis: axis of the volume as stored that the slice is taken across.
        index: which slice; clicks on other slices are left out.
        prompts: clicks and box, voxels of the volume as stored.
        cache: where embeddings are looked up and kept; the slices used last stay in memory anyway.

    Returns:
        bool (H,W), as ``samadapt.data.slices.take_slice`` cuts the volume.

    Raises:
        InputError: a prompt outside the volume, or none that concerns this slice.
    """
    prompts = prompts.checked(volume.geometry.shape)
    if not 0 <= index < volume.geometry.shape[axis]:
        raise InputError(f"slice {index} lies outside the volume", where="slice")
    scene = _Scene.of(model, volume, axis, cache)
    clicks = scene.clicks(prompts, scene.turned_index(index))
    if clicks.box is None and not clicks.inside:
        raise InputError(
            f"no click inside the object lies on slice {index}",
            where="foreground",
            remedy="Click on this slice, or use the 3D model.",
        )
    turned = np.zeros(scene.view.turn.turned.shape, dtype=bool)
    put_slice(turned, scene.view.axis, clicks.index, scene.native(scene.segment(clicks)))
    result = np.ascontiguousarray(scene.view.turn.back(turned))
    _obey(result, [v for v in prompts.foreground if v[axis] == index], prompts.background)
    return np.ascontiguousarray(take_slice(result, axis, index))


def segment_object(
    model: AdaptedModel, volume: Volume, prompts: Prompts, cache: SliceCache | None = None
) -> np.ndarray:
    """Segment the object on the clicked slices and carry it to their neighbours until it ends.

    A box bounds the object along all three axes; without a click it starts in the middle of the box.

    Returns:
        bool (I,J,K) on the volume's own grid.

    Raises:
        InputError: a prompt outside the volume, or neither a foreground click nor a box.
    """
    prompts = prompts.checked(volume.geometry.shape)
    scene = _Scene.of(model, volume, None, cache)
    first, last = scene.reach(prompts)
    result = np.zeros(scene.view.turn.turned.shape, dtype=bool)
    fields: dict[int, Tensor] = {}
    for index in scene.starts(prompts):
        fields[index] = scene.segment(scene.clicks(prompts, index))
    starts = sorted(fields)
    for direction in (-1, 1):
        for start in starts:
            scene.carry(fields, start, direction, first, last, prompts)
    for index, found in fields.items():
        put_slice(result, scene.view.axis, index, scene.native(found))
    result = np.ascontiguousarray(scene.view.turn.back(result))
    _obey(result, prompts.foreground, prompts.background)
    if prompts.box is not None:
        i0, i1, j0, j1, k0, k1 = prompts.box
        bounded = np.zeros_like(result)
        bounded[i0 : i1 + 1, j0 : j1 + 1, k0 : k1 + 1] = result[i0 : i1 + 1, j0 : j1 + 1, k0 : k1 + 1]
        return bounded
    return result


@dataclass(frozen=True)
class _Clicks:
    """Prompts on slice ``index`` of the turned grid, in pixels (x, y) of the model frame."""

    index: int
    inside: list[Point]
    outside: list[Point]
    box: Box | None = None


class _Scene:
    """A volume before a model: slices embedded once, prompts decoded. Masks are logit fields (m,m) of the frame."""

    _recent: ClassVar[OrderedDict[tuple[int, int, int | None], _Scene]] = OrderedDict()

    def __init__(self, model: AdaptedModel, volume: Volume, axis: int | None, cache: SliceCache | None) -> None:
        info = model.info
        self._model = model
        self._encoder = SliceEncoder(model, cache)
        self._volume = volume
        self.view = ModelView(volume, info.window, info.context, info.image_size, axis)
        self._native_axis = next(a for a in range(3) if int(self.view.turn.steps[a][0]) == self.view.axis)
        self._device = next(model.parameters()).device
        self._embeddings: OrderedDict[int, Tensor] = OrderedDict()
        self._answers: OrderedDict[tuple[object, ...], object] = OrderedDict()
        self._size = info.image_size
        self._cells = model.backbone.mask_size

    @classmethod
    def of(cls, model: AdaptedModel, volume: Volume, axis: int | None, cache: SliceCache | None) -> _Scene:
        """The scene of before if model and volume are the same objects, so that corrections do not encode again."""
        key = (id(model), id(volume), axis)
        scene = cls._recent.pop(key, None) or cls(model, volume, axis, cache)
        cls._recent[key] = scene
        while len(cls._recent) > REMEMBERED_VIEWS:
            cls._recent.popitem(last=False)
        return scene

    # ---- from voxels to the frame and back

    def turned_index(self, index: int) -> int:
        voxel = [0, 0, 0]
        voxel[self._native_axis] = index
        return int(self.view.turn.voxels_forward([voxel])[0][self.view.axis])

    def native(self, found: Tensor) -> np.ndarray:
        """Field -> bool (H,W) of the turned grid."""
        return (self.view.frame.logits_to_native(found[None])[0] > 0).cpu().numpy()

    def clicks(self, prompts: Prompts, index: int) -> _Clicks:
        """What ``prompts`` say about slice ``index`` of the turned grid."""
        box = None
        if prompts.box is not None:
            corners = self._pixels([prompts.box[0::2], prompts.box[1::2]])
            low, high = corners.min(axis=0), corners.max(axis=0)
            if low[0] <= index <= high[0]:
                x0, y0, x1, y1 = self.view.frame.boxes_to_model([[*low[1:], *high[1:]]])[0].tolist()
                box = (x0, y0, x1, y1)
        return _Clicks(index, self._on(prompts.foreground, index), self._on(prompts.background, index), box)

    def starts(self, prompts: Prompts) -> list[int]:
        """Slices that are segmented from the prompts themselves."""
        clicked = {int(pixel[0]) for pixel in self._pixels(prompts.foreground)} if prompts.foreground else set()
        if clicked:
            return sorted(clicked)
        assert prompts.box is not None
        corners = self._pixels([prompts.box[0::2], prompts.box[1::2]])[:, 0]
        return [round(float(corners.mean()))]

    def reach(self, prompts: Prompts) -> tuple[int, int]:
        """First and last slice that the object may lie on."""
        if prompts.box is None:
            return 0, len(self.view) - 1
        corners = self._pixels([prompts.box[0::2], prompts.box[1::2]])[:, 0]
        return int(corners.min()), int(corners.max())

    def _pixels(self, voxels: Sequence[Voxel] | Sequence[Sequence[int]]) -> np.ndarray:
        """(N,3) slice index, row, column on the turned grid."""
        turned = self.view.turn.voxels_forward(voxels)
        return np.array([voxel_to_pixel(voxel, self.view.axis) for voxel in turned])

    def _on(self, voxels: Sequence[Voxel], index: int) -> list[Point]:
        here = [pixel[1:] for pixel in self._pixels(voxels) if int(pixel[0]) == index] if voxels else []
        return [(float(x), float(y)) for x, y in self.view.frame.points_to_model(here)] if here else []

    # ---- one slice

    def segment(self, clicks: _Clicks) -> Tensor:
        """Field for the prompts of one slice."""
        index, box = clicks.index, clicks.box
        if box is not None:
            found = self._best([box], clicks)[0]
        else:
            first = clicks.inside[0]
            found = self._remember(("ladder", index, first), lambda: self._from_click(index, first))
        return self._mended(found, clicks)

    def _from_click(self, index: int, first: Point) -> Tensor:
        """The ladder around the first click, each answer decoded again from its own box; the best of the second."""
        start = _Clicks(index, [first], [])
        ladder = self._boxes_around(first, np.multiply(LADDER, self._size))
        answers = self._decode(ladder, start)
        parts = [self._part(field, first) for field in answers[0]]
        tight = {box: None for part in parts if (box := self._box_of(part)) is not None}
        return self._pick(self._decode(list(tight), start) if tight else answers, start)[0]

    def _boxes_around(self, click: Point, halves: np.ndarray) -> list[Box]:
        return [self._cut((click[0] - h, click[1] - h, click[0] + h, click[1] + h)) for h in halves]

    def _cut(self, box: Box) -> Box:
        height, width = self.view.frame.content
        x0, y0 = max(0.0, box[0]), max(0.0, box[1])
        return x0, y0, max(x0 + 1, min(width - 1.0, box[2])), max(y0 + 1, min(height - 1.0, box[3]))

    def _best(self, boxes: list[Box], clicks: _Clicks) -> tuple[Tensor, float]:
        """The best candidate of all boxes, and its predicted IoU."""
        return self._pick(self._answer(boxes, clicks), clicks)

    def _pick(self, answers: Answers, clicks: _Clicks) -> tuple[Tensor, float]:
        """The candidate with the highest predicted IoU among those that hold the clicks inside."""
        fields, ious = answers
        obeying = torch.tensor([all(self._has(f, c) for c in clicks.inside) for f in fields], device=ious.device)
        best = int((ious + obeying.float()).argmax())
        return fields[best].clone(), float(ious[best])  # a view would keep all fields in memory

    def _answer(self, boxes: list[Box], clicks: _Clicks) -> Answers:
        """What ``_decode`` gives, or gave before. Only a model that was trained on clicks is shown them."""
        shown = (clicks.index, *boxes, *((*clicks.inside, None, *clicks.outside) if self._model.info.trained else ()))
        return self._remember(shown, lambda: self._decode(boxes, clicks))

    def _remember(self, question: tuple[object, ...], answer: Callable[[], T]) -> T:
        """``answer()``, or what it was when the same question came before."""
        if question not in self._answers:
            self._answers[question] = answer()
            if len(self._answers) > REMEMBERED_ANSWERS:
                self._answers.popitem(last=False)
        self._answers.move_to_end(question)
        return cast(T, self._answers[question])

    def _decode(self, boxes: list[Box], clicks: _Clicks) -> Answers:
        """Fields (N,m,m) and predicted IoU (N,)."""
        points = labels = None
        if self._model.info.trained and (clicks.inside or clicks.outside):
            xy = torch.tensor([*clicks.inside, *clicks.outside], dtype=torch.float32, device=self._device)
            kinds = torch.tensor([INSIDE] * len(clicks.inside) + [OUTSIDE] * len(clicks.outside), device=self._device)
            points, labels = xy.expand(len(boxes), -1, -1), kinds.expand(len(boxes), -1)
        tensor = torch.tensor(boxes, dtype=torch.float32, device=self._device)
        with torch.inference_mode():
            masks, iou = self._model.prompt_masks(self._embedding(clicks.index), points, labels, tensor)
        return masks[:, 0].float().cpu(), iou[:, 0].float().cpu()

    def _embedding(self, index: int) -> Tensor:
        if index not in self._embeddings:
            self._embeddings[index] = self._encoder.embeddings(self.view, [index])
            if len(self._embeddings) > REMEMBERED_SLICES:
                self._embeddings.popitem(last=False)
        return self._embeddings[index]

    # ---- corrections

    def _mended(self, found: Tensor, clicks: _Clicks) -> Tensor:
        """Add what a click inside still lacks, take away what a click outside still has; last word to the clicks."""
        for click in clicks.inside:
            if not self._has(found, click):
                patch = self._patch(clicks.index, found, click, clicks.outside)
                found = torch.where(patch, found.abs().clamp(min=1), found)
        for click in clicks.outside:
            if self._has(found, click):
                patch = self._patch(clicks.index, found, click, clicks.inside)
                found = torch.where(patch, -found.abs().clamp(min=1), found)
        return found

    def _patch(self, index: int, found: Tensor, click: Point, opposite: list[Point]) -> Tensor:
        """bool (m,m): what a correction at ``click`` changes.

        Only pixels on the click's side of the mask's border, nearer to it than to any opposite click. A large error is
        what the model sees there as one thing; a small one, or one it does not see, is the disc up to the border.
        """
        row, column = self._cell(click)
        value = bool(found[row, column] > 0)
        same_side = ((found > 0) == value).numpy()
        depth = float(ndimage.distance_transform_edt(np.pad(same_side, 1))[row + 1, column + 1])
        distance = self._distance(click)
        free = same_side
        for other in opposite:
            free = free & (distance < self._distance(other))
        disc = free & (distance <= max(1.0, depth))
        chosen = disc
        if depth >= SMALLEST_PATCH:
            halves = np.multiply(CORRECTION, depth * self._size / self._cells)
            fields, ious = self._answer(self._boxes_around(click, halves), _Clicks(index, [click], []))
            own = free & (distance <= 2.5 * depth)
            parts = [(float(iou), self._part(f, click) & own) for f, iou in zip(fields, ious, strict=True)]
            fitting = [(iou, part) for iou, part in parts if part.sum() >= 0.5 * disc.sum()]
            chosen = max(fitting, key=lambda pair: pair[0])[1] if fitting else disc
        chosen = chosen | (disc & (distance <= max(1.0, 0.7 * depth)))
        chosen[row, column] = True
        return torch.from_numpy(chosen)

    def _part(self, found: Tensor, click: Point) -> np.ndarray:
        """bool (m,m): the connected part of a field's mask that holds ``click``; empty if none does."""
        parts, _ = ndimage.label((found > 0).numpy())
        row, column = self._cell(click)
        return (parts == parts[row, column]) & (parts > 0)

    def _has(self, found: Tensor, click: Point) -> bool:
        row, column = self._cell(click)
        return bool(found[row, column] > 0)

    def _cell(self, click: Point) -> tuple[int, int]:
        """(row, column) of the field's cell that holds a point of the frame."""
        scale = self._cells / self._size
        x, y = (int(min(max((value + 0.5) * scale, 0), self._cells - 1)) for value in click)
        return y, x

    def _distance(self, click: Point) -> np.ndarray:
        """(m,m) distance of each cell from a click, in cells."""
        row, column = self._cell(click)
        rows, columns = np.ogrid[: self._cells, : self._cells]
        return np.hypot(rows - row, columns - column)

    def _box_of(self, part: np.ndarray) -> Box | None:
        if not part.any():
            return None
        scale = self._size / self._cells
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        low = (columns[0] * scale, rows[0] * scale)
        return self._cut((*low, (columns[-1] + 1) * scale - 1, (rows[-1] + 1) * scale - 1))

    # ---- through the volume

    def carry(
        self, fields: dict[int, Tensor], start: int, direction: int, first: int, last: int, prompts: Prompts
    ) -> None:
        """Continue the object of slice ``start`` in one direction, into ``fields``, until it ends or meets a slice."""
        before = (fields[start] > 0).numpy()
        index = start + direction
        while first <= index <= last and index not in fields:
            box = self._box_of(before)
            if box is None:
                return
            clicks = self.clicks(prompts, index)
            found, iou = self._best(self._around(box), _Clicks(index, [], []))
            kept = _touching((found > 0).numpy(), before)
            if iou < LEAST_IOU or not _continues(kept, before):
                return
            found = self._mended(torch.where(torch.from_numpy(kept), found, -found.abs()), clicks)
            fields[index] = found
            before = (found > 0).numpy()
            index += direction

    def _around(self, box: Box) -> list[Box]:
        """The box of the slice before, a little smaller, and a little larger."""
        width, height = box[2] - box[0], box[3] - box[1]
        grown = [(part * width, part * height) for part in (-0.08, 0.0, 0.06)]
        return [self._cut((box[0] - x, box[1] - y, box[2] + x, box[3] + y)) for x, y in grown]


def _obey(mask: np.ndarray, foreground: Sequence[Voxel], background: Sequence[Voxel]) -> None:
    """The clicked voxels themselves, in place: between the field's cells a correction can get lost."""
    for voxels, value in ((foreground, True), (background, False)):
        for voxel in voxels:
            mask[voxel] = value


def _touching(mask: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The connected parts of ``mask`` that overlap ``before``."""
    parts, _ = ndimage.label(mask)
    return np.isin(parts, np.setdiff1d(np.unique(parts[before]), [0]))


def _continues(mask: np.ndarray, before: np.ndarray) -> bool:
    """Whether ``mask`` may be the same object one slice on."""
    union = (mask | before).sum()
    overlap = (mask & before).sum() / union if union else 0.0
    change = mask.sum() / max(1, before.sum())
    return bool(overlap >= LEAST_OVERLAP and AREA_CHANGE[0] <= change <= AREA_CHANGE[1])
