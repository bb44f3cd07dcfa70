"""Small backbones with random weights, one of each qkv layout, and small labelled studies, for tests of behaviour."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from samadapt.backbones import Backbone
from samadapt.backbones.sam_vit import build_sam_vit
from samadapt.backbones.tiny_vit import build_lite_medsam

SIZE = 64


def tiny_vit() -> Backbone:
    torch.manual_seed(0)
    return build_lite_medsam(SIZE, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), heads=(1, 2, 2, 4)).eval()


def tiny_sam() -> Backbone:
    torch.manual_seed(0)
    return build_sam_vit(SIZE, name="sam_vit_b", dim=32, depth=2, heads=4, global_blocks=(1,), window=3).eval()


BACKBONES = {"per_head": tiny_vit, "fused": tiny_sam}


def write_phantom(path: Path, seed: int, shape: tuple[int, int, int] = (36, 30, 6)) -> np.ndarray:
    """A noisy volume with a bright box (1) beside a dark one (2) at ``path``; returns its label (I,J,K) uint8."""
    random = np.random.default_rng(seed)
    i, j = random.integers(4, 10, size=2)
    label = np.zeros(shape, np.uint8)
    label[i : i + 10, j : j + 8, 1:5] = 1
    label[i + 12 : i + 20, j : j + 8, 1:5] = 2
    image = 100 + 60 * (label == 1) - 60 * (label == 2) + random.normal(0, 5, shape)
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.diag([-1.0, -1.0, 3.0, 1.0])), path)
    return label


def write_studies(folder: Path, cases: int) -> None:
    """``cases`` labelled phantoms, laid out as MONAI Label's datastore does."""
    (folder / "labels" / "final").mkdir(parents=True)
    for number in range(cases):
        label = write_phantom(folder / f"case_{number}.nii.gz", seed=number)
        image = nib.Nifti1Image(label, np.diag([-1.0, -1.0, 3.0, 1.0]))
        nib.save(image, folder / "labels" / "final" / f"case_{number}.nii.gz")
