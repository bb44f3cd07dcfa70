"""What a new model must show before annotators meet it, on cases that it has not learned from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import Case
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import Volume
from samadapt.errors import WeightsError
from samadapt.evaluation.click_simulation import simulate_clicks, widest_slice
from samadapt.evaluation.metrics import dice, mean, mean_by_class
from samadapt.inference.auto import segment
from samadapt.model import AdaptedModel, read_info
from samadapt.project import Project
from samadapt.training.slices import read_case

CLICKED_OBJECTS = 6
CLICKED_SECONDS = 60.0
"""The comparison of clicks ends after so many objects, or after this time and one object at least."""


@dataclass(frozen=True)
class ClickScores:
    """Mean Dice after one simulated click on each of the same objects.

    Attributes:
        adapted: of the trained model.
        plain: of the base model as it came, at its own image size.
        objects: how many were clicked; 0 leaves both at 0.
    """

    adapted: float
    plain: float
    objects: int


def mean_dice(
    model: AdaptedModel, cases: Sequence[Case], labels: LabelMap, cache: SliceCache | None = None
) -> dict[str, float]:
    """Mean Dice of each class on the native grid, without prompts; empty without cases."""
    scores = []
    for case in cases:
        volume, truth, report = read_case(case, labels)
        scores.append(dice(segment(model, volume, cache=cache), truth, labels, report.unknown))
    return mean_by_class(scores)


def compare_clicks(
    model: AdaptedModel, cases: Sequence[Case], labels: LabelMap, config: AppConfig, report: Callable[[int, int], None]
) -> ClickScores:
    """Click once on some objects, with the trained model and with the plain one.

    Training for classes can cost a model the skill with clicks that its base came with: whoever is better answers. A
    model whose head takes no clicks has none to compare.

    Args:
        model: trained.
        cases: labelled, best those that it has not learned from.
        labels: the model's classes.
        config: of the plain model.
        report: called with (objects clicked, objects in all).
    """
    if not model.takes_prompts:
        return ClickScores(0.0, 0.0, 0)
    plain = recipes.build(recipes.PLAIN, labels, config.backbone, config.weights, config.image_size)
    plain = plain.to(next(model.parameters()).device)
    started, scores = time.monotonic(), []
    for volume, wanted in _objects(cases, labels):
        axis = volume.geometry.acquisition_axis
        index = widest_slice(wanted, axis)
        scores.append([simulate_clicks(rival, volume, wanted, axis, index, 1)[0] for rival in (model, plain)])
        report(len(scores), CLICKED_OBJECTS)
        if len(scores) == CLICKED_OBJECTS or time.monotonic() - started > CLICKED_SECONDS:
            break
    adapted, before = np.mean(scores, axis=0) if scores else (0.0, 0.0)
    return ClickScores(float(adapted), float(before), len(scores))


def judge(
    candidate: Path,
    scores: dict[str, float],
    held_out: Sequence[Case],
    labels: LabelMap,
    config: AppConfig,
    project: Project,
    cache: SliceCache | None = None,
) -> tuple[bool, str]:
    """Publish ``candidate`` unless the published model, with the same labels, is better on the held-out cases.

    Args:
        candidate: a model file of ``project``.
        scores: its ``mean_dice`` on ``held_out``.
        held_out: what both are compared on.
        labels: the candidate's.
        config: where the base weights of the published model may be.
        project: whose published model may be replaced.
        cache: where embeddings are looked up and kept.

    Returns:
        Whether it was published, and why (or why not) in one sentence.
    """
    current = project.published()
    reason = "published: the first model" if current is None else "published: nothing is held out to compare on yet"
    if current is not None and held_out and read_info(current).labels == labels:
        rival = _load_on_its_base(current, config)
        if rival is None:
            reason = f"published without a comparison: the base weights of {current.stem} are not here any more"
        else:
            before, after = mean(mean_dice(rival, held_out, labels, cache).values()), mean(scores.values())
            figures = f"held-out Dice {after:.3f}, {current.stem} has {before:.3f}"
            if after < before:
                return False, f"not published, it is worse: {figures}"
            reason = f"published: {figures}"
    project.publish(candidate)
    return True, reason


def _load_on_its_base(path: Path, config: AppConfig) -> AdaptedModel | None:
    """A model of this project on the configured weights, else on its backbone's own; None if it fits neither."""
    for weights in dict.fromkeys((config.weights, None)):
        try:
            return AdaptedModel.load(path, weights)
        except WeightsError:
            continue
    return None


def _objects(cases: Sequence[Case], labels: LabelMap) -> Iterator[tuple[Volume, np.ndarray]]:
    """Volumes with one class each, bool (I,J,K): first one class of every case, in turn, then the next ones."""
    for shift in range(len(labels)):
        for number, case in enumerate(cases):
            volume, truth, _ = read_case(case, labels)
            wanted = truth == 1 + (number + shift) % len(labels)
            if wanted.any():
                yield volume, wanted
