"""Encoding slices before anybody asks for them."""

from __future__ import annotations

from collections.abc import Callable

from samadapt.data.slice_cache import SliceCache
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.encoding import SliceEncoder
from samadapt.inference.auto import axes_seen
from samadapt.model import AdaptedModel


def embed_volume(
    model: AdaptedModel,
    volume: Volume,
    cache: SliceCache,
    progress: Callable[[int, int], None] | None = None,
    wait: Callable[[], None] | None = None,
) -> int:
    """Put the embedding of every slice, in every plane that the model looks at, into the cache, one after the other.

    Args:
        model: the one that will answer.
        volume: the image.
        cache: slices that it holds already cost nothing.
        progress: called with (slices done, slices in all).
        wait: called before each slice that must be encoded; returns when the machine is free for it.

    Returns:
        How many slices were encoded.
    """
    info, encoder = model.info, SliceEncoder(model, cache)
    axes = axes_seen(info, volume.geometry)
    total = volume.geometry.slices(axes)
    encoded = done = 0
    for axis in axes:
        view = ModelView(volume, info.window, info.context, info.image_size, axis)
        for index in range(len(view)):
            if not encoder.has(view, index):
                if wait:
                    wait()
                encoder.embeddings(view, [index])
                encoded += 1
            done += 1
            if progress:
                progress(done, total)
    return encoded
