"""What a new model must show before annotators meet it, on cases that it has not learned from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import Case
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import Volume
from samadapt.errors import InputError, WeightsError
from samadapt.evaluation.click_simulation import simulate_clicks, widest_slice
from samadapt.evaluation.intervals import DICE, FEWEST, Estimate, estimate
from samadapt.evaluation.metrics import dice
from samadapt.inference.examine import examine
from samadapt.model import AdaptedModel, read_info_if_readable
from samadapt.project import Project
from samadapt.training.crossval import CrossValidation
from samadapt.training.slices import read_case
from samadapt.versions import Versions

CLICKED_OBJECTS = 6
CLICKED_SECONDS = 60.0
"""The comparison of clicks ends after so many objects, or after this time and one object at least."""

CLEARLY_WORSE = 0.3
"""Share of the published model's cross-validated Dice that a candidate's may lack. Folds this short scatter, and a
third case may be harder than the first two; but one wrong label among three spoils its own part and both others."""

CLEARLY_WORSE_OF_ANOTHER_KIND = 0.6
"""The same where one figure is over halves of a case and the other over cases: another patient is harder to find."""

SMALLEST_LOSS = 0.05
"""Difference of two cross-validated Dice below which nothing is clear."""

MUCH_WORSE = 0.2
"""Mean Dice of one structure, over the held-out cases in which it can be measured, that a candidate may lose where its
mean over all structures is higher: what annotators rely on must not be given up for a better mean."""

ROUNDING = 1e-9

CaseDice = dict[str, dict[str, float]]
"""Case id -> class -> Dice 0..1, or NaN."""


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


def measure_cases(
    model: AdaptedModel, cases: Sequence[Case], labels: LabelMap, cache: SliceCache | None = None
) -> tuple[CaseDice, CaseDice]:
    """Every case without prompts, on the native grid.

    Returns:
        Dice of each of ``labels``, of which the model need not know all; NaN where a class is in neither mask, or where
        nobody has looked for it. And the Dice that the model itself expected (``Examination.overlap``).
    """
    true, expected = {}, {}
    own = model.info.labels
    for case in cases:
        volume, truth, report = read_case(case, labels)
        mask, examination = examine(model, volume, cache=cache)
        true[case.id] = dice(_renumbered(mask, own, labels), truth, labels, report.unknown)
        expected[case.id] = dict(zip(own.names, examination.overlap.tolist(), strict=True))
    return true, expected


def _renumbered(mask: np.ndarray, labels: LabelMap, wanted: LabelMap) -> np.ndarray:
    """A mask in the numbers of ``wanted``; classes that are not among them become background."""
    table = np.zeros(len(labels) + 1, np.uint8)
    table[1:] = [wanted.find(name) or 0 for name in labels.names]
    return table[mask]


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
    for volume, wanted, left_out in _objects(cases, labels):
        axis = volume.geometry.acquisition_axis
        place = (axis, widest_slice(wanted, axis))
        scores.append([simulate_clicks(rival, volume, wanted, *place, 1, left_out)[0] for rival in (model, plain)])
        report(len(scores), CLICKED_OBJECTS)
        if len(scores) == CLICKED_OBJECTS or time.monotonic() - started > CLICKED_SECONDS:
            break
    adapted, before = np.mean(scores, axis=0) if scores else (0.0, 0.0)
    return ClickScores(float(adapted), float(before), len(scores))


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may answer annotators.

    Attributes:
        published: whether it may.
        reason: why, or why not, with the figures of both; one sentence.
        current: the version in service when this was found, with which it was compared where that was possible.
        figures: what was compared, for programs; empty without a comparison.
    """

    published: bool
    reason: str
    current: str | None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What is known of how well a candidate finds its classes; nothing of either in the shortest trainings.

    Attributes:
        held_out: its Dice on the held-out cases.
        crossed: where nothing is held out.
        expected: the Dice on the held-out cases that it expected of itself.
    """

    held_out: CaseDice
    crossed: CrossValidation | None = None
    expected: CaseDice = field(default_factory=dict)


def judge(
    measured: Measured,
    held_out: Sequence[Case],
    labels: LabelMap,
    config: AppConfig,
    project: Project,
    cache: SliceCache | None = None,
) -> Verdict:
    """Compare a candidate with the published model, on the same held-out cases.

    The published one stays where its mean over the cases is higher, or one structure is found much better by it
    (``MUCH_WORSE``). Compared are the candidate's classes; one that the published model does not know counts where a
    case shows it. Where the published model's file cannot be used any more, the one before takes its place. Where
    nothing is held out, the published one stays where its own cross-validation was clearly better, see
    ``CLEARLY_WORSE``. Where nothing can be compared, the candidate may answer.

    Args:
        measured: how well the candidate finds its classes.
        held_out: what both are compared on.
        labels: the candidate's.
        config: where the base weights of the published model may be.
        project: whose published model may be replaced.
        cache: where embeddings are looked up and kept.
    """
    current = project.published()
    in_service = current.stem if current else None
    rivals = [*([current] if current else []), *reversed(Versions(project).before_present())]
    if not rivals:
        return Verdict(True, "published: the first model", in_service)
    if not held_out:
        return replace(_by_cross_validation(measured.crossed, labels, rivals), current=in_service)
    for file in rivals:
        if (rival := _load_on_its_base(file, config)) is not None:
            other = measure_cases(rival, held_out, labels, cache)[0]
            new = [name for name in labels.names if rival.info.labels.find(name) is None]
            return replace(_by_held_out(measured.held_out, other, file.stem, new), current=in_service)
    reason = f"published without a comparison: {rivals[0].stem} is damaged, or its base weights are not here any more"
    return Verdict(True, reason, in_service)


def _by_held_out(own: CaseDice, other: CaseDice, current: str, new: Collection[str] = ()) -> Verdict:
    """The verdict on figures of the same classes; ``new`` are those that the other model does not know."""
    comparable = {
        case: {name: score for name, score in scores.items() if name not in new or not math.isnan(other[case][name])}
        for case, scores in own.items()
    }
    pairs = paired(comparable, other)
    if not pairs:
        reason = f"published without a comparison with {current}: the held-out cases show none of the structures"
        return Verdict(True, reason, current)
    after, before = (estimate(side, DICE) for side in zip(*pairs, strict=True))
    difference = estimate((mine - its for mine, its in pairs), (-1.0, 1.0))
    figures = (
        f"held-out Dice {after.mean:.3f}, {current} has {before.mean:.3f} on the same {_cases(len(pairs))} "
        f"({_difference(difference)})"
    )
    if new:
        figures += f"; {current} does not know {', '.join(new)}"
    record = {"held_out": {"candidate": asdict(after), "published": asdict(before), "difference": asdict(difference)}}
    if difference.mean < -ROUNDING:
        return Verdict(False, f"not published, it is worse: {figures}", current, record)
    if lost := _much_worse(own, other):
        return Verdict(False, f"not published, it finds {lost} much worse than {current}: {figures}", current, record)
    return Verdict(True, f"published: {figures}", current, record)


def _much_worse(own: CaseDice, other: CaseDice) -> str:
    """The structures that lose more than ``MUCH_WORSE``, with both figures; empty where none does."""
    lost = []
    for name in dict.fromkeys(name for scores in own.values() for name in scores):
        both = np.array([(scores[name], other[case][name]) for case, scores in own.items()])
        both = both[~np.isnan(both).any(axis=1)]
        after, before = both.mean(axis=0) if len(both) else (0.0, 0.0)
        if before - after > MUCH_WORSE:
            lost.append(f"{name} ({before:.3f} before, {after:.3f} now)")
    return ", ".join(lost)


def _by_cross_validation(own: CrossValidation | None, labels: LabelMap, rivals: Sequence[Path]) -> Verdict:
    unknown = "published: nothing is held out to compare on yet"
    readable = ((file.stem, info) for file in rivals if (info := read_info_if_readable(file)) is not None)
    current, info = next(readable, (rivals[0].stem, None))
    if info is None:
        return Verdict(True, f"{unknown}, and {current} is damaged", current)
    if info.labels != labels:
        return Verdict(True, f"{unknown}, and {current} knows other structures", current)
    other = info.training.get("cross_validation") or {}
    if own is None or other.get("dice") is None:
        which = "this training" if own is None else current
        return Verdict(True, f"{unknown}, and {which} has no cross-validated figure", current)
    same = (own.cases == 1) == (other["cases"] == 1)
    margin = CLEARLY_WORSE if same else CLEARLY_WORSE_OF_ANOTHER_KIND
    before, after = float(other["dice"]), own.dice
    figures = f"{own}; {current} has {before:.3f}, {other['method']}"
    record = {"cross_validation": {"candidate": after, "published": before, "margin": margin}}
    if after < (1 - margin) * before and before - after > SMALLEST_LOSS:
        reason = (
            f"not published, its labels teach clearly less than those before (look for a wrong label among them): "
            f"{figures}"
        )
        return Verdict(False, reason, current, record)
    return Verdict(True, f"{unknown}, and it is not clearly worse: {figures}", current, record)


def paired(own: CaseDice, other: CaseDice) -> list[tuple[float, float]]:
    """Two models' mean Dice on each case, over the same classes; cases without any are left out.

    Where a case does not show a class and one model alone finds some, that one has 0, and the other, which is right, 1.
    """
    pairs = []
    for case, scores in own.items():
        both = np.array([(scores[name], other[case][name]) for name in scores])
        both = both[~np.isnan(both).all(axis=1)]
        if len(both):
            mine, its = np.nan_to_num(both, nan=1.0).mean(axis=0)
            pairs.append((float(mine), float(its)))
    return pairs


def _cases(count: int) -> str:
    return f"{count} case{'s' if count > 1 else ''}"


def _difference(estimate: Estimate) -> str:
    if estimate.count < FEWEST:
        return f"difference {estimate.mean:+.3f}; fewer than {FEWEST} cases give no interval"
    return f"difference {estimate.mean:+.3f}, 95 % interval {estimate.low:+.3f} to {estimate.high:+.3f}"


def _load_on_its_base(path: Path, config: AppConfig) -> AdaptedModel | None:
    """A model of this project on the configured weights, else on its backbone's own; None if it fits neither, or is
    damaged."""
    for weights in dict.fromkeys((config.weights, None)):
        with suppress(WeightsError, InputError):
            return AdaptedModel.load(path, weights)
    return None


def _objects(cases: Sequence[Case], labels: LabelMap) -> Iterator[tuple[Volume, np.ndarray, np.ndarray]]:
    """Volumes with one class each, bool (I,J,K): first one class of every case, in turn, then the next ones.

    And where nobody has labelled, bool (I,J,K).
    """
    for shift in range(len(labels)):
        for number, case in enumerate(cases):
            volume, truth, _ = read_case(case, labels)
            wanted = truth == 1 + (number + shift) % len(labels)
            if wanted.any():
                yield volume, wanted, truth == IGNORE
