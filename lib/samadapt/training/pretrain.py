"""Continued pretraining of a backbone's image encoder on images without labels, by masked image modelling.

The finetune-SAM study (Gu et al., arXiv 2404.09957) calls it setup 3: going on from SAM's weights on unlabelled images
of the kind that is to be segmented, before any label is used. How images are masked: ``samadapt.training.masking``.

The result is a weights file of the same backbone: every key of the base, and only its image encoder changed. What
depends on the image size (SAM's absolute and global relative positions) stays the base's, so the file loads at any
size as the base does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from samadapt import __version__, backbones
from samadapt.backbones import weights as weights_files
from samadapt.backbones.checkpoint import read_checkpoint
from samadapt.backbones.weights import WeightsFile
from samadapt.data.cases import Case
from samadapt.encoding import working_precision
from samadapt.errors import ConfigError, InputError, SamAdaptError, StateError
from samadapt.files import atomic_path, sha256_of
from samadapt.training import checkpoint, pretrain_picture
from samadapt.training.loop import Budget
from samadapt.training.masking import MaskedAutoencoder, draw_hidden, hide, reconstruction, reconstruction_loss
from samadapt.training.pretrain_loop import SEED, PretrainProgress, PretrainTrainer, Report
from samadapt.training.unlabelled import PreparedImage, examples, prepare_images

FORMAT = "samadapt-weights-1"

METHOD = 1
"""Version of how the weights are learned: raise it with any change, and a run begun before is not continued."""

SHOWN = 4
"""Slices in the picture."""

MINUTES = 30.0
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Pretraining:
    """What to pretrain, and for how long.

    Attributes:
        backbone: registry name.
        weights: the base weights file; None finds the published one as ``samadapt.backbones.load`` does.
        image_size: side S of the square input in pixels, a multiple of 32.
        minutes: wall-clock time of the training, over all resumed parts; None: only ``steps`` ends it.
        steps: optimiser steps; None: only ``minutes`` ends it.
    """

    backbone: str = "lite_medsam"
    weights: Path | None = None
    image_size: int = 128
    minutes: float | None = MINUTES
    steps: int | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.minutes, self.steps) if limit is not None]
        if not limits or min(limits) <= 0:
            raise ConfigError("a pretraining needs an end", where="minutes, steps", remedy="Give one of them, above 0.")

    @property
    def budget(self) -> Budget:
        """Both limits, the absent one out of reach."""
        seconds = math.inf if self.minutes is None else 60 * self.minutes
        return Budget(seconds, sys.maxsize if self.steps is None else self.steps)


@dataclass(frozen=True)
class PretrainResult:
    """How a pretraining ended.

    Attributes:
        weights: the new weights file.
        sha256: hex SHA-256 of it: what models adapted on it remember.
        picture: PNG of slices that were masked and reconstructed, before and after.
        backbone: registry name.
        base_sha256: hex SHA-256 of the weights that it began with.
        image_size: side S of the slices, pixels.
        images: how many were learned from.
        skipped: ids of those that could not be used.
        steps: optimiser steps.
        seconds: time in the training loop.
        loss: smoothed over the last steps; see ``samadapt.training.masking.reconstruction_loss``.
        shown_before, shown_after: the loss on the slices of the picture, which were masked alike both times.
    """

    weights: Path
    sha256: str
    picture: Path
    backbone: str
    base_sha256: str
    image_size: int
    images: int
    skipped: list[str]
    steps: int
    seconds: float
    loss: float
    shown_before: float
    shown_after: float


def pretrain(
    cases: Sequence[Case],
    output: Path,
    wanted: Pretraining,
    report: Report | None = None,
    note: Callable[[str], None] | None = None,
) -> PretrainResult:
    """Pretrain on the images of ``cases``, labelled or not, and write the weights to ``output``.

    A run that was killed goes on from its last checkpoint, in ``<output>.part``, when it is called again; one that
    has ended gives its result again.

    Args:
        cases: their labels are not read.
        output: a .safetensors file; a .png of the same name is written beside it.
        wanted: backbone, size and budget.
        report: told what is done, and which share of the time is over, 0..1.
        note: told what people should know: images that cannot be used, a run that goes on.

    Raises:
        ConfigError: an unknown backbone, an image size that it cannot take, another suffix than .safetensors, or
            ``output`` beside the images.
        InputError: no image that can be read, or ``output`` cannot be written.
        WeightsError: the base weights are missing, broken, or those of another backbone.
        StateError: ``output`` or its unfinished run was made with other settings, another process writes it, or the
            loss is no longer a number.
    """
    report, note = report or _silent, note or _silent
    output = _writable_name(output, cases)
    base = weights_files.resolve(backbones.spec(wanted.backbone).source, wanted.weights)
    settings = _settings(wanted, base)
    _refuse_replacing(output, settings)
    with _workplace(output) as folder:
        if not output.is_file():
            weights, picture = _Run(wanted, base, folder, report, note).make(cases)
            os.replace(picture, _picture(output))
            os.replace(weights, output)
        shutil.rmtree(folder, ignore_errors=True)
    return _result(output)


class _Run:
    """One pretraining, from the images to the finished files in ``folder``.

    Args:
        wanted: backbone, size and budget.
        base: the weights to begin with.
        folder: for everything that is not finished.
        report, note: see ``pretrain``.

    Raises:
        StateError: ``folder`` holds the unfinished run of other settings.
    """

    def __init__(
        self, wanted: Pretraining, base: WeightsFile, folder: Path, report: Report, note: Callable[[str], None]
    ) -> None:
        self._wanted = wanted
        self._base = base
        self._settings = _settings(wanted, base)
        self._folder = folder
        self._checkpoint = folder / CHECKPOINT
        self._report = report
        self._note = note
        self._skipped: list[str] = []
        _refuse_continuing(self._checkpoint, self._settings)
        report("loading the backbone", 0.0)
        self._model = MaskedAutoencoder(backbones.load(wanted.backbone, base.path, wanted.image_size))
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    def make(self, cases: Sequence[Case]) -> tuple[Path, Path]:
        """Train, from the checkpoint if there is one; the weights file and the picture."""
        images = self._prepare(cases)
        look = _Look(self._model, examples(images, SHOWN))
        before = look.reconstructed()
        done = self._train(images)
        after = look.reconstructed()
        picture = self._folder / "look.png"
        look.draw(picture, before, after)
        self._report("writing the weights", 1.0)
        return self._write(done, images, {"shown_before": before[1], "shown_after": after[1]}), picture

    def _prepare(self, cases: Sequence[Case]) -> list[PreparedImage]:
        def told(done: int, total: int) -> None:
            self._report(f"preparing {total} images", done / total)

        return prepare_images(cases, self._wanted.image_size, self._folder / "slices", told, self._skip)

    def _skip(self, case: Case, error: InputError) -> None:
        self._skipped.append(case.id)
        self._note(f"{case.id} is left out: {error}")

    def _train(self, images: Sequence[PreparedImage]) -> PretrainProgress:
        trainer = PretrainTrainer(
            self._model,
            _learned(self._model.backbone),
            images,
            self._wanted.budget,
            self._settings,
            self._checkpoint,
            self._report,
        )
        if trainer.resume():
            self._note(f"Going on from step {trainer.progress.step}.")
        if trainer.images_changed:
            self._note("The folder's images have changed since; the run goes on with those of now.")
        return trainer.run()

    def _write(self, done: PretrainProgress, images: Sequence[PreparedImage], shown: dict[str, float]) -> Path:
        """The base's checkpoint with the learned tensors in place of its own."""
        header = {
            "format": FORMAT,
            "samadapt": __version__,
            "settings": self._settings,
            "backbone": self._wanted.backbone,
            "base_sha256": self._base.sha256,
            "image_size": self._wanted.image_size,
            "images": len(images),
            "skipped": self._skipped,
            "steps": done.step,
            "seconds": round(done.seconds, 1),
            "loss": done.loss,
            **shown,
        }
        tensors = {key: tensor.clone().contiguous() for key, tensor in read_checkpoint(self._base.path).items()}
        for key, parameter in _learned(self._model.backbone).items():
            tensors[key] = parameter.detach().to("cpu", tensors[key].dtype).contiguous()
        path = self._folder / "weights.safetensors"
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"samadapt": json.dumps(header)})
        return path


class _Look:
    """A few slices, always masked alike, through ``model``: what people see of it.

    Args:
        model: on its device.
        images: (B,3,S,S) in [0,1].
    """

    def __init__(self, model: MaskedAutoencoder, images: Tensor) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._images = images.to(device)
        self._hidden = draw_hidden(len(images), images.shape[-1], SEED).to(device)

    @torch.no_grad()
    def reconstructed(self) -> tuple[Tensor, float]:
        """(B,3,S,S) in [0,1] as the model reconstructs it now, and its loss."""
        with working_precision(self._images.device):
            predicted, _ = self._model(self._images, self._hidden)
        loss = reconstruction_loss(predicted, self._images, self._hidden)
        return reconstruction(predicted, self._images, self._hidden), float(loss)

    def draw(self, path: Path, before: tuple[Tensor, float], after: tuple[Tensor, float]) -> None:
        """The picture of two results of ``reconstructed``."""
        columns = (self._images, hide(self._images, self._hidden), before[0], after[0])
        pretrain_picture.draw(path, columns, (before[1], after[1]))


def _learned(backbone: backbones.Backbone) -> dict[str, nn.Parameter]:
    """The encoder's parameters by checkpoint key, without those that belong to one image size."""
    sized = set(backbones.spec(backbone.name).adapted_keys(backbone))
    return {
        name: parameter
        for name, parameter in backbone.named_parameters()
        if name.startswith("image_encoder.") and name not in sized
    }


def _settings(wanted: Pretraining, base: WeightsFile) -> dict[str, Any]:
    """What two runs must have in common to be the same one; the keys are words of the command line."""
    return {
        "backbone": wanted.backbone,
        "weights": base.sha256,
        "image-size": wanted.image_size,
        "minutes": wanted.minutes,
        "steps": wanted.steps,
        "method": METHOD,
    }


def _writable_name(output: Path, cases: Sequence[Case]) -> Path:
    output = output.expanduser().resolve()
    if output.suffix != ".safetensors":
        raise ConfigError(
            f"weights are not written as {output.suffix or 'a file without a suffix'}",
            where=output,
            remedy="Choose a name that ends in .safetensors.",
        )
    if output.is_dir():
        raise InputError("is a folder", where=output, remedy="Name a file.")
    if any(case.image.parent.resolve() == output.parent for case in cases):
        raise ConfigError(
            "its picture would count as one of the images that lie there", where=output, remedy="Choose another folder."
        )
    return output


def _picture(output: Path) -> Path:
    return output.with_suffix(".png")


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """The folder of what is not finished, for this process alone."""
    folder = output.with_name(f"{output.name}.part")
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise StateError(
            "another process is writing this file", where=output, remedy="Wait for its end, or stop it."
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror})", where=output, remedy="Choose a folder that you may write to."
        ) from error
    try:
        yield folder
    except SamAdaptError:
        if not (folder / CHECKPOINT).exists():  # nothing that would be worth going on from
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


def _refuse_replacing(output: Path, settings: dict[str, Any]) -> None:
    """A finished file may be the base of adapted models; only the run that made it may find it there."""
    if not output.exists():
        return
    header = read_header(output)
    if header is None or header["settings"] != settings:
        other = f" and was made with other settings ({_difference(header['settings'], settings)})" if header else ""
        raise StateError(
            f"exists already{other}",
            where=output,
            remedy="Choose another name, or remove it if no adapted model needs it as its base.",
        )


def _refuse_continuing(file: Path, settings: dict[str, Any]) -> None:
    state = checkpoint.peek(file)
    if state is not None and state["settings"] != settings:
        raise StateError(
            f"an unfinished run has other settings ({_difference(state['settings'], settings)})",
            where=file.parent,
            remedy="Give the same settings to go on with it, or delete that folder to begin anew.",
        )


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)

    differing = [key for key in here if there.get(key) != here[key]]
    return ", ".join(f"{key} {shown(there.get(key))} there, {shown(here[key])} here" for key in differing)


def read_header(path: Path) -> dict[str, Any] | None:
    """What ``pretrain`` wrote about the file at ``path``; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["samadapt"])
        return header if header["format"] == FORMAT else None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _result(output: Path) -> PretrainResult:
    header = read_header(output)
    assert header is not None
    told = {field.name: header[field.name] for field in fields(PretrainResult) if field.name in header}
    return PretrainResult(weights=output, sha256=sha256_of(output), picture=_picture(output), **told)


def _silent(*told: Any) -> None:
    return None
