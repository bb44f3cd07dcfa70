"""Slices through the encoder, by way of the cache: inference and training share what it holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samadapt.data.slice_cache import SliceCache
from samadapt.data.view import ModelView
from samadapt.model import AdaptedModel

KEPT = torch.float16
"""Precision of what the cache holds. Half the bytes of float32; the error is a thousandth of a value."""


def working_precision(device: torch.device) -> torch.autocast:
    """Mixed precision (bfloat16) on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class SliceEncoder:
    """Gives tokens and embeddings of slices, from the cache where it has them.

    Tokens that enter the first trainable block are the same for every version of a model; its embeddings are not.

    Args:
        model: on its device.
        cache: None computes everything each time.
    """

    def __init__(self, model: AdaptedModel, cache: SliceCache | None = None) -> None:
        self._model = model
        self._cache = cache
        self._device = next(model.parameters()).device

    def tokens_key(self, view_key: str, index: int) -> str:
        """Under which the cache keeps the tokens of one slice."""
        return f"tokens {self._model.frozen_key} {view_key} {index}"

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1] -> tokens as the cache keeps them, on the CPU."""
        with working_precision(self._device):
            return self._model.tokens(images.to(self._device)).to(KEPT).cpu()

    @torch.no_grad()
    def embeddings(self, view: ModelView, indices: Sequence[int]) -> Tensor:
        """(N,256,g,g) float32 on the model's device, of the slices ``indices`` of ``view``."""
        if self._cache is None:
            with working_precision(self._device):
                return self._model.embed(view.images(indices).to(self._device)).float()
        found = {index: self._cache.get(self._key(view, index)) for index in indices}
        if missing := [index for index, embedding in found.items() if embedding is None]:
            found |= self._embed(self._cache, view, missing)
        return torch.stack([found[index] for index in indices]).to(self._device).float()

    def has(self, view: ModelView, index: int) -> bool:
        """Whether the cache holds the embedding of a slice."""
        return self._cache is not None and self._key(view, index) in self._cache

    def _embed(self, cache: SliceCache, view: ModelView, indices: Sequence[int]) -> dict[int, Tensor]:
        tokens = {index: cache.get(self.tokens_key(view.key, index)) for index in indices}
        if missing := [index for index, own in tokens.items() if own is None]:
            computed = self.tokens(view.images(missing))
            for index, own in zip(missing, computed, strict=True):
                cache.put(self.tokens_key(view.key, index), own)
                tokens[index] = own
        batch = torch.stack([tokens[index] for index in indices]).to(self._device).float()
        with working_precision(self._device):
            embeddings = self._model.embed_tokens(batch).to(KEPT).cpu()
        for index, embedding in zip(indices, embeddings, strict=True):
            cache.put(self._key(view, index), embedding)
        return dict(zip(indices, embeddings, strict=True))

    def _key(self, view: ModelView, index: int) -> str:
        return f"embedding {self._model.encoder_key()} {view.key} {index}"
