"""The rival to beat: a U-Net of MONAI trained from scratch on the same labels, for a given wall-clock time.

In 2D MONAI's ``BasicUNet`` (after Falk et al., "U-Net: deep learning for cell counting, detection, and morphometry",
2019), in 3D its residual ``UNet`` (Kerfoot et al., "Left-ventricle quantification using residual U-Net", STACOM 2018).
The 2D choice was made on the ACDC split of the bench itself, in the rival's favour: after 120 s on two cores this
network at 128 px had 0.65, the residual one 0.62, and the residual one at 256 px 0.42. Dice + cross-entropy, AdamW
and a falling learning rate as in nnU-Net (Isensee et al., 2021).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import list_data_collate
from monai.inferers import sliding_window_inference
from monai.networks.layers import Norm
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    RandAffined,
    RandCropByLabelClassesd,
    SpatialPadd,
)
from torch import Tensor, nn

from samadapt.data.augment import IMAGE, LABEL, intensity_changes
from samadapt.data.cases import Case
from samadapt.data.geometry import Geometry, turn_to_lps
from samadapt.data.labels import LabelMap
from samadapt.data.slices import put_slice
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.data.window import Window
from samadapt.errors import InputError, StateError
from samadapt.heads.unet import unet_2d
from samadapt.training.losses import class_loss
from samadapt.training.slices import SliceSampler, prepare, read_case, stack, unknown_classes

NEAR_CUBIC = 2.0
"""Largest ratio between a voxel's sides for which a 3D network is the better choice."""

SHALLOWEST = 16
"""Slices that a volume needs for a 3D network."""

LARGEST_PATCH = 64
"""Side of a 3D training crop, voxels; smaller volumes are taken whole."""

FRAME_SIZE = 128
"""Side of the 2D network's input, pixels."""

LEARNING_RATE = 3e-3
WARMUP = 0.05

Batches = Iterator[tuple[Tensor, Tensor, Tensor | None]]
"""Images in [0,1], labels int64, and what ``class_loss`` takes as ``unknown``."""

BATCH_2D, BATCH_3D = 8, 2
UNKNOWN = "unknown"
CHANNELS_3D = (16, 32, 64, 128)


@dataclass(frozen=True)
class Plan:
    """What the geometry of the training cases decides.

    Attributes:
        shape: the network's training input: (S,S) pixels of a square frame, or (I,J,K) voxels of the upright volume.
    """

    shape: tuple[int, ...]

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.shape)

    @classmethod
    def of(cls, geometries: Sequence[Geometry], colour: bool = False) -> Plan:
        """3D where every volume is deep enough and its voxels are nearly cubes, else 2D."""
        cubic = all(max(g.spacing) <= NEAR_CUBIC * min(g.spacing) and min(g.shape) >= SHALLOWEST for g in geometries)
        return cls.with_dimensions(3 if cubic and not colour else 2, geometries, colour)

    @classmethod
    def with_dimensions(cls, dimensions: int, geometries: Sequence[Geometry], colour: bool = False) -> Plan:
        """2D or 3D as told, whatever suits the geometry.

        Raises:
            InputError: 3D, where there are colours or single slices.
        """
        if dimensions == 2:
            return cls((FRAME_SIZE, FRAME_SIZE))
        if colour or any(min(g.shape) < 2 for g in geometries):
            raise InputError("a 3D network learns from grey volumes of several slices", remedy="Choose the 2D one.")
        sides = np.max([g.shape for g in geometries], axis=0)
        return cls(tuple(min(LARGEST_PATCH, -(-int(side) // 8) * 8) for side in sides))


@dataclass(frozen=True)
class TrainedUNet:
    """A trained network and what is needed to use it.

    Attributes:
        network: in eval mode. 2D: (B,3,S,S) -> (B,K+1,S,S); 3D: (B,1,...) -> (B,K+1,...). Input in [0,1].
        plan: the input it was trained on.
        window: intensity window of its input.
        context: neighbouring slices as channels (2D only); as ``ModelInfo.context``.
        steps: optimiser steps.
        seconds: wall-clock time of the training loop.
    """

    network: nn.Module
    plan: Plan
    window: Window
    context: int
    steps: int
    seconds: float

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def segment(self, volume: Volume) -> np.ndarray:
        """uint8 (I,J,K) label indices on the volume's own grid."""
        return self._segment_slices(volume) if self.plan.dimensions == 2 else self._segment_volume(volume)

    def _segment_slices(self, volume: Volume) -> np.ndarray:
        view = ModelView(volume, self.window, self.context, self.plan.shape[0])
        result = np.zeros(view.turn.turned.shape, dtype=np.uint8)
        for index in range(len(view)):
            logits = self.network(view.image(index)[None].to(self._device))[0].cpu()
            put_slice(result, view.axis, index, view.frame.logits_to_native(logits).argmax(dim=0).numpy())
        return np.ascontiguousarray(view.turn.back(result))

    def _segment_volume(self, volume: Volume) -> np.ndarray:
        turn = turn_to_lps(volume.geometry)
        image = _tensor(self.window.apply(turn.forward(volume.array)))
        batch = image[None].to(self._device)
        logits = sliding_window_inference(batch, self.plan.shape, 1, self.network, overlap=0.5, mode="gaussian")
        return np.ascontiguousarray(turn.back(logits[0].argmax(dim=0).cpu().numpy().astype(np.uint8)))


def train_unet(
    cases: Sequence[Case],
    labels: LabelMap,
    window: Window,
    seconds: float,
    folder: Path,
    context: int = 1,
    seed: int = 0,
    progress: Callable[[float, int, float], None] | None = None,
    dimensions: int | None = None,
) -> TrainedUNet:
    """Train on every one of ``cases`` for ``seconds`` of wall-clock time (reading the cases is not counted).

    Args:
        cases: labelled ones.
        labels: the classes to learn.
        window: intensity window.
        seconds: length of the training loop.
        folder: where the slices of a 2D network are kept.
        context: neighbouring slices as channels, for a 2D network.
        seed: of weights, batches and augmentation.
        progress: called after each step with (seconds used, steps done, loss).
        dimensions: 2 or 3; None chooses by the geometry.

    Raises:
        InputError: a case that cannot be read, or that has no third dimension to learn from.
        StateError: the loss is no longer a number.
    """
    volumes = [read_case(case, labels)[0] for case in cases]
    geometries, colour = [volume.geometry for volume in volumes], any(volume.is_colour for volume in volumes)
    plan = Plan.with_dimensions(dimensions, geometries, colour) if dimensions else Plan.of(geometries, colour)
    torch.manual_seed(seed)
    batches: Batches
    if plan.dimensions == 2:
        prepared = prepare(cases, labels, window, context, plan.shape[0], folder)
        sampler = SliceSampler(prepared, plan.shape[0], BATCH_2D, seed)
        network: nn.Module = unet_2d(len(labels))
        batches = _slices(sampler, labels)
    else:
        network = UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=len(labels) + 1,
            channels=CHANNELS_3D,
            strides=[2] * (len(CHANNELS_3D) - 1),
            num_res_units=1,
            norm=(Norm.INSTANCE, {"affine": True}),
        )
        batches = _crops(cases, labels, window, plan, seed)
    network = network.to("cuda" if torch.cuda.is_available() else "cpu")
    steps, used = _fit(network, batches, seconds, progress)
    return TrainedUNet(network.eval(), plan, window, context, steps, used)


def _fit(
    network: nn.Module,
    batches: Batches,
    seconds: float,
    progress: Callable[[float, int, float], None] | None,
) -> tuple[int, float]:
    """Train in place until the time is up; (steps, seconds used)."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    device = next(network.parameters()).device
    started, steps, used = time.monotonic(), 0, 0.0
    network.train()
    while used < seconds:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(used / seconds)
        images, masks, unknown = next(batches)
        unknown = None if unknown is None else unknown.to(device)
        loss = class_loss(network(images.to(device)), masks.to(device), unknown)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()
        steps, used, value = steps + 1, time.monotonic() - started, float(loss.detach())
        if not math.isfinite(value):
            raise StateError(f"the U-Net's loss became {value} at step {steps}", remedy="Lower LEARNING_RATE.")
        if progress:
            progress(used, steps, value)
    return steps, used


def _schedule(used: float) -> float:
    """Linear rise, then nnU-Net's polynomial fall to zero."""
    return max(used / WARMUP, 0.02) if used < WARMUP else max((1 - used) / (1 - WARMUP), 0.0) ** 0.9


def _slices(sampler: SliceSampler, labels: LabelMap) -> Batches:
    """Endless augmented batches: images (B,3,S,S) and labels (B,S,S)."""
    for number in itertools.count():
        draws = sampler.draws(number)
        yield *stack(map(sampler.load, draws)), unknown_classes(draws, labels)


def _crops(cases: Sequence[Case], labels: LabelMap, window: Window, plan: Plan, seed: int) -> Batches:
    """Endless augmented batches: images (B,1,...) and labels (B,...) of the plan's shape."""
    records = [_upright(case, labels, window) for case in cases]
    transform = _augmentation(plan.shape, len(labels) + 1).set_random_state(seed=seed)
    random = np.random.default_rng(seed)
    while True:
        chosen = [transform(dict(records[n])) for n in random.integers(len(records), size=BATCH_3D)]
        batch = list_data_collate([crop for crops in chosen for crop in crops])
        unknown = batch[UNKNOWN] if batch[UNKNOWN].any() else None
        yield batch[IMAGE].as_tensor().clamp(0, 1), batch[LABEL].as_tensor()[:, 0].long(), unknown


def _upright(case: Case, labels: LabelMap, window: Window) -> dict[str, Tensor]:
    volume, mask, report = read_case(case, labels)
    turn = turn_to_lps(volume.geometry)
    return {
        IMAGE: _tensor(window.apply(turn.forward(volume.array))),
        LABEL: _tensor(turn.forward(mask)[None]),
        UNKNOWN: torch.tensor([False, *(name in report.unknown for name in labels.names)]),
    }


def _augmentation(shape: tuple[int, ...], classes: int) -> Compose:
    """The changes of ``samadapt.data.augment``, in 3D, on random crops."""
    return Compose(
        [
            SpatialPadd((IMAGE, LABEL), spatial_size=shape),
            RandCropByLabelClassesd((IMAGE, LABEL), LABEL, spatial_size=shape, num_classes=classes, warn=False),
            RandAffined(
                (IMAGE, LABEL),
                prob=0.9,
                rotate_range=(math.radians(20),) * 3,
                scale_range=(0.2,) * 3,
                shear_range=(0.1,) * 6,
                translate_range=[0.06 * side for side in shape],
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            *intensity_changes(),
        ]
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
