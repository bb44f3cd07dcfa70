"""What enters the first trainable block, computed once for every slice and augmented copy.

Everything before that block is frozen, so a training that meets a slice again need not run it again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from samadapt.data.slice_cache import SliceCache
from samadapt.encoding import SliceEncoder
from samadapt.model import AdaptedModel
from samadapt.training.slices import Draw, SliceSampler


class TokenSource:
    """Batches of tokens and labels for draws.

    Args:
        model: on its device; only its frozen first part is used.
        sampler: reads and augments slices.
        cache: where tokens and labels are looked up and kept. Tokens of plain slices are those that inference uses.
    """

    def __init__(self, model: AdaptedModel, sampler: SliceSampler, cache: SliceCache) -> None:
        self._encoder = SliceEncoder(model, cache)
        self._sampler = sampler
        self._cache = cache
        self._device = next(model.parameters()).device

    def batch(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """Tokens (B,...) float32 and labels (B,S,S) int64, both on the model's device."""
        load = functools.cache(self._sampler.load)

        def images(missing: list[int]) -> Tensor:
            return self._encoder.tokens(torch.stack([load(draws[n])[0] for n in missing]))

        def masks(missing: list[int]) -> list[Tensor]:
            return [load(draws[n])[1].to(torch.uint8) for n in missing]

        tokens = self._cache.gather([self._tokens_key(draw) for draw in draws], images)
        labels = self._cache.gather([self._label_key(draw) for draw in draws], masks)
        return torch.stack(tokens).to(self._device).float(), torch.stack(labels).to(self._device).long()

    def _tokens_key(self, draw: Draw) -> str:
        return self._encoder.tokens_key(draw.case.view_key, draw.index) + self._copy(draw)

    def _label_key(self, draw: Draw) -> str:
        return f"label {draw.case.key} {draw.index}" + self._copy(draw)

    def _copy(self, draw: Draw) -> str:
        return "" if draw.copy is None else f" copy {self._sampler.seed}-{draw.copy}"
