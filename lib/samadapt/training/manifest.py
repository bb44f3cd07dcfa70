"""What a model file says of its own making: ``ModelInfo.training``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import samadapt
from samadapt.config import AppConfig
from samadapt.data.cases import Case
from samadapt.evaluation.intervals import DICE, Estimate, estimate
from samadapt.evaluation.metrics import mean, mean_by_class
from samadapt.inference.quality import calibrate
from samadapt.model import AdaptedModel
from samadapt.terminal import plain
from samadapt.training.gate import CaseDice, ClickScores, Measured, Verdict
from samadapt.training.loop import Progress

SOFTWARE = ("torch", "monai", "peft", "pytorch-ignite", "numpy")


def manifest(
    model: AdaptedModel,
    config: AppConfig,
    training: Sequence[Case],
    held_out: Sequence[Case],
    label_hashes: Mapping[str, str],
    done: Progress,
    measured: Measured,
    verdict: Verdict,
    clicks: ClickScores | None,
) -> dict[str, Any]:
    """The facts of a training, as JSON; what the header says besides (recipe, seed, base weights, labels) is not
    repeated.

    Args:
        model: trained.
        config: its settings.
        training: what it learned from.
        held_out: what it was measured on.
        label_hashes: case id -> SHA-256 of the label file, when the training began.
        done: how its loop went.
        measured: what came of it.
        verdict: on its publication.
        clicks: how it follows them; None where that was not measured.
    """
    scores = measured.held_out
    crossed = measured.crossed
    record = {
        "cases": [case.id for case in training],
        "held_out": [case.id for case in held_out],
        "label_sha256": label_hashes,
        "drawn": measured.drawn,
        "weights": config.weights.name if config.weights else f"{model.info.backbone}'s own",
        "settings": dataclasses.asdict(config),
        "held_out_dice": mean_by_class(list(scores.values())),
        "held_out_by_case": scores,
        "calibration": calibrate(
            model.info.labels.names, list(measured.expected.values()), [scores[case] for case in measured.expected]
        ),
        "held_out_interval": intervals(scores) if scores else None,
        "cross_validation": {
            **dataclasses.asdict(crossed),
            "dice": crossed.dice,
            "interval": crossed.interval,
            "method": crossed.method,
        }
        if crossed
        else None,
        "one_click_dice": clicks,
        "prompts": _who_answers(model, clicks),
        "steps": done.step,
        "seconds": round(done.seconds, 1),
        "rounds": done.history,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "software": software(),
        "verdict": verdict,
    }
    return dict(plain(record))


def interval_of(scores: CaseDice) -> Estimate:
    """The mean over classes, over the cases."""
    return estimate((mean(case.values()) for case in scores.values()), DICE)


def intervals(scores: CaseDice) -> dict[str, Any]:
    """Of each class, and of the mean over classes, over the cases."""
    names = next(iter(scores.values()))
    return {
        "classes": {name: estimate((case[name] for case in scores.values()), DICE) for name in names},
        "mean": interval_of(scores),
    }


def software() -> dict[str, str]:
    """Name -> version of what shaped the training."""
    versions = {name: importlib.metadata.version(name) for name in SOFTWARE}
    return {"samadapt": samadapt.__version__, "python": platform.python_version(), **versions}


def _who_answers(model: AdaptedModel, clicks: ClickScores | None) -> str:
    """A model that follows clicks worse than the plain one may answer for classes, but clicks go to the plain one."""
    if not model.takes_prompts:
        return "the plain model answers clicks: this recipe takes none"
    who = "this model" if model.info.answers_prompts else "the plain model"
    if clicks is None:
        return f"{who} answers clicks, as before: a preview is not measured"
    if not clicks.objects:
        return f"{who} answers clicks, as before: there was no object to click on"
    return (
        f"{who} answers clicks: Dice {clicks.adapted:.3f} after one click on {clicks.objects} objects, "
        f"by the plain model {clicks.plain:.3f}"
    )
