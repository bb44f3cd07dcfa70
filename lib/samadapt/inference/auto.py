"""Automatic segmentation: every slice, every class, no prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from samadapt.data.geometry import Geometry, turn_to_lps
from samadapt.data.slice_cache import SliceCache
from samadapt.data.slices import put_slice, take_slice
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.encoding import SliceEncoder
from samadapt.errors import InputError
from samadapt.model import AdaptedModel, ModelInfo

BATCH_PIXELS = {"cpu": 4 * 128 * 128, "cuda": 64 * 128 * 128}
"""Pixels of one encoder batch by device. On a CPU larger ones are no faster and take memory: about 0.3 GiB of
activations with LiteMedSAM, so that measuring long volumes takes no more than training does."""

LARGEST_VOTES = 4 * 2**30
"""Bytes beyond which several planes are not averaged: what they say of every voxel and class is in memory at once."""


def segment(
    model: AdaptedModel,
    volume: Volume,
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: SliceCache | None = None,
) -> np.ndarray:
    """Segment a whole volume.

    Args:
        model: a trained model; an untrained one finds nothing.
        volume: the image.
        classes: names of the classes to keep; None keeps all. Voxels of other classes become background.
        progress: called with (slices done, slices in all).
        cache: where embeddings are looked up and kept.

    Returns:
        uint8 (I,J,K) on the volume's own grid: 0 background, n for ``model.info.labels.names[n - 1]``.

    Raises:
        InputError: a name that the model does not have.
    """
    kept = _kept(model, classes)
    turn = turn_to_lps(volume.geometry)
    result = np.zeros(turn.turned.shape, dtype=np.uint8)
    if model.info.trained:
        for axis, index, shares in class_shares(model, volume, cache, progress):
            put_slice(result, axis, index, kept[shares.argmax(axis=0)])
    return np.ascontiguousarray(turn.back(result))


def axes_seen(info: ModelInfo, geometry: Geometry) -> tuple[int, ...]:
    """The axes that a model looks at a volume along: fewer than ``ModelInfo.planes`` says where votes would be too
    large."""
    axes = geometry.slice_axes(info.planes)
    votes = 2 * (1 + len(info.labels)) * math.prod(geometry.shape)
    return axes[:1] if votes > LARGEST_VOTES else axes


class _Counted:
    """Tells how many slices of all planes are done."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress = progress
        self._done = 0
        self._total = total

    def one_more(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)


def class_shares(
    model: AdaptedModel, volume: Volume, cache: SliceCache | None, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """What a model says of every slice across the acquisition axis.

    Yields:
        The axis and index of the slice on the grid turned to LPS (``turn_to_lps``), and the probability 0..1 of each
        class in each of its pixels, background first: float32 (K+1,H,W).
    """
    info = model.info
    axes = axes_seen(info, volume.geometry)
    counted = _Counted(progress, volume.geometry.slices(axes))
    views = (ModelView(volume, info.window, info.context, info.image_size, axis) for axis in axes)
    with torch.inference_mode():
        if len(axes) == 1:
            view = next(views)
            for index, shares in _shares(model, view, cache, counted):
                yield view.axis, index, shares
        else:
            axis = int(turn_to_lps(volume.geometry).steps[axes[0]][0])
            votes = _votes(model, views, cache, counted)
            for index in range(votes.shape[1 + axis]):
                yield axis, index, np.stack([take_slice(one, axis, index) for one in votes]).astype(np.float32)


def _votes(model: AdaptedModel, views: Iterator[ModelView], cache: SliceCache | None, counted: _Counted) -> np.ndarray:
    """float16 (K+1,I,J,K) on the turned grid: the mean over planes of what each says of every voxel and class."""
    votes: np.ndarray | None = None
    planes = 0
    for view in views:
        planes += 1
        if votes is None:
            votes = np.zeros((1 + len(model.info.labels), *view.turn.turned.shape), dtype=np.float16)
        for index, shares in _shares(model, view, cache, counted):
            for sum_of_votes, share in zip(votes, shares, strict=True):
                take_slice(sum_of_votes, view.axis, index)[...] += share
    assert votes is not None
    votes /= planes
    return votes


def _shares(
    model: AdaptedModel, view: ModelView, cache: SliceCache | None, counted: _Counted
) -> Iterator[tuple[int, np.ndarray]]:
    """Each slice's number and class probabilities (K+1,H,W) at its own resolution."""
    for index, logits in _logits(model, view, cache):
        yield index, logits.softmax(dim=0).cpu().numpy()
        counted.one_more()


def _logits(model: AdaptedModel, view: ModelView, cache: SliceCache | None) -> Iterator[tuple[int, torch.Tensor]]:
    """Each slice's number and class logits (K+1,H,W) at its own resolution."""
    device = next(model.parameters()).device
    batch = max(1, BATCH_PIXELS.get(device.type, BATCH_PIXELS["cpu"]) // model.info.image_size**2)
    encoder = SliceEncoder(model, cache)
    for start in range(0, len(view), batch):
        indices = range(start, min(start + batch, len(view)))
        for index, logits in zip(indices, model.class_logits(encoder.embeddings(view, indices)), strict=True):
            yield index, view.frame.logits_to_native(logits)


def _kept(model: AdaptedModel, classes: Sequence[str] | None) -> np.ndarray:
    """uint8 (K+1,): each class index, or 0 for the classes that were not asked for."""
    names = model.info.labels.names
    if unknown := [name for name in classes or () if name not in names]:
        raise InputError(
            f"the model has no label {unknown[0]!r}", where="classes", remedy=f"It has: {', '.join(names)}."
        )
    wanted = names if classes is None else classes
    return np.array([0] + [n if name in wanted else 0 for n, name in enumerate(names, start=1)], dtype=np.uint8)
