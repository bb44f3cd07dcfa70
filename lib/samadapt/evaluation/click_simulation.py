"""A simulated annotator: one click at the object's centre, then corrections at the centre of the largest error."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from samadapt.data.slices import pixel_to_voxel, take_slice
from samadapt.data.volume import Volume
from samadapt.errors import InputError
from samadapt.inference.clicks import segment_slice
from samadapt.inference.prompts import Prompts, Voxel
from samadapt.model import AdaptedModel


def simulate_clicks(
    model: AdaptedModel,
    volume: Volume,
    truth: np.ndarray,
    axis: int,
    index: int,
    clicks: int = 5,
    left_out: np.ndarray | None = None,
) -> list[float]:
    """Dice after 1, 2, ... ``clicks`` clicks on one slice.

    Args:
        model: plain or trained.
        volume: the image.
        truth: bool (I,J,K), the object on the volume's grid.
        axis: axis that the slice is taken across.
        index: a slice that shows the object.
        clicks: how many; a perfect mask repeats its Dice.
        left_out: bool (I,J,K), voxels that nobody has labelled: whatever is found there is neither right nor wrong.

    Raises:
        InputError: the slice does not show the object.
    """
    wanted = np.ascontiguousarray(take_slice(truth, axis, index))
    if not wanted.any():
        raise InputError("the object is not on this slice", where=f"slice {index}")
    labelled = True if left_out is None else ~take_slice(left_out, axis, index)
    foreground: list[Voxel] = [_voxel(centre(wanted), axis, index)]
    background: list[Voxel] = []
    scores = []
    for _ in range(clicks):
        found = segment_slice(model, volume, axis, index, Prompts(foreground, background)) & labelled
        scores.append(float(2 * (found & wanted).sum() / (found.sum() + wanted.sum())))
        missed, false = largest_part(wanted & ~found), largest_part(found & ~wanted)
        if missed.sum() >= false.sum():
            if missed.any():
                foreground.append(_voxel(centre(missed), axis, index))
        else:
            background.append(_voxel(centre(false), axis, index))
    return scores


def widest_slice(truth: np.ndarray, axis: int) -> int:
    """The slice across ``axis`` that shows most of the object."""
    others = tuple(a for a in range(3) if a != axis)
    return int(truth.sum(axis=others).argmax())


def centre(mask: np.ndarray) -> tuple[int, int]:
    """(row, column) of the pixel deepest inside bool (H,W)."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), mask.shape)
    return int(row), int(column)


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of bool (H,W); empty where the mask is."""
    parts, count = ndimage.label(mask)
    if count == 0:
        return mask
    return parts == 1 + int(np.bincount(parts.ravel())[1:].argmax())


def median_by_click(cases: list[list[float]]) -> list[float]:
    """Median over cases of the Dice after each click."""
    return [float(value) for value in np.median(np.array(cases), axis=0)]


def _voxel(pixel: tuple[int, int], axis: int, index: int) -> Voxel:
    i, j, k = pixel_to_voxel(index, *pixel, axis)
    return int(i), int(j), int(k)
