"""From a volume to the 2D images that a model sees, and back.

A slice across ``axis`` has the later of the two remaining axes as its rows and the earlier as its columns, so that
2D images (i = column x, j = row y) come upright:

==== ====== =========
axis rows H columns W
==== ====== =========
2    j      i
1    k      i
0    k      j
==== ====== =========
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from samadapt.data.geometry import Geometry
from samadapt.data.labels import ArrayOrTensor, resize_label
from samadapt.errors import InputError

_ROWS = (2, 2, 1)
_COLUMNS = (1, 0, 0)


@dataclass(frozen=True)
class SliceFrame:
    """Places one native slice into the model's square frame, and results back.

    The slice is scaled so that a frame pixel is square in millimetres and the longer side fills the frame; the rest,
    at the right or bottom, is padding. Points are pixel indices, whole numbers at pixel centres, fractions allowed.

    Args:
        height: H, native rows.
        width: W, native columns.
        spacing: millimetres between rows, between columns.
        size: S, the frame's side in pixels.

    Raises:
        InputError: a side or spacing that is not positive.
    """

    height: int
    width: int
    spacing: tuple[float, float]
    size: int

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.size) < 1 or not min(self.spacing) > 0:
            raise InputError(
                f"no frame of {self.size} px for a slice of {self.height}x{self.width} px, spacing {self.spacing} mm"
            )

    @classmethod
    def of(cls, geometry: Geometry, axis: int, size: int) -> SliceFrame:
        """The frame of the slices of ``geometry`` across ``axis``."""
        rows, columns = _ROWS[axis], _COLUMNS[axis]
        spacing = geometry.spacing[rows], geometry.spacing[columns]
        return cls(geometry.shape[rows], geometry.shape[columns], spacing, size)

    @property
    def content(self) -> tuple[int, int]:
        """(h, w): the part of the frame, from its top left, that the slice fills; the rest is padding."""
        extent = self.height * self.spacing[0], self.width * self.spacing[1]
        scale = self.size / max(extent)
        h, w = (min(self.size, max(1, round(side * scale))) for side in extent)
        return h, w

    def to_model(self, image: Tensor) -> Tensor:
        """(C, H, W) float -> (C, S, S): bilinear, smoothed where it shrinks; padding is 0."""
        h, w = self.content
        resized = F.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False, antialias=True)[0]
        return F.pad(resized, (0, self.size - w, 0, self.size - h))

    def mask_to_model(self, mask: ArrayOrTensor, padding: int = 0) -> ArrayOrTensor:
        """(H, W) whole numbers -> (S, S), nearest; ``padding`` is the value outside the slice."""
        h, w = self.content
        resized = resize_label(mask, (h, w))
        if isinstance(resized, Tensor):
            return F.pad(resized, (0, self.size - w, 0, self.size - h), value=padding)
        return np.pad(resized, ((0, self.size - h), (0, self.size - w)), constant_values=padding)

    def points_to_model(self, points: Tensor | np.ndarray | Sequence[Sequence[float]]) -> Tensor:
        """(N, 2) native (row, column) -> (N, 2) float32 frame (x, y)."""
        native = torch.as_tensor(np.asarray(points, dtype=np.float32)).reshape(-1, 2)
        h, w = self.content
        scale = torch.tensor([h / self.height, w / self.width])
        return ((native + 0.5) * scale - 0.5).flip(-1)

    def boxes_to_model(self, boxes: Tensor | np.ndarray | Sequence[Sequence[float]]) -> Tensor:
        """(N, 4) native (row, column) of the first and the last pixel inside -> (N, 4) float32 frame (x0, y0, x1, y1).

        Both ends are pixel centres, as SAM's boxes are.
        """
        native = np.asarray(boxes, dtype=np.float32).reshape(-1, 2)
        return self.points_to_model(native).reshape(-1, 4)

    def points_to_native(self, points: Tensor) -> Tensor:
        """(N, 2) frame (x, y) -> (N, 2) float32 native (row, column): the inverse of :meth:`points_to_model`."""
        h, w = self.content
        scale = torch.tensor([self.height / h, self.width / w])
        return (points.reshape(-1, 2).float().flip(-1) + 0.5) * scale - 0.5

    def logits_to_native(self, logits: Tensor) -> Tensor:
        """(C, h, w), finite, that covers the whole frame at any resolution -> (C, H, W) float32, bilinear.

        Cells of the padding never reach the slice: positions are clamped to the last cell inside the content.
        """
        content_h, content_w = self.content
        rows = _interpolation(self._positions(self.height, content_h, logits.shape[-2]), logits.shape[-2])
        columns = _interpolation(self._positions(self.width, content_w, logits.shape[-1]), logits.shape[-1])
        return (rows.to(logits.device) @ logits.float()) @ columns.to(logits.device).T

    def _positions(self, native: int, content: int, cells: int) -> Tensor:
        """Where the centres of ``native`` pixels lie among ``cells`` cells that cover the frame."""
        inside = max(1.0, content * cells / self.size)
        centres = (torch.arange(native, dtype=torch.float64) + 0.5) * (content / native) * (cells / self.size) - 0.5
        return centres.clamp(0.0, float(int(inside + 1e-6) - 1))


def slice_count(shape: Sequence[int], axis: int) -> int:
    """Number of slices across ``axis`` of an array (..., I, J, K)."""
    return shape[len(shape) - 3 + axis]


def voxel_to_pixel(voxel: Sequence[float], axis: int) -> tuple[float, float, float]:
    """(i, j, k) -> (slice index, row, column) of the slices across ``axis``."""
    return voxel[axis], voxel[_ROWS[axis]], voxel[_COLUMNS[axis]]


def pixel_to_voxel(index: float, row: float, column: float, axis: int) -> tuple[float, float, float]:
    """(slice index, row, column) -> (i, j, k): the inverse of :func:`voxel_to_pixel`."""
    voxel = [0.0, 0.0, 0.0]
    voxel[axis], voxel[_ROWS[axis]], voxel[_COLUMNS[axis]] = index, row, column
    return voxel[0], voxel[1], voxel[2]


def take_slice(mask: np.ndarray, axis: int, index: int) -> np.ndarray:
    """(I, J, K) -> slice ``index`` across ``axis``, (H, W); a view."""
    return np.moveaxis(mask, (axis, _ROWS[axis], _COLUMNS[axis]), (0, 1, 2))[index]


def put_slice(mask: np.ndarray, axis: int, index: int, slice2d: np.ndarray) -> None:
    """Write (H, W) into slice ``index`` across ``axis`` of (I, J, K), in place."""
    take_slice(mask, axis, index)[...] = slice2d


def slice_stack(array: np.ndarray, axis: int, index: int, context: int) -> Tensor:
    """What the model sees of one slice: three channels.

    Args:
        array: (C, I, J, K) in [0, 1], C = 1 or 3.
        axis: the axis that slices are taken across.
        index: which slice.
        context: distance in slices of the first and third channel from the second: 1 gives the neighbours (the edge
            slice repeated at both ends), 0 the slice three times. Colour keeps its own three channels.

    Returns:
        (3, H, W) float32.

    Raises:
        InputError: another number of channels, or a slice outside the volume.
    """
    last = slice_count(array.shape, axis) - 1
    if not 0 <= index <= last:
        raise InputError(f"slice {index} lies outside the volume: along axis {axis} it has slices 0 to {last}")
    if array.shape[0] == 3:
        channels = [take_slice(channel, axis, index) for channel in array]
    elif array.shape[0] == 1:
        neighbours = (max(0, index - context), index, min(last, index + context))
        channels = [take_slice(array[0], axis, n) for n in neighbours]
    else:
        raise InputError(f"an image has 1 or 3 channels, not {array.shape[0]}")
    return torch.from_numpy(np.stack(channels).astype(np.float32, copy=False))


def _interpolation(positions: Tensor, cells: int) -> Tensor:
    """(N, cells) weights that take values at ``cells`` to fractional ``positions`` (N,), linear between neighbours.

    A product with such a matrix is several times faster than gathering neighbours.
    """
    lower = positions.floor().long()
    weight = (positions - lower).float()
    matrix = torch.zeros(len(positions), cells)
    row = torch.arange(len(positions))
    matrix[row, lower] = 1 - weight
    matrix[row, (lower + 1).clamp(max=cells - 1)] += weight
    return matrix
