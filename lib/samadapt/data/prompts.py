"""Simulated prompts: what an annotator, or our own click ladder, could have asked about a mask.

The boxes come in the two kinds that the decoder meets when it serves: one drawn by a person around the object
(tight, a few pixels off on each side), and one of the click ladder (square, loose, centred on a click somewhere in
the object; see ``samadapt.inference.clicks``). A model trained on the first kind alone would unlearn the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samadapt.errors import InputError

POSITIVE, NEGATIVE, PADDING = 1, 0, -1
"""Point labels of SAM's prompt encoder."""

TIGHT_JITTER = 0.1
"""A drawn box's sides lie within this fraction of the object's width and height from the tight ones."""

LOOSE_SCALE = (0.9, 1.6)
"""Half-side of a ladder box, in units of the click's distance to the object's farthest side."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of B masks, ready for ``AdaptedModel.prompt_masks``.

    Attributes:
        points: (B, P, 2) float32, x and y in pixels of the mask's frame (pixel centres are whole numbers).
        point_labels: (B, P) int64, 1 inside the object, 0 outside it, -1 no point.
        boxes: (B, 4) float32, x0, y0, x1, y1 of the first and the last pixel inside, within the frame.
    """

    points: Tensor
    point_labels: Tensor
    boxes: Tensor


def sample_prompts(
    masks: Tensor,
    generator: torch.Generator | None = None,
    *,
    labelled: Tensor | None = None,
    positive_clicks: int = 2,
    negative_clicks: int = 1,
    loose_boxes: float = 0.5,
    box_only: float = 0.5,
) -> PromptBatch:
    """Draw one box and up to ``positive_clicks + negative_clicks`` clicks for each mask.

    Args:
        masks: (B, h, w) bool, at least one pixel set in each.
        generator: draws all randomness; the same state gives the same prompts on the same device.
        labelled: (B, h, w) bool, where clicks outside the object may lie; everywhere by default.
        positive_clicks: at most so many clicks inside the object.
        negative_clicks: at most so many clicks outside it, within the box's surroundings.
        loose_boxes: share of boxes that are like the click ladder's; the others are tight with jitter.
        box_only: share of samples without any click.

    Raises:
        InputError: ``masks`` is no bool batch, or one of them is empty.
    """
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise InputError(f"masks must be bool (B, h, w), not {masks.dtype} {tuple(masks.shape)}", where="masks")
    if not bool(masks.flatten(1).any(dim=1).all()):
        raise InputError("a mask without a pixel has no prompt", where="masks", remedy="Leave empty masks out.")
    draw = _Draw(generator, masks.device)
    tight = mask_boxes(masks)
    loose = _loose_boxes(tight, draw.pixels(masks, 1)[:, 0], draw)
    chosen = (draw.uniform(len(masks), 1) < loose_boxes).float()
    boxes = _inside(chosen * loose + (1 - chosen) * _jittered(tight, draw), masks.shape)
    inside = draw.pixels(masks, positive_clicks)
    elsewhere = ~masks if labelled is None else ~masks & labelled
    outside, outside_labels = _negative_points(elsewhere, boxes, negative_clicks, draw)
    labels = torch.cat([torch.full_like(inside[..., 0], POSITIVE), outside_labels], dim=1).long()
    labels = torch.where(_dropped(labels, positive_clicks, box_only, draw), PADDING, labels)
    return PromptBatch(points=torch.cat([inside, outside], dim=1), point_labels=labels, boxes=boxes)


def mask_boxes(masks: Tensor) -> Tensor:
    """The tight box of each mask: (B, h, w) bool, none empty -> (B, 4) float32 x0, y0, x1, y1, last pixel included."""
    columns, rows = masks.any(dim=1), masks.any(dim=2)
    first = [flags.int().argmax(dim=1) for flags in (columns, rows)]
    last = [flags.shape[1] - 1 - flags.flip(1).int().argmax(dim=1) for flags in (columns, rows)]
    return torch.stack([first[0], first[1], last[0], last[1]], dim=1).float()


class _Draw:
    """Random numbers from one generator, delivered on the masks' device."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self._generator = generator
        self._source = generator.device if generator is not None else device
        self._device = device

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self._source).to(self._device)

    def pixels(self, masks: Tensor, count: int) -> Tensor:
        """(B, count, 2) float x, y of ``count`` different set pixels; repeats the best where a mask has fewer."""
        keys = self.uniform(*masks.shape).masked_fill(~masks, -1.0).flatten(1)
        values, index = keys.topk(count, dim=1) if count else (keys[:, :0], keys[:, :0].long())
        index = torch.where(values >= 0, index, index[:, :1])
        return torch.stack([index % masks.shape[2], index // masks.shape[2]], dim=2).float()


def _jittered(tight: Tensor, draw: _Draw) -> Tensor:
    size = (tight[:, 2:] - tight[:, :2] + 1).repeat(1, 2)
    return tight + (2 * draw.uniform(*tight.shape) - 1) * TIGHT_JITTER * size


def _loose_boxes(tight: Tensor, clicks: Tensor, draw: _Draw) -> Tensor:
    """Squares centred on ``clicks`` (B, 2) that hold the object, or nearly."""
    reach = torch.cat([clicks - tight[:, :2], tight[:, 2:] - clicks], dim=1).amax(dim=1, keepdim=True) + 1
    low, high = LOOSE_SCALE
    half = reach * (low + (high - low) * draw.uniform(len(tight), 1))
    return torch.cat([clicks - half, clicks + half], dim=1)


def _inside(boxes: Tensor, shape: torch.Size) -> Tensor:
    """Boxes cut to the frame, each at least one pixel wide and high."""
    limit = torch.tensor([shape[2] - 1, shape[1] - 1], dtype=boxes.dtype, device=boxes.device)
    low = torch.minimum(boxes[:, :2], limit - 1).clamp(min=0)
    high = torch.maximum(torch.minimum(boxes[:, 2:], limit), low + 1)
    return torch.cat([low, high], dim=1)


def _negative_points(elsewhere: Tensor, boxes: Tensor, count: int, draw: _Draw) -> tuple[Tensor, Tensor]:
    """Pixels of ``elsewhere`` within the box grown by half its size: (B, count, 2) and their labels, -1 where none
    exists."""
    margin = (boxes[:, 2:] - boxes[:, :2]) / 2
    x = torch.arange(elsewhere.shape[2], device=elsewhere.device)
    y = torch.arange(elsewhere.shape[1], device=elsewhere.device)
    near_x = (x >= boxes[:, :1] - margin[:, :1]) & (x <= boxes[:, 2:3] + margin[:, :1])
    near_y = (y >= boxes[:, 1:2] - margin[:, 1:]) & (y <= boxes[:, 3:] + margin[:, 1:])
    candidates = near_y[:, :, None] & near_x[:, None, :] & elsewhere
    exists = candidates.flatten(1).any(dim=1, keepdim=True).expand(-1, count)
    points = draw.pixels(candidates, count)
    return points, torch.where(exists, NEGATIVE, PADDING)


def _dropped(labels: Tensor, positive_clicks: int, box_only: float, draw: _Draw) -> Tensor:
    """(B, P) bool: clicks to leave out. Samples with clicks keep the first inside one, each other one by a coin."""
    dropped = draw.uniform(*labels.shape) < 0.5
    if positive_clicks:
        dropped[:, 0] = False
    return dropped | (draw.uniform(len(labels), 1) < box_only)
