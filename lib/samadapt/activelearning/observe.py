"""What one model has to say of one volume beside its examination: descriptors, and how far several answers differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from samadapt.activelearning.suggest import evenly
from samadapt.data.prompts import mask_boxes
from samadapt.data.slice_cache import SliceCache
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.data.window import Window, default_window
from samadapt.encoding import SliceEncoder
from samadapt.inference.auto import BATCH_PIXELS
from samadapt.inference.examine import SUSPECTED, Examination, doubtful_foreground
from samadapt.model import AdaptedModel

DESCRIBED = 16
"""Slices of a volume whose descriptors are computed."""

COMPARED = 8
"""Slices of a volume on which several answers are compared: the most doubtful ones with foreground."""

EARLIER = 2
"""Earlier versions that are asked, the latest ones."""

BRIGHTER = 0.1
"""By this part of its width a window is opened at one end, to alter an image."""

LEAST_PIXELS = 4
"""Of the model's mask, below which a part is no object to put a box around."""


def describe(plain: AdaptedModel, volume: Volume, cache: SliceCache | None) -> np.ndarray:
    """The neck embedding of slices, averaged over the part of the frame that the image fills.

    Args:
        plain: the backbone as it came.
        volume: the image.
        cache: where embeddings are looked up and kept.

    Returns:
        (N,D) float32, rows of unit length, in the order of the volume's slices as stored; NaN in all but ``DESCRIBED``
        evenly spaced ones.
    """
    view = _view(plain, volume, plain.info.window)
    numbers = evenly(len(view), DESCRIBED)
    height, width = view.frame.content
    rows: dict[int, np.ndarray] = {}
    for number, embedding in _embeddings(plain, view, numbers, cache):
        cells = embedding.shape[-1] / plain.info.image_size
        inside = embedding[0, :, : max(1, round(height * cells)), : max(1, round(width * cells))]
        mean = inside.float().mean(dim=(1, 2)).cpu().numpy()
        rows[number] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    found = np.full((len(view), len(rows[numbers[0]])), np.nan, dtype=np.float32)
    for number, row in rows.items():
        found[number] = row
    return found


def case_descriptor(slices: np.ndarray) -> np.ndarray:
    """(N,D) of ``describe`` -> (D,) float32, the mean of the known ones, of unit length."""
    mean = np.nanmean(slices, axis=0)
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)


def spread_of_answers(
    model: AdaptedModel,
    volume: Volume,
    examination: Examination,
    earlier: Sequence[AdaptedModel] = (),
    cache: SliceCache | None = None,
) -> np.ndarray | None:
    """BALD's mutual information between pixel classes and who answers (Houlsby et al., 2011).

    Those who answer are the model and its ``EARLIER`` last predecessors; where there are none, the model alone, also
    shown the image a little brighter and a little darker. (Mirrored images would make left and right classes disagree.)

    Args:
        model: trained.
        volume: the image.
        examination: of it by the model.
        earlier: older versions, the latest last; those with other labels or another image size are left out.
        cache: where embeddings are looked up and kept.

    Returns:
        (N,) 0..1 in units of log(K+1), mean over the suspected pixels of the model frame; 0 in slices that are not
        among the ``COMPARED`` most doubtful. None where nothing else can answer: the image is constant.
    """
    voters = _voters(model, volume, earlier)
    if len(voters) < 2:
        return None
    numbers = _compared(examination)
    means: dict[int, Tensor] = {}
    entropies: dict[int, Tensor] = {}
    for one, window in voters:
        view = _view(one, volume, window)
        for number, embedding in _embeddings(one, view, numbers, cache):
            shares = _class_logits(one, view, embedding).softmax(dim=0)
            means[number] = means.get(number, 0) + shares / len(voters)
            entropies[number] = entropies.get(number, 0) + _entropy(shares) / len(voters)
    found = np.zeros(len(examination.doubt))
    for number, mean in means.items():
        suspected = mean[0] <= 1 - SUSPECTED
        if suspected.any():
            gained = (_entropy(mean) - entropies[number])[suspected].mean()
            found[number] = min(1.0, max(0.0, float(gained) / math.log(len(mean))))
    return found


def heads_apart(
    model: AdaptedModel, volume: Volume, examination: Examination, cache: SliceCache | None = None
) -> float | None:
    """How far the model's two heads are apart on the ``COMPARED`` most doubtful slices with foreground.

    The largest part of each class in a slice gets a box around it; what the prompted head finds in that box is compared
    with the part.

    Returns:
        0..1, 1 - Dice, the mean over classes of all their parts together. None where the model takes no boxes, or finds
        no part to put a box around.
    """
    if not model.takes_prompts:
        return None
    view = _view(model, volume, model.info.window)
    both: dict[int, float] = {}
    total: dict[int, float] = {}
    for _, embedding in _embeddings(model, view, _compared(examination), cache):
        classes = _class_logits(model, view, embedding).argmax(dim=0)
        for n in range(1, len(model.info.labels) + 1):
            part = _largest_part((classes == n).cpu().numpy())
            if part.sum() >= LEAST_PIXELS:
                answer = _answer_to_box(model, embedding, part)
                both[n] = both.get(n, 0) + 2 * int((part & answer).sum())
                total[n] = total.get(n, 0) + int(part.sum()) + int(answer.sum())
    return 1 - float(np.mean([both[n] / total[n] for n in both])) if both else None


def _compared(examination: Examination) -> list[int]:
    """Numbers of the slices to compare, in ascending order."""
    numbers = doubtful_foreground(examination, examination.doubt)
    most = numbers[np.argsort(-examination.doubt[numbers], kind="stable")[:COMPARED]]
    return sorted(int(number) for number in most)


def _voters(
    model: AdaptedModel, volume: Volume, earlier: Sequence[AdaptedModel]
) -> list[tuple[AdaptedModel, Window | None]]:
    """Who answers, and through which window."""
    info = model.info
    alike = [one for one in earlier if (one.info.labels, one.info.image_size) == (info.labels, info.image_size)]
    if alike:
        return [(one, one.info.window) for one in (model, *alike[-EARLIER:])]
    low, high = (info.window or default_window(volume)).limits(volume.array)
    step = BRIGHTER * (high - low)
    if step <= 0:
        return []
    altered = (Window("fixed", low - step, high), Window("fixed", low, high + step))
    return [(model, info.window), *((model, window) for window in altered)]


def _view(model: AdaptedModel, volume: Volume, window: Window | None) -> ModelView:
    return ModelView(volume, window, model.info.context, model.info.image_size)


def _embeddings(
    model: AdaptedModel, view: ModelView, numbers: Sequence[int], cache: SliceCache | None
) -> Iterator[tuple[int, Tensor]]:
    """The embedding (1,256,g,g) of slices that are counted as stored."""
    encoder = SliceEncoder(model, cache)
    device = next(model.parameters()).device
    batch = max(1, BATCH_PIXELS.get(device.type, BATCH_PIXELS["cpu"]) // model.info.image_size**2)
    for start in range(0, len(numbers), batch):
        some = numbers[start : start + batch]
        with torch.inference_mode():
            embeddings = encoder.embeddings(view, [_turned(view, number) for number in some])
        yield from zip(some, embeddings.split(1), strict=True)


def _turned(view: ModelView, number: int) -> int:
    """The slice of the turned grid that is slice ``number`` of the volume as stored."""
    steps = view.turn.steps
    forward = steps[int(np.flatnonzero(steps[:, 0] == view.axis)[0])][1] > 0
    return number if forward else len(view) - 1 - number


@torch.inference_mode()
def _class_logits(model: AdaptedModel, view: ModelView, embedding: Tensor) -> Tensor:
    """(1,256,g,g) -> (K+1,h,w) of the part of the frame that the slice fills."""
    logits = model.class_logits(embedding)[0].float()
    scale = logits.shape[-1] / view.frame.size
    height, width = (max(1, round(side * scale)) for side in view.frame.content)
    return logits[:, :height, :width].cpu()


@torch.inference_mode()
def _answer_to_box(model: AdaptedModel, embedding: Tensor, part: np.ndarray) -> np.ndarray:
    """(h,w) bool: what the prompted head finds in the box around ``part``, (h,w) bool of the mask's frame."""
    scale = model.info.image_size / model.backbone.mask_size
    box = mask_boxes(torch.from_numpy(part)[None])
    box = (box + 0.5) * scale - 0.5  # centres of cells, as pixels of the model frame
    logits, _ = model.prompt_masks(embedding, boxes=box.to(embedding.device))
    return (logits[0, 0, : part.shape[0], : part.shape[1]] > 0).cpu().numpy()


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax() if sizes.any() else mask


def _entropy(shares: Tensor) -> Tensor:
    """(K+1,h,w) -> (h,w) in nats."""
    return -(shares * shares.clamp_min(1e-6).log()).sum(dim=0)
