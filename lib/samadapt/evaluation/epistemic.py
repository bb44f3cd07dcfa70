"""MONAI Label's own Epistemic strategy, by its definition, as a rival in measurements; the app does not offer it.

``monailabel.tasks.scoring.epistemic`` (0.8) runs a network several times with dropout, takes the mean probability of
each foreground class over these passes, adds up ``-p log p`` over the classes, and scores an image with the mean of
that over all its voxels. ``monailabel.tasks.activelearning.epistemic`` then proposes the image with the largest score;
before there is a model all scores are 0, which leaves the first one in the datastore's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from samadapt.activelearning.strategy import Pool, Proposal, Strategy
from samadapt.data.slice_cache import SliceCache
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.encoding import SliceEncoder
from samadapt.model import AdaptedModel

PASSES = 5
"""``simulation_size`` of MONAI Label's second version."""

DROPOUT = 0.2
"""Of MONAI Label's sample networks for this strategy. SAM has no dropout of its own, so it acts on what the head reads:
on the embedding."""

LEAST = 0.00005
"""MONAI Label's threshold: a probability of exactly 0 counts as this, in the pass that gave it; smaller ones stay."""

BATCH = 8


class Epistemic(Strategy):
    """Proposes the image with the largest mean entropy over all voxels.

    Args:
        entropy: case id -> ``mean_entropy`` by the model in service; None while there is no model.
    """

    name: ClassVar[str] = "epistemic"
    about: ClassVar[str] = "MONAI Label's Epistemic: the largest mean entropy over all voxels under dropout"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, entropy: Callable[[str], float] | None) -> None:
        self._entropy = entropy

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        """As ``Strategy.rank`` says; of images with the same score the first by id."""
        scores = {candidate.id: self._entropy(candidate.id) if self._entropy else 0.0 for candidate in pool.unlabelled}
        best = sorted(scores, key=lambda case: (-scores[case], case))[:count]
        why = f"mean entropy under dropout, over all voxels, of {len(scores)} images the largest"
        reason = why if self._entropy else "no model yet: the first image"
        return [Proposal(case, scores[case], reason) for case in best]


@torch.inference_mode()
def mean_entropy(model: AdaptedModel, volume: Volume, seed: int, cache: SliceCache | None = None) -> float:
    """Mean over all voxels of the sum over foreground classes of ``-p log p``, p the mean over passes with dropout.

    Args:
        model: trained.
        volume: the image; its acquisition plane is looked at.
        seed: of the dropout.
        cache: where embeddings are looked up and kept.
    """
    info, axis = model.info, volume.geometry.acquisition_axis
    view = ModelView(volume, info.window, info.context, info.image_size, axis)
    encoder = SliceEncoder(model, cache)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for start in range(0, len(view), BATCH):
        embeddings = encoder.embeddings(view, range(start, min(start + BATCH, len(view))))
        shares = torch.stack([_pass(model, view, embeddings, generator) for _ in range(PASSES)]).mean(dim=0)
        shares = shares[:, 1:]
        total += float(-(shares * shares.log()).sum(dim=1).mean(dim=(1, 2)).sum())
    return total / len(view)


def _pass(model: AdaptedModel, view: ModelView, embeddings: Tensor, generator: torch.Generator) -> Tensor:
    """(N,K+1,H,W) class probabilities of slices at their own resolution, none of them 0."""
    kept = torch.rand(embeddings.shape, generator=generator) >= DROPOUT
    logits = model.class_logits(embeddings * kept.to(embeddings.device) / (1 - DROPOUT))
    shares = torch.stack([view.frame.logits_to_native(one).softmax(dim=0) for one in logits])
    return shares.masked_fill(shares <= 0, LEAST)
