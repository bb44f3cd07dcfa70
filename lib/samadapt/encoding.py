"""Slices through the encoder, by way of the cache: inference and training share what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from samadapt.data.slice_cache import SliceCache
from samadapt.data.view import ModelView
from samadapt.model import ADAPTED, AdaptedModel

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
        return f"{self._model.frozen_key} {view_key} {index}"

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
        keys = self._keys(view, indices)
        found = self._cache.gather(keys, lambda missing: self._embed(view, [indices[n] for n in missing]))
        return torch.stack(found).to(self._device).float()

    def has(self, view: ModelView, index: int) -> bool:
        """Whether the cache holds the embedding of a slice, undamaged."""
        return self._cache is not None and self._cache.get(self._keys(view, [index])[0]) is not None

    def _embed(self, view: ModelView, indices: Sequence[int]) -> Tensor:
        assert self._cache is not None
        if not self._model.learns_encoder:  # its tokens are its embeddings: one copy is enough
            return self.tokens(view.images(indices))
        keys = [self.tokens_key(view.key, index) for index in indices]
        tokens = self._cache.gather(keys, lambda missing: self.tokens(view.images([indices[n] for n in missing])))
        with working_precision(self._device):
            return self._model.embed_tokens(torch.stack(tokens).to(self._device).float()).to(KEPT).cpu()

    def _keys(self, view: ModelView, indices: Sequence[int]) -> list[str]:
        encoder = self._model.encoder_key()  # of an unmerged model this reads every adapted weight
        return [f"{encoder} {view.key} {index}" for index in indices]


def drop_superseded(cache: SliceCache, in_service: Iterable[AdaptedModel]) -> None:
    """Drop what adapted encoders other than those of ``in_service`` made of slices; tokens of frozen blocks stay."""
    kept = tuple(f"{model.encoder_key()} " for model in in_service)
    cache.drop(lambda key: key.startswith(f"{ADAPTED} ") and not key.startswith(kept))
