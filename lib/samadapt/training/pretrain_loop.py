"""The loop of continued pretraining: AdamW with warm-up and a cosine, clipping, and checkpoints to go on from."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samadapt.encoding import working_precision
from samadapt.errors import StateError
from samadapt.training import checkpoint
from samadapt.training.loop import CLIP, Budget, schedule
from samadapt.training.masking import MaskedAutoencoder, distance, draw_hidden, reconstruction_loss
from samadapt.training.unlabelled import ImageSampler, PreparedImage

ENCODER_RATE = 1e-4
"""AdamW's peak learning rate of the encoder: low, since it goes on from weights that are good already."""

DECODER_RATE = 1e-3

ANCHOR = 1.0
"""Weight of the distance to the base's embedding beside the loss of the pixels."""

WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.95)
WARMUP = 0.05
BATCH_SIZE = 8
SEED = 0

CHECKPOINT_SECONDS = 30.0
"""Time between two checkpoints; more where writing one would take more than ``CHECKPOINT_SHARE`` of the time."""

CHECKPOINT_SHARE = 0.05

REPORT_SECONDS = 2.0

Report = Callable[[str, float], None]


@dataclass
class PretrainProgress:
    """Where a pretraining stands; part of every checkpoint.

    Attributes:
        step: optimiser steps done.
        seconds: time spent in the loop by earlier processes, and after the end by all of them.
        loss: smoothed over the last steps.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float | None = None


class PretrainTrainer:
    """Trains the image encoder of ``model`` in place, and its decoder.

    Args:
        model: on its device, frozen, with the base's weights.
        learned: those parameters of its backbone that learn, by name; its decoder learns beside them.
        images: to draw slices from.
        budget: when to end; the learning rates fall over the same stretch.
        settings: what a checkpoint must have been made with.
        file: the checkpoint.
        report: see ``samadapt.training.pretrain.pretrain``.

    Attributes:
        progress: where it stands.
        images_changed: the checkpoint was made with other images.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        learned: Mapping[str, nn.Parameter],
        images: Sequence[PreparedImage],
        budget: Budget,
        settings: dict[str, Any],
        file: Path,
        report: Report,
    ) -> None:
        self._model = model
        self._base = copy.deepcopy(model.backbone)
        self._sampler = ImageSampler(images, model.backbone.image_size, BATCH_SIZE, SEED)
        self._budget = budget
        self._settings = settings
        self._images = hashlib.sha256("".join(image.key for image in images).encode()).hexdigest()
        self._file = file
        self._report = report
        self._parameters = {**learned, **dict(model.decoder.named_parameters(prefix="decoder"))}
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(_groups(self._parameters), betas=BETAS, fused=True)
        self._device = next(model.parameters()).device
        self._reported = self._saved = self._started = time.monotonic()
        self._saving = 0.0
        self.progress = PretrainProgress()
        self.images_changed = False

    def resume(self) -> bool:
        """Take over from the checkpoint, if there is one; whether there was."""
        state = checkpoint.peek(self._file)
        if state is None:
            return False
        checkpoint.restore(self._file, self._parameters, {}, self._optimizer)
        self.progress = PretrainProgress(**state["progress"])
        self.images_changed = state["images"] != self._images
        return True

    def run(self) -> PretrainProgress:
        """Train to the end of the budget.

        Raises:
            StateError: the loss is no longer a number.
        """
        self._started = self._saved = time.monotonic()
        while (used := self._used()) < 1:
            self._step(used)
            if time.monotonic() - self._saved >= max(CHECKPOINT_SECONDS, self._saving / CHECKPOINT_SHARE):
                self._save()
            self._tell()
        self._save()
        self.progress.seconds = self._seconds()
        return self.progress

    def _step(self, used: float) -> None:
        progress = self.progress
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(used, WARMUP)
        images = self._sampler.batch(progress.step).to(self._device)
        hidden = draw_hidden(len(images), images.shape[-1], (SEED << 32) + progress.step).to(self._device)
        with working_precision(self._device):
            predicted, embedding = self._model(images, hidden)
            with torch.no_grad():
                base = self._base.embed(images)
        pixels = reconstruction_loss(predicted, images, hidden)
        loss = pixels + ANCHOR * distance(embedding, base)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), CLIP)
        self._optimizer.step()
        value = float(pixels.detach())
        if not math.isfinite(value):
            raise StateError(
                f"the loss became {value} at step {progress.step}",
                where=self._file.parent,
                remedy="Check the images (samadapt doctor --studies), delete that folder and begin anew.",
            )
        progress.step += 1
        progress.loss = value if progress.loss is None else 0.95 * progress.loss + 0.05 * value

    def _save(self) -> None:
        started = time.monotonic()
        progress = {**asdict(self.progress), "seconds": self._seconds()}
        state = {"settings": self._settings, "images": self._images, "progress": progress}
        checkpoint.save(self._file, self._parameters, {}, self._optimizer, state)
        self._saved = time.monotonic()
        self._saving = self._saved - started

    def _tell(self) -> None:
        now, used = time.monotonic(), self._used()
        if now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        left = self._seconds() * (1 - used) / used
        left_text = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        self._report(f"step {self.progress.step}, loss {self.progress.loss:.3f}, {left_text} left", used)

    def _seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self._started

    def _used(self) -> float:
        return self._budget.used(self._seconds(), self.progress.step)


def _groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """AdamW's parameter groups: the decoder learns faster; norms and biases are not decayed."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = DECODER_RATE if name.startswith("decoder.") else ENCODER_RATE
        decay = 0.0 if parameter.ndim < 2 or "bias" in name else WEIGHT_DECAY
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
