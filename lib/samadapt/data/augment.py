"""Random changes of training slices: pose, contrast, noise. With a label no flips: left and right may be classes."""

from __future__ import annotations

import math

import numpy as np
from monai.transforms import (
    Compose,
    MapTransform,
    RandAdjustContrastd,
    RandAffine,
    RandAffined,
    RandFlip,
    RandGaussianNoised,
    RandRotate90,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from torch import Tensor

IMAGE, LABEL = "image", "label"


def intensity_changes() -> list[MapTransform]:
    """Random changes of contrast, brightness and noise of ``IMAGE``, values in [0,1], in 2D or 3D."""
    return [
        RandAdjustContrastd(IMAGE, prob=0.5, gamma=(0.7, 1.5)),
        RandScaleIntensityd(IMAGE, factors=0.2, prob=0.5),
        RandShiftIntensityd(IMAGE, offsets=0.1, prob=0.5),
        RandGaussianNoised(IMAGE, prob=0.3, std=0.05),
    ]


class Augmentation:
    """Augments one slice and its label together; the same seed gives the same change.

    Args:
        size: S, side of the model frame in pixels.
    """

    def __init__(self, size: int) -> None:
        self._transform = Compose(
            [
                RandAffined(
                    (IMAGE, LABEL),
                    prob=0.9,
                    rotate_range=math.radians(20),
                    scale_range=(0.2, 0.2),
                    shear_range=(0.1, 0.1),
                    translate_range=(0.06 * size, 0.06 * size),
                    mode=("bilinear", "nearest"),
                    padding_mode="zeros",
                ),
                *intensity_changes(),
            ]
        )

    def __call__(self, image: Tensor, label: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(3,S,S) float in [0,1] and (S,S) integer -> the same, changed."""
        self._transform.set_random_state(state=np.random.RandomState(seed % 2**32))
        changed = self._transform({IMAGE: image, LABEL: label[None].float()})
        return changed[IMAGE].as_tensor().clamp(0, 1), changed[LABEL].as_tensor()[0].to(label.dtype)


class ImageAugmentation:
    """Augments one slice that has no label: flips, quarter turns, rotation, crops of 60 % of the side and more.

    Its intensities stay as they are: masked image modelling needs no more than changes of pose (He et al., "Masked
    Autoencoders Are Scalable Vision Learners", CVPR 2022, section 4.1, data augmentation).

    Args:
        size: S, side of the model frame in pixels.
    """

    def __init__(self, size: int) -> None:
        self._transform = Compose(
            [
                RandFlip(prob=0.5, spatial_axis=0),
                RandFlip(prob=0.5, spatial_axis=1),
                RandRotate90(prob=0.5, max_k=3),
                RandAffine(
                    prob=0.9,
                    rotate_range=math.radians(15),
                    scale_range=((-0.4, 0.1), (-0.4, 0.1)),
                    translate_range=(0.15 * size, 0.15 * size),
                    mode="bilinear",
                    padding_mode="zeros",
                ),
            ]
        )

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """(3,S,S) float in [0,1] -> the same, changed; the same seed gives the same change."""
        self._transform.set_random_state(state=np.random.RandomState(seed % 2**32))
        return self._transform(image).as_tensor().clamp(0, 1)
