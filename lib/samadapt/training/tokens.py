"""What enters the first trainable block, computed once for every slice and augmented copy.

Everything before that block is frozen, so a training that meets a slice again need not run it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samadapt.data.slice_cache import SliceCache
from samadapt.encoding import SliceEncoder
from samadapt.model import AdaptedModel
from samadapt.training.slices import Draw, SliceSampler, stack


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
        found = {draw: pair for draw in draws if (pair := self._read(draw)) is not None}
        if missing := [draw for draw in dict.fromkeys(draws) if draw not in found]:
            found |= self._compute(missing)
        tokens, labels = stack(found[draw] for draw in draws)
        return tokens.to(self._device).float(), labels.to(self._device).long()

    def _compute(self, draws: Sequence[Draw]) -> dict[Draw, tuple[Tensor, Tensor]]:
        images, labels = stack(self._sampler.load(draw) for draw in draws)
        tokens = self._encoder.tokens(images)
        computed = dict(zip(draws, zip(tokens, labels.to(torch.uint8), strict=True), strict=True))
        for draw, (own_tokens, label) in computed.items():
            self._cache.put(self._tokens_key(draw), own_tokens)
            self._cache.put(self._label_key(draw), label)
        return computed

    def _read(self, draw: Draw) -> tuple[Tensor, Tensor] | None:
        tokens, label = self._cache.get(self._tokens_key(draw)), self._cache.get(self._label_key(draw))
        return None if tokens is None or label is None else (tokens, label)

    def _tokens_key(self, draw: Draw) -> str:
        return self._encoder.tokens_key(draw.case.view_key, draw.index) + self._copy(draw)

    def _label_key(self, draw: Draw) -> str:
        return f"label {draw.case.key} {draw.index}" + self._copy(draw)

    def _copy(self, draw: Draw) -> str:
        return "" if draw.copy is None else f" copy {self._sampler.seed}-{draw.copy}"
