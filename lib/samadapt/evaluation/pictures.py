"""Slices with masks over them, for reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps

from samadapt.data.cases import Case
from samadapt.data.geometry import turn_to_lps
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.data.slices import take_slice
from samadapt.data.volume import read_label
from samadapt.data.window import default_window
from samadapt.training.slices import read_case


def colour(label: int) -> tuple[float, float, float]:
    """Red, green and blue (0..1) of a label index from 1 on; they repeat after ten."""
    return colormaps["tab10"]((label - 1) % 10)[:3]


def widest_slice_of(case: Case, labels: LabelMap, files: Sequence[Path]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The slice that shows most of the true label, upright.

    Args:
        case: a labelled one.
        labels: its classes.
        files: masks of the case on its native grid.

    Returns:
        The image (H,W,3) in 0..1, and uint8 (H,W) label indices: the truth (0 where nobody has labelled), then one for
        each file.
    """
    volume, truth, _ = read_case(case, labels)
    truth[truth == IGNORE] = 0
    turn = turn_to_lps(volume.geometry)
    axis = turn.turned.acquisition_axis
    upright = [turn.forward(mask) for mask in (truth, *map(read_label, files))]
    areas = np.moveaxis(upright[0] > 0, axis, 0).sum(axis=(1, 2))
    index = int(areas.argmax())
    channels = turn.forward(default_window(volume).apply(volume.array))
    image = np.stack([take_slice(channel, axis, index) for channel in channels], axis=-1)
    return np.broadcast_to(image, (*image.shape[:2], 3)), [take_slice(mask, axis, index) for mask in upright]


def blend(image: np.ndarray, mask: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """Colour over (H,W,3) in 0..1 wherever ``mask`` (H,W) has a label; a new array of the same shape and range."""
    result = np.array(image, dtype=np.float32)
    for label in np.unique(mask[mask > 0]):
        inside = mask == label
        result[inside] = (1 - strength) * result[inside] + strength * np.asarray(colour(int(label)))
    return result
