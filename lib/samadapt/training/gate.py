"""What a new model must show before annotators meet it, on cases that it has not learned from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import Case
from samadapt.data.labels import IGNORE, LabelMap, same_name
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import Volume
from samadapt.errors import InputError, WeightsError
from samadapt.evaluation.click_simulation import simulate_clicks, widest_slice
from samadapt.evaluation.intervals import DICE, FEWEST, Estimate, estimate
from samadapt.evaluation.metrics import dice, mean
from samadapt.files import known_sha256
from samadapt.inference.examine import examine
from samadapt.model import AdaptedModel, ModelInfo, read_info_if_readable
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
mean over all structures is higher: what annotators rely on must not be given up for a better mean, nor in small steps
from version to version."""

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
        nobody has looked for it. And the Dice that the model itself expected (``Examination.overlap``); NaN for a case
        of which a part is not labelled, since it is expected of the whole.
    """
    true, expected = {}, {}
    own = model.info.labels
    for case in cases:
        volume, truth, report = read_case(case, labels)
        mask, examination = examine(model, volume, cache=cache)
        true[case.id] = dice(_renumbered(mask, own, labels), truth, labels, report.unknown)
        overlap = np.where((truth == IGNORE).any(), math.nan, examination.overlap)
        expected[case.id] = dict(zip(own.names, overlap.tolist(), strict=True))
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
        shown: whether any held-out case shows a structure.
        drawn: the structures that any label shows, of training and held-out cases.
    """

    held_out: CaseDice
    crossed: CrossValidation | None = None
    expected: CaseDice = field(default_factory=dict)
    shown: bool = True
    drawn: tuple[str, ...] = ()


def judge(
    measured: Measured,
    held_out: Sequence[Case],
    labels: LabelMap,
    config: AppConfig,
    project: Project,
    cache: SliceCache | None = None,
) -> Verdict:
    """Compare a candidate with the published model, on the same held-out cases.

    The published one stays where its mean over the structures that both know is higher on the cases that show them, or
    one structure was found much better (``MUCH_WORSE``) by it or by one before it. What the candidate alone knows never
    makes up for that. A person decides where the cases show only what the published model does not know, where their
    labels have changed so that it is much worse by them than it was, and where no label shows a structure any more that
    it has learned. Where the published model's file cannot be used any more, the one before takes its place. Where
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
    verdict = _compared(measured, held_out, labels, config, project, rivals, cache)
    if verdict.published and (gone := _gone(measured, rivals)):
        verdict = _without_labels(*gone)
    return replace(verdict, current=in_service)


def _compared(
    measured: Measured,
    held_out: Sequence[Case],
    labels: LabelMap,
    config: AppConfig,
    project: Project,
    rivals: Sequence[Path],
    cache: SliceCache | None,
) -> Verdict:
    """The verdict on figures, against the first of ``rivals`` that can still be used."""
    if not held_out:
        nothing = "nothing is held out to compare on yet"
        return _by_cross_validation(measured.crossed, labels, rivals, nothing)
    for file in rivals:
        if (rival := _load_on_its_base(file, config)) is not None:
            other = measure_cases(rival, held_out, labels, cache)[0]
            earlier = _noted_before(project, held_out, labels)
            verdict = _by_held_out(measured.held_out, other, file.stem, rival.info.labels, earlier)
            if verdict is None or (verdict.published and not measured.shown):
                nothing = "the held-out cases show none of the structures"
                verdict = _by_cross_validation(measured.crossed, labels, [file], nothing)
            if verdict.published and (fallen := _fallen(rival.info, held_out, other)):
                verdict = _relabelled(fallen, file.stem)
            return verdict
    reason = f"published without a comparison: {rivals[0].stem} is damaged, or its base weights are not here any more"
    return Verdict(True, reason, None)


def _gone(measured: Measured, rivals: Sequence[Path]) -> tuple[str, list[str]] | None:
    """The last model that can be read, and the structures that labels showed when it was made and none shows now."""
    version, info = _first_readable(rivals)
    now = {same_name(name) for name in measured.drawn}
    before = info.training.get("drawn", []) if info else []
    names = [name for name in before if same_name(name) not in now]
    return (version, names) if names else None


def _first_readable(files: Sequence[Path]) -> tuple[str, ModelInfo | None]:
    """The first model whose header can be read, and that; where none can, the first's name and None."""
    readable = ((file.stem, info) for file in files if (info := read_info_if_readable(file)) is not None)
    return next(readable, (files[0].stem, None))


def _without_labels(current: str, names: Sequence[str]) -> Verdict:
    """Renamed by mistake, or given up; only a person can tell."""
    reason = (
        f"not published, no label shows {', '.join(names)} any more, which {current} has learned; submit labels with "
        "that name again, or if it is given up or renamed, `samadapt models promote` puts this one in service"
    )
    return Verdict(False, reason, current)


def _fallen(info: ModelInfo, held_out: Sequence[Case], now: CaseDice) -> dict[str, tuple[float, float]]:
    """Held-out cases with other labels than when a model was made, by which it is much worse than it was then.

    Returns:
        Case id -> its mean Dice then and ``now``, over what both can tell.
    """
    hashes, noted = info.training.get("label_sha256") or {}, info.training.get("held_out_by_case") or {}
    found = {}
    for case in held_out:
        if not case.label or case.id not in noted or known_sha256(case.label) == hashes.get(case.id):
            continue
        then = _named({case.id: noted[case.id]}, LabelMap(tuple(now[case.id])))[case.id]
        both = [(then[name], value) for name, value in now[case.id].items() if not math.isnan(then[name] + value)]
        if both and (pair := np.mean(both, axis=0))[0] - pair[1] > MUCH_WORSE:
            found[case.id] = (float(pair[0]), float(pair[1]))
    return found


def _relabelled(fallen: Mapping[str, tuple[float, float]], current: str) -> Verdict:
    """Either the labels were wrong before, or they are now; only a person can tell."""
    told = ", ".join(f"{case} ({then:.3f} then, {now:.3f} now)" for case, (then, now) in fallen.items())
    reason = (
        f"not published, labels to judge it by have changed: {current} is much worse by those of {told}; look at them, "
        "and if they are right, `samadapt models promote` puts this one in service"
    )
    return Verdict(False, reason, current)


def _by_held_out(
    own: CaseDice, other: CaseDice, current: str, known: LabelMap, earlier: Mapping[str, CaseDice]
) -> Verdict | None:
    """The verdict on figures of the candidate's classes.

    Args:
        own: the candidate's.
        other: of the model that it is compared with, on the same cases.
        current: the other's name.
        known: what the other knows.
        earlier: version -> what others before it had; see ``_noted_before``.

    Returns:
        None where the cases show none of the classes, and nothing was found there.
    """
    shown = _shown(own, other)
    new = [name for name in _names(shown) if known.find(name) is None]
    compared, alarms = (paired(_only(scores, known), other) for scores in (shown, own))
    if new and not compared:
        return _strangers(f"the held-out cases show {', '.join(new)}", current, known)
    if not alarms:
        return None
    fell, lost = _fell(compared), _much_worse(own, {**earlier, current: other})
    spurious = _fell(alarms) and not (fell or lost)
    figures, record = _figures(alarms if spurious or not compared else compared, current)
    if unknown := [name for name in _names(own) if known.find(name) is None]:
        figures += f"; {current} does not know {_with_dice(unknown, shown)}"
    if fell:
        worse = f"; much worse: {lost}" if lost else ""
        return Verdict(False, f"not published, it is worse: {figures}{worse}", current, record)
    if lost:
        return Verdict(False, f"not published, it finds a structure much worse: {lost}; {figures}", current, record)
    if spurious:
        what = "it finds more than before where there are none of the structures"
        return Verdict(False, f"not published, {what}: {figures}", current, record)
    return Verdict(True, f"published: {figures}", current, record) if compared else None


def _shown(own: CaseDice, other: CaseDice) -> CaseDice:
    """``own`` without what a case does not show: there a model that finds nothing has NaN.

    (Where both find what is not shown, both have 0, which tells nothing and changes nothing.)
    """
    return {
        case: {name: score for name, score in scores.items() if not math.isnan(score + other[case][name])}
        for case, scores in own.items()
    }


def _only(scores: CaseDice, known: LabelMap) -> CaseDice:
    return {
        case: {name: score for name, score in by_name.items() if known.find(name) is not None}
        for case, by_name in scores.items()
    }


def _names(scores: CaseDice) -> list[str]:
    return list(dict.fromkeys(name for by_name in scores.values() for name in by_name))


def _fell(pairs: Sequence[tuple[float, float]]) -> bool:
    return bool(pairs) and float(np.mean([mine - its for mine, its in pairs])) < -ROUNDING


def _figures(pairs: Sequence[tuple[float, float]], current: str) -> tuple[str, dict[str, Any]]:
    """For people, and for programs."""
    after, before = (estimate(side, DICE) for side in zip(*pairs, strict=True))
    difference = estimate((mine - its for mine, its in pairs), (-1.0, 1.0))
    text = (
        f"held-out Dice {after.mean:.3f}, {current} has {before.mean:.3f} on the same {_cases(len(pairs))} "
        f"({_difference(difference)})"
    )
    return text, {
        "held_out": {"candidate": asdict(after), "published": asdict(before), "difference": asdict(difference)}
    }


def _with_dice(names: Sequence[str], shown: CaseDice) -> str:
    """The names, with the candidate's mean Dice where a case shows them."""
    found = {name: [scores[name] for scores in shown.values() if name in scores] for name in names}
    return ", ".join(f"{name} (Dice {mean(scores):.3f})" if scores else name for name, scores in found.items())


def _strangers(what: str, current: str, known: LabelMap) -> Verdict:
    """Names that the other model does not know are new structures, or mistyped; only a person can tell."""
    reason = (
        f"not published, it cannot be compared: {what}, which {current} does not know (it knows "
        f"{', '.join(known.names)}); if these names are meant, `samadapt models promote` puts it in service"
    )
    return Verdict(False, reason, current)


def _much_worse(own: CaseDice, rivals: Mapping[str, CaseDice]) -> str:
    """The structures that lose more than ``MUCH_WORSE`` against the best of ``rivals`` (version -> figures), on the
    cases that both were measured on, with both figures; empty where none does."""
    lost = []
    for name in _names(own):
        losses = [(before - after, rival, before, after) for rival, before, after in _in_both(own, rivals, name)]
        loss, rival, before, after = max(losses, default=(0.0, "", 0.0, 0.0))
        if loss > MUCH_WORSE:
            lost.append(f"{name} ({before:.3f} by {rival}, {after:.3f} now)")
    return ", ".join(lost)


def _in_both(own: CaseDice, rivals: Mapping[str, CaseDice], name: str) -> Iterator[tuple[str, float, float]]:
    """Each rival with its mean Dice and the candidate's, over the cases in which both are defined."""
    for rival, scores in rivals.items():
        both = [(scores.get(case, {}).get(name, math.nan), by_name[name]) for case, by_name in own.items()]
        both = [pair for pair in both if not math.isnan(sum(pair))]
        if both:
            before, after = np.mean(both, axis=0)
            yield rival, float(before), float(after)


def _noted_before(project: Project, held_out: Sequence[Case], labels: LabelMap) -> dict[str, CaseDice]:
    """Version -> what it noted of those held-out cases whose labels are still the same, under the candidate's names."""
    now = {case.id: known_sha256(case.label) for case in held_out if case.label}
    found = {}
    for file in Versions(project).since_promoted():
        info = read_info_if_readable(file)
        noted = info.training if info else {}
        then, scores = noted.get("label_sha256") or {}, noted.get("held_out_by_case") or {}
        found[file.stem] = _named(
            {case: scores[case] for case in scores if case in now and now[case] == then.get(case)}, labels
        )
    return found


def _named(noted: Mapping[str, Mapping[str, float | None]], labels: LabelMap) -> CaseDice:
    """Figures of a manifest, in which NaN is null, under the names of ``labels``; NaN for those that it lacks."""
    found: CaseDice = {}
    for part, scores in noted.items():
        own = {same_name(name): score for name, score in scores.items()}
        values = {name: own.get(same_name(name)) for name in labels.names}
        found[part] = {name: math.nan if value is None else float(value) for name, value in values.items()}
    return found


def _by_cross_validation(
    own: CrossValidation | None, labels: LabelMap, rivals: Sequence[Path], nothing: str
) -> Verdict:
    """The verdict on cross-validated figures of what both know; ``nothing`` says why it takes these."""
    unknown = f"published: {nothing}"
    current, info = _first_readable(rivals)
    if info is None:
        return Verdict(True, f"{unknown}, and {current} is damaged", current)
    shared = [name for name in labels.names if info.labels.find(name) is not None]
    if not shared:
        return _strangers(f"it knows {', '.join(labels.names)}", current, info.labels)
    mine, its = _crossed_over(own, shared), _crossed_over(_noted_crossed(info), shared)
    if mine is None or its is None:
        which = "this training" if mine is None else current
        return Verdict(True, f"{unknown}, and {which} has no cross-validated figure", current)
    same = (mine.cases == 1) == (its.cases == 1)
    margin = CLEARLY_WORSE if same else CLEARLY_WORSE_OF_ANOTHER_KIND
    before, after = its.dice, mine.dice
    figures = f"{mine}; {current} has {before:.3f}, {its.method}"
    record = {"cross_validation": {"candidate": after, "published": before, "margin": margin}}
    if after < (1 - margin) * before and before - after > SMALLEST_LOSS:
        reason = (
            f"not published, its labels teach clearly less than those before (look for a wrong label among them): "
            f"{figures}"
        )
        return Verdict(False, reason, current, record)
    return Verdict(True, f"{unknown}, and it is not clearly worse: {figures}", current, record)


def _noted_crossed(info: ModelInfo) -> CrossValidation | None:
    noted = info.training.get("cross_validation")
    return CrossValidation(noted["cases"], _named(noted["scores"], info.labels), noted["seconds"]) if noted else None


def _crossed_over(crossed: CrossValidation | None, names: Sequence[str]) -> CrossValidation | None:
    """The same over these structures alone; None where it has no figure of any."""
    if crossed is None:
        return None
    found = replace(crossed, scores=_named(crossed.scores, LabelMap(tuple(names))))
    return None if math.isnan(found.dice) else found


def paired(own: CaseDice, other: CaseDice) -> list[tuple[float, float]]:
    """Two models' mean Dice on each case, over the same classes; cases without any are left out.

    Where a case does not show a class and one model alone finds some, that one has 0, and the other, which is right, 1.
    """
    pairs = []
    for case, scores in own.items():
        both = np.array([(scores[name], other[case][name]) for name in scores]).reshape(-1, 2)
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
