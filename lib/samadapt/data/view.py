"""One volume as a model sees it: turned upright, windowed, slice by slice in the model frame."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from samadapt.data.geometry import turn_to_lps
from samadapt.data.slices import SliceFrame, slice_count, slice_stack
from samadapt.data.volume import Volume
from samadapt.data.window import Window, default_window

LEVELS = 255
"""A model sees so many steps of grey or colour: what training keeps on disk, and what SAM models were trained on."""


def view_key(digest: str, window: Window, context: int, size: int, axis: int) -> str:
    """Hex name of all slices that a model sees of one image; the same slices have the same name in every process.

    Args:
        digest: ``Volume.digest``.
        window: intensity window.
        context: see ``ModelInfo.context``.
        size: S, side of the model frame in pixels.
        axis: the axis of the image turned to LPS that slices are taken across.
    """
    parts = [digest, window.to_dict(), context, size, axis]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class ModelView:
    """Slices of a volume along its acquisition plane, ready for ``AdaptedModel.embed``.

    Args:
        volume: the image.
        window: the model's intensity window; None takes the volume's default.
        context: see ``ModelInfo.context``.
        size: S, side of the model frame in pixels.
        native_axis: take slices across this axis of the volume as stored; None takes the acquisition axis.

    Attributes:
        turn: from the native grid to the grid of the slices, and back.
        axis: the axis of the turned grid that slices are taken across.
        frame: maps one slice of the turned grid to the model frame, and back.
        key: see ``view_key``.
    """

    def __init__(
        self, volume: Volume, window: Window | None, context: int, size: int, native_axis: int | None = None
    ) -> None:
        self.turn = turn_to_lps(volume.geometry)
        turned = self.turn.turned
        self.axis = turned.acquisition_axis if native_axis is None else int(self.turn.steps[native_axis][0])
        self.frame = SliceFrame.of(turned, self.axis, size)
        self._context = context
        window = window or default_window(volume)
        self._array = window.apply(self.turn.forward(volume.array))
        self.key = view_key(volume.digest, window, context, size, self.axis)

    def __len__(self) -> int:
        """Number of slices."""
        return slice_count(self._array.shape, self.axis)

    def image(self, index: int) -> Tensor:
        """(3,S,S) float32 in [0,1], in steps of 1 / ``LEVELS``."""
        image = self.frame.to_model(slice_stack(self._array, self.axis, index, self._context))
        return (image.clamp(0, 1) * LEVELS).round() / LEVELS

    def images(self, indices: Sequence[int]) -> Tensor:
        """(N,3,S,S) float32 in [0,1]."""
        return torch.stack([self.image(index) for index in indices])
