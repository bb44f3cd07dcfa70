"""What training minimises, over the pixels that somebody has labelled."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss, MaskedDiceLoss
from monai.networks.utils import one_hot
from torch import Tensor
from torch.nn import functional as F

from samadapt.data.labels import IGNORE, resize_label
from samadapt.data.prompts import sample_prompts
from samadapt.model import AdaptedModel

SMALLEST_OBJECT = 9
"""Pixels that an object needs to be prompted for: below that, boxes and clicks are noise."""

_classes = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
_binary = DiceCELoss(sigmoid=True, batch=True)
# The same Dice for probabilities: MaskedDiceLoss masks before its own softmax or sigmoid, which would undo the masking.
_masked_classes = MaskedDiceLoss(include_background=False, batch=True)
_masked_binary = MaskedDiceLoss(batch=True)


def class_loss(logits: Tensor, labels: Tensor, unknown: Tensor | None = None) -> Tensor:
    """Dice over the foreground classes plus cross-entropy, both over pixels that are not ``IGNORE``.

    Where nobody has looked for some classes, background means "background or any of these": its probability is the sum
    of theirs, and they have no Dice (marginal loss of Shi et al., "Marginal loss and exclusion loss for partially
    supervised multi-organ segmentation", Medical Image Analysis 2021).

    Args:
        logits: (B,K+1,...), in two or three dimensions.
        labels: (B,...) int64, 0 to K or ``IGNORE``; brought to the logits' size by nearest neighbour, so that no class
            is invented.
        unknown: (B,K+1) bool, classes that nobody has looked for; none of them is in that sample's labels.

    Returns:
        A scalar; 0 where everything is ``IGNORE``.
    """
    small = resize_label(labels, (len(labels), *logits.shape[2:]))
    logits = logits.float() if unknown is None else _merged(logits.float(), unknown)
    ignored = small == IGNORE
    if not ignored.any():
        return _classes(logits, small[:, None])
    target = one_hot(small.masked_fill(ignored, 0)[:, None], logits.shape[1])
    entropy = F.cross_entropy(logits, small, ignore_index=IGNORE, reduction="sum") / (~ignored).sum().clamp(min=1)
    return _masked_classes(logits.softmax(dim=1), target, ~ignored[:, None]) + entropy


def prompt_loss(model: AdaptedModel, embeddings: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Loss of the masks for simulated boxes and clicks on one random class per slice, over labelled pixels.

    Dice plus binary cross-entropy on the mask, plus the squared error of the predicted IoU (as LiteMedSAM was
    trained), since clicks rank their candidate boxes by it.

    Args:
        model: being trained.
        embeddings: (B,256,g,g).
        labels: (B,S,S) int64; ``IGNORE`` is no object, is never clicked, and is not counted.
        generator: of the simulated prompts.

    Returns:
        A scalar; 0 where no slice shows an object.
    """
    chosen = [(row, objects) for row in range(len(labels)) if len(objects := _objects(labels[row]))]
    if not chosen:
        return embeddings.new_zeros(())
    rows = [row for row, _ in chosen]
    picks = [objects[int(torch.randint(len(objects), (1,), generator=generator))] for _, objects in chosen]
    masks, labelled = labels[rows] == torch.stack(picks)[:, None, None], labels[rows] != IGNORE
    prompts = sample_prompts(masks, generator, labelled=labelled)
    logits, iou = model.prompt_masks(embeddings[rows], prompts.points, prompts.point_labels, prompts.boxes)
    target, counted = (
        resize_label(part.long(), (len(part), *logits.shape[-2:]))[:, None].float() for part in (masks, labelled)
    )
    error = F.mse_loss(iou.float(), _iou((logits > 0) & (counted > 0), target > 0))
    return _binary_loss(logits.float(), target, counted) + error


def _merged(logits: Tensor, unknown: Tensor) -> Tensor:
    """Logits in whose softmax background has the probability of itself and all ``unknown``, and these have 0."""
    places = unknown.view(*unknown.shape, *[1] * (logits.ndim - 2))
    elsewhere = ~places
    elsewhere[:, 0] = False
    background = logits.masked_fill(elsewhere, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([background, logits[:, 1:].masked_fill(places[:, 1:], -torch.inf)], dim=1)


def _binary_loss(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Dice plus cross-entropy of one mask each, over the pixels where ``counted`` is 1; all (N,1,h,w) float."""
    if counted.all():
        return _binary(logits, target)
    entropy = F.binary_cross_entropy_with_logits(logits, target, counted, reduction="sum") / counted.sum().clamp(min=1)
    return _masked_binary(logits.sigmoid(), target, counted) + entropy


def _objects(label: Tensor) -> Tensor:
    """Class indices with at least ``SMALLEST_OBJECT`` pixels."""
    values, counts = label.unique(return_counts=True)
    return values[(values > 0) & (values != IGNORE) & (counts >= SMALLEST_OBJECT)]


def _iou(found: Tensor, target: Tensor) -> Tensor:
    """(N,1,h,w) bool twice -> (N,1) intersection over union."""
    union = (found | target).sum(dim=(2, 3)).clamp(min=1)
    return (found & target).sum(dim=(2, 3)) / union
