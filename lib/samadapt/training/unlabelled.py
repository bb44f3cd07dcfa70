"""Slices of images whose labels nobody asks for: prepared on disk once, drawn and augmented from there.

Memory does not grow with the images: each is read alone, and of its prepared slices only those drawn are opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samadapt.data.augment import ImageAugmentation
from samadapt.data.cases import Case
from samadapt.data.view import ModelView
from samadapt.data.volume import read_volume
from samadapt.errors import InputError
from samadapt.files import write_json
from samadapt.training.slices import forget_others, kept_image, kept_images, save_array, slices_key

CONTEXT = 1
"""See ``ModelInfo.context``; as in the recipes."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """The slices of one image in the model frame, on disk.

    Attributes:
        id: case id.
        key: changes with the file and everything that shaped the slices.
        path: uint8 (N,C,S,S), see ``samadapt.training.slices.kept_images``.
        shown: int32 indices of the slices that show anything at all.
    """

    id: str
    key: str
    path: Path
    shown: np.ndarray

    def image(self, index: int) -> Tensor:
        """(3,S,S) float32 in [0,1]."""
        # Opened for each slice: a mapping that stays open holds a file descriptor, and there may be thousands.
        return kept_image(np.load(self.path, mmap_mode="r", allow_pickle=False), index, CONTEXT)


def prepare_images(
    cases: Sequence[Case],
    size: int,
    folder: Path,
    progress: Callable[[int, int], None],
    skipped: Callable[[Case, InputError], None],
) -> list[PreparedImage]:
    """Write the slices of every image once (a second call finds them), forget others, and list them.

    Every image gets the window that fits it without training data (``samadapt.data.window.default_window``).

    Args:
        cases: their labels are not read.
        size: S, side of the model frame in pixels.
        folder: for the slices alone.
        progress: called with the images done and their number.
        skipped: told of every image that cannot be read or shows nothing.

    Raises:
        InputError: none is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys: dict[str, Case] = {}
    for case in cases:
        try:
            keys[slices_key([case.image], ["image alone", size])] = case
        except OSError as error:
            skipped(case, InputError(f"cannot be read ({error.strerror})", where=case.image))
    forget_others(folder, keys)
    prepared = []
    for number, (key, case) in enumerate(keys.items(), start=1):
        try:
            prepared.append(_prepared(case, key, size, folder))
        except InputError as error:
            skipped(case, error)
        progress(number, len(keys))
    if not prepared:
        raise InputError("no image is left to learn from", remedy="Mend or replace the images named above.")
    return prepared


def _prepared(case: Case, key: str, size: int, folder: Path) -> PreparedImage:
    record, slices = folder / f"{key}.json", folder / f"{key}.images.npy"
    if not record.is_file():
        volume = read_volume(case.image)
        images = kept_images(volume, ModelView(volume, None, context=0, size=size))
        save_array(slices, images)
        shown = [index for index, image in enumerate(images) if image.min() != image.max()]
        write_json(record, {"case": case.id, "shown": shown})
    indices = np.array(json.loads(record.read_text(encoding="utf-8"))["shown"], dtype=np.int32)
    if not indices.size:
        raise InputError("shows nothing: all its voxels are alike", where=case.image)
    return PreparedImage(case.id, key, slices, indices)


class ImageSampler:
    """Draws augmented batches. Batch n depends on the images, the seed and n alone, so a resumed run draws the same.

    Args:
        images: at least one; each is drawn as often as any other, however many slices it has.
        size: S.
        batch_size: slices per batch.
        seed: of all draws.
    """

    def __init__(self, images: Sequence[PreparedImage], size: int, batch_size: int, seed: int) -> None:
        self._images = images
        self._augment = ImageAugmentation(size)
        self._batch_size = batch_size
        self._seed = seed

    def batch(self, number: int) -> Tensor:
        """(B,3,S,S) float32 in [0,1]."""
        random = np.random.default_rng([self._seed, number])
        return torch.stack([self._draw(random) for _ in range(self._batch_size)])

    def _draw(self, random: np.random.Generator) -> Tensor:
        image = self._images[random.integers(len(self._images))]
        index = int(image.shown[random.integers(len(image.shown))])
        return self._augment(image.image(index), int(random.integers(2**32)))


def examples(images: Sequence[PreparedImage], count: int) -> Tensor:
    """(B,3,S,S) float32 in [0,1]: the middle slices of at most ``count`` images, evenly spread."""
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    return torch.stack([images[n].image(int(images[n].shown[len(images[n].shown) // 2])) for n in chosen])
