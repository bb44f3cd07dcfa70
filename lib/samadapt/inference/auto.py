"""Automatic segmentation: every slice, every class, no prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from samadapt.data.slice_cache import SliceCache
from samadapt.data.slices import put_slice
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.encoding import SliceEncoder
from samadapt.errors import InputError
from samadapt.model import AdaptedModel

BATCH_PIXELS = 16 * 128 * 128
"""Pixels of one encoder batch: about 1 GB of activations with LiteMedSAM."""


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
    if not model.info.trained:
        return np.zeros(volume.geometry.shape, dtype=np.uint8)
    info = model.info
    view = ModelView(volume, info.window, info.context, info.image_size)
    result = np.zeros(view.turn.turned.shape, dtype=np.uint8)
    batch = max(1, BATCH_PIXELS // info.image_size**2)
    encoder = SliceEncoder(model, cache)
    with torch.inference_mode():
        for start in range(0, len(view), batch):
            indices = range(start, min(start + batch, len(view)))
            logits = model.class_logits(encoder.embeddings(view, indices))
            for index, slice_logits in zip(indices, logits, strict=True):
                found = view.frame.logits_to_native(slice_logits).argmax(dim=0)
                put_slice(result, view.axis, index, kept[found.cpu().numpy()])
            if progress:
                progress(indices.stop, len(view))
    return np.ascontiguousarray(view.turn.back(result))


def _kept(model: AdaptedModel, classes: Sequence[str] | None) -> np.ndarray:
    """uint8 (K+1,): each class index, or 0 for the classes that were not asked for."""
    names = model.info.labels.names
    if unknown := [name for name in classes or () if name not in names]:
        raise InputError(
            f"the model has no label {unknown[0]!r}", where="classes", remedy=f"It has: {', '.join(names)}."
        )
    wanted = names if classes is None else classes
    return np.array([0] + [n if name in wanted else 0 for n, name in enumerate(names, start=1)], dtype=np.uint8)
