"""A few labelled slices in the model frame, and trainings on them that end within seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samadapt.data.labels import resize_label
from samadapt.model import AdaptedModel
from samadapt.training.losses import class_loss
from tiny import SIZE

LABELS = ("left", "right", "tumour")


def images(count: int = 2) -> Tensor:
    """(count,3,S,S) noise in [0,1]; every object of ``labels`` has a brightness of its own."""
    noise = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return 0.2 * noise + 0.25 * labels(count)[:, None]


def labels(count: int = 2) -> Tensor:
    """(count,S,S) int64 with three objects."""
    label = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    label[:, 8:24, 8:32] = 1
    label[:, 32:56, 8:24] = 2
    label[:, 16:48, 40:56] = 3
    return label


def train(model: AdaptedModel, image: Tensor, label: Tensor, steps: int = 1, rate: float = 1e-2) -> None:
    """``steps`` of Adam on all that learns; the model ends in eval mode."""
    optimizer = torch.optim.Adam(model.trainable().values(), lr=rate)
    tokens = model.tokens(image)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        class_loss(model.class_logits(model.embed_tokens(tokens)), label).backward()
        optimizer.step()
    model.eval()


def overfit(model: AdaptedModel, steps: int, rate: float) -> float:
    """Lowest Dice of any class on one slice after a training on it alone."""
    image, label = images(1), labels(1)
    train(model, image, label, steps, rate)
    with torch.no_grad():
        found = model(image).argmax(dim=1)
    truth = resize_label(label, found.shape)
    return min(_dice(found == n + 1, truth == n + 1) for n in range(len(LABELS)))


def gradients(model: AdaptedModel) -> dict[str, Tensor]:
    """What one backward pass in train mode leaves in each parameter that it reaches."""
    model.train()
    class_loss(model(images()), labels()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return found


def reloaded(model: AdaptedModel, base: Callable[[], object], tmp_path, monkeypatch) -> AdaptedModel:
    """``model`` by way of its file, on a new base."""
    monkeypatch.setattr("samadapt.backbones.load", lambda name, weights, image_size: base())
    model.save(tmp_path / "model.safetensors")
    return AdaptedModel.load(tmp_path / "model.safetensors")


def _dice(found: Tensor, truth: Tensor) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))
