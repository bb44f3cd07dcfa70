"""What training minimises."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn import functional as F

from samadapt.data.labels import resize_label
from samadapt.data.prompts import sample_prompts
from samadapt.model import AdaptedModel

SMALLEST_OBJECT = 9
"""Pixels that an object needs to be prompted for: below that, boxes and clicks are noise."""

_classes = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
_binary = DiceCELoss(sigmoid=True, batch=True)


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice over the foreground classes plus cross-entropy.

    Args:
        logits: (B,K+1,h,w).
        labels: (B,S,S) int64; brought to (h,w) by nearest neighbour, so that no class is invented.
    """
    small = resize_label(labels, (len(labels), *logits.shape[-2:]))
    return _classes(logits.float(), small[:, None])


def prompt_loss(model: AdaptedModel, embeddings: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Loss of the masks for simulated boxes and clicks on one random class per slice.

    Dice plus binary cross-entropy on the mask, plus the squared error of the predicted IoU (as LiteMedSAM was
    trained), since clicks rank their candidate boxes by it.

    Args:
        model: being trained.
        embeddings: (B,256,g,g).
        labels: (B,S,S) int64.
        generator: of the simulated prompts.

    Returns:
        A scalar; 0 where no slice shows an object.
    """
    chosen = [(row, objects) for row in range(len(labels)) if len(objects := _objects(labels[row]))]
    if not chosen:
        return embeddings.new_zeros(())
    rows = [row for row, _ in chosen]
    picks = [objects[int(torch.randint(len(objects), (1,), generator=generator))] for _, objects in chosen]
    masks = labels[rows] == torch.stack(picks)[:, None, None]
    prompts = sample_prompts(masks, generator)
    logits, iou = model.prompt_masks(embeddings[rows], prompts.points, prompts.point_labels, prompts.boxes)
    target = resize_label(masks.long(), (len(masks), *logits.shape[-2:]))[:, None].float()
    return _binary(logits.float(), target) + F.mse_loss(iou.float(), _iou(logits > 0, target > 0))


def _objects(label: Tensor) -> Tensor:
    """Class indices with at least ``SMALLEST_OBJECT`` pixels."""
    values, counts = label.unique(return_counts=True)
    return values[(values > 0) & (counts >= SMALLEST_OBJECT)]


def _iou(found: Tensor, target: Tensor) -> Tensor:
    """(N,1,h,w) bool twice -> (N,1) intersection over union."""
    union = (found | target).sum(dim=(2, 3)).clamp(min=1)
    return (found & target).sum(dim=(2, 3)) / union
