"""What enters the first trainable block, computed once for every slice and augmented copy, and kept on disk.

Everything before that block is frozen, so a training that meets a slice again need not run it again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from samadapt.files import cache_path
from samadapt.model import AdaptedModel
from samadapt.training.slices import Draw, PreparedCase, SliceSampler, stack

LARGEST = 4 * 2**30
"""Bytes that the files of one project may take; draws beyond are computed each time."""

LEAST_FREE = 2 * 2**30
"""Bytes that stay free on the disk."""


class TokenCache:
    """Tokens and labels of draws, each in a safetensors file of its own (float16 and uint8).

    Args:
        model: on its device; only its frozen first part is used.
        sampler: reads and augments slices.
        folder: of the files; those of other models and of cases that are gone are removed.
        cases: all cases of this training.
    """

    def __init__(self, model: AdaptedModel, sampler: SliceSampler, folder: Path, cases: Sequence[PreparedCase]) -> None:
        self._model = model
        self._sampler = sampler
        self._device = next(model.parameters()).device
        self._folders = {case.key: folder / _name(case, model) for case in cases}
        if folder.is_dir():
            for stale in set(folder.iterdir()) - set(self._folders.values()):
                shutil.rmtree(stale, ignore_errors=True)
        for own in self._folders.values():
            own.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._bytes = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))

    def batch(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """Tokens (B,...) in the device's working precision and labels (B,S,S) int64, both on the model's device."""
        found = {draw: pair for draw in draws if (pair := self._read(draw)) is not None}
        if missing := [draw for draw in dict.fromkeys(draws) if draw not in found]:
            found |= self._compute(missing)
        tokens, labels = stack(found[draw] for draw in draws)
        return tokens.to(self._device).float(), labels.to(self._device).long()

    def _compute(self, draws: Sequence[Draw]) -> dict[Draw, tuple[Tensor, Tensor]]:
        images, labels = stack(self._sampler.load(draw) for draw in draws)
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            tokens = self._model.tokens(images.to(self._device)).to(torch.float16).cpu()
        computed = dict(zip(draws, zip(tokens, labels.to(torch.uint8), strict=True), strict=True))
        if self._bytes < LARGEST and shutil.disk_usage(self._folder).free > LEAST_FREE:
            for draw, pair in computed.items():
                self._write(self._path(draw), *pair)
        return computed

    def _write(self, path: Path, tokens: Tensor, label: Tensor) -> None:
        with cache_path(path) as temporary:
            save_file({"tokens": tokens.contiguous(), "label": label.contiguous()}, temporary)
        self._bytes += path.stat().st_size

    def _read(self, draw: Draw) -> tuple[Tensor, Tensor] | None:
        path = self._path(draw)
        try:
            tensors = load_file(path)
            return tensors["tokens"], tensors["label"]
        except (SafetensorError, OSError, KeyError):
            return None  # not there, or damaged: computed anew

    def _path(self, draw: Draw) -> Path:
        copy = "plain" if draw.copy is None else draw.copy
        return self._folders[draw.case.key] / f"{draw.index}-{copy}.safetensors"


def _name(case: PreparedCase, model: AdaptedModel) -> str:
    """Changes with the slices and everything else that tokens depend on."""
    info = model.info
    parts = [case.key, case.id, case.context, info.weights_sha256, info.recipe.seed, model.first_trainable_block]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
