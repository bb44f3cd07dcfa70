"""One training from labelled cases to a published model."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from samadapt import backbones, recipes
from samadapt.config import AppConfig
from samadapt.data.cases import Case, assume
from samadapt.data.geometry import Geometry
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.window import Window, choose_window
from samadapt.errors import SamAdaptError, StateError
from samadapt.evaluation.intervals import Estimate
from samadapt.evaluation.metrics import mean_by_class
from samadapt.files import sha256_of
from samadapt.model import AdaptedModel, ModelInfo, read_info_if_readable
from samadapt.project import Project
from samadapt.recipes import Recipe
from samadapt.terminal import plain
from samadapt.training import checkpoint, crossval, preview
from samadapt.training.crossval import CrossValidation
from samadapt.training.gate import ClickScores, Measured, Verdict, compare_clicks, judge, measure_cases
from samadapt.training.ledger import Ledger, roles_in
from samadapt.training.loop import ROUNDS, Budget, Progress, Trainer
from samadapt.training.manifest import interval_of, manifest
from samadapt.training.slices import PreparedCase, few_slices, partly_labelled, prepare, read_case, shown_in
from samadapt.training.snapshot import keep_labels
from samadapt.training.synthetic import RANGES, SyntheticSlices
from samadapt.versions import Versions

CPU_IMAGE_SIZE = 128
"""Largest automatic image size without a GPU, in pixels: beyond it a training of minutes sees too few slices."""

SMALLEST_IMAGE_SIZE = 64

NOT_FOUND = 0.05
"""Held-out Dice below which a structure counts as not found."""

LOCK_SECONDS = 10.0
"""A training whose server is gone needs so long to notice it."""

STATUS_SECONDS = 1.0
"""Shortest time between two progress records."""

ProgressCallback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        model: the candidate's file.
        published: whether it answers annotators now.
        reason: why, or why not; one sentence.
        dice: mean held-out Dice of each class on the native grid; empty without held-out cases.
        interval: the mean over classes, and its confidence interval over the held-out cases; None without any.
        cross_validation: what is known instead; None with held-out cases, and where it was not measured.
        clicks: how it follows clicks beside the plain model; the better one answers them.
        steps: optimiser steps.
        seconds: time in the training loop.
        remarks: what people should know beside it: labels whose names did not fit, structures that were not found.
    """

    model: Path
    published: bool
    reason: str
    dice: dict[str, float]
    interval: Estimate | None
    cross_validation: CrossValidation | None
    clicks: ClickScores
    steps: int
    seconds: float
    remarks: list[str]


@dataclass(frozen=True)
class Plan:
    """What the training cases decide: the window, and the size of the model frame."""

    window: Window
    image_size: int


def train(
    cases: Sequence[Case],
    labels: LabelMap,
    config: AppConfig,
    project: Project,
    progress: ProgressCallback | None = None,
) -> TrainResult:
    """Train on the labelled ones of ``cases`` and publish the result if it is no worse than what is published.

    A training that was killed goes on from its last checkpoint when it is called again with the same cases and
    settings. The published model, where it has the same labels and recipe, is the starting point.

    Args:
        cases: labelled and unlabelled ones.
        labels: the classes to learn, in the model's order.
        config: recipe, backbone, budget.
        project: where models, ledger and training state are kept.
        progress: called with the same records as ``project.status()`` gives.

    Raises:
        ConfigError: the recipe does not take one of the settings.
        StateError: no labelled case, no label of ``labels`` in any of them, or another training of this folder runs.
        InputError: a case that cannot be read; the message names it.
    """
    recipes.check(config)
    with _alone(project):
        log = _Status(project, progress)
        try:
            labelled = assume((case for case in cases if case.label), config.coverage)
            return _Training(labelled, labels, config, project, log).run()
        except SamAdaptError as error:
            log.end("failed", str(error))
            raise
        except Exception as error:
            log.end("failed", f"{type(error).__name__}: {error}")
            raise


class _Training:
    """What the steps of one training share.

    Args:
        cases: labelled ones.
        labels: the classes to learn.
        config: recipe, backbone, budget.
        project: where everything is kept.
        log: told of every step.
    """

    def __init__(
        self, cases: Sequence[Case], labels: LabelMap, config: AppConfig, project: Project, log: _Status
    ) -> None:
        if not cases:
            raise StateError("no case is labelled yet", remedy="Submit at least one label, then train.")
        self._versions = Versions(project)
        ledger = Ledger(project.ledger, roles_in(self._versions.manifests()))
        cases = keep_labels(cases, project.training / "labels")
        self._training, self._held_out = ledger.split(cases, lambda case: shown_in(case, labels))
        self._restored = ledger.restored
        if not self._training:
            raise StateError(
                f"all {len(cases)} labelled cases are held out to judge models by",
                where=project.ledger,
                remedy="Submit the label of another case, then train.",
            )
        self._label_hashes = {case.id: sha256_of(case.label) for case in cases if case.label}
        self._name = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        self._labels = labels
        self._config = config
        self._project = project
        self._log = log
        self._measurable = False
        self._drawn: tuple[str, ...] = ()
        self._cache = SliceCache(project.cache, config.cache_gib)

    def run(self) -> TrainResult:
        """From the labelled cases to the published model."""
        self._log.phase("reading the labelled cases")
        plan = make_plan(self._training, self._labels, self._config)
        model = self._untrained(plan)
        start = _starting_point(self._project, model)
        if start is not None:
            model.load_trained(start)
        model.head.require_complete()  # before minutes are spent on preparing the cases
        prepared = self._prepare(model)
        drawn = {index for case in prepared for index in case.slices_of}
        self._drawn = tuple(name for index, name in enumerate(self._labels.names, start=1) if index in drawn)
        learning, checking = self._shared_out(prepared, model.info.recipe.seed)
        refuse_empty(learning, self._labels)
        synthetic = _synthetic(learning, model.info.recipe)
        self._measurable = any(case.slices_of for case in checking)
        remarks = [*self._odd_about(prepared, synthetic), *self._unmeasured(learning, checking)]
        for remark in remarks:
            self._log.phase(remark)
        labelled = len(self._training) + len(self._held_out)
        budget = Budget(self._config.train_seconds(labelled), self._config.max_steps)
        folder = self._project.training
        parent, fingerprint = self._begun_from(start, [*learning, *checking], model)
        trainer = Trainer(
            model, learning, checking, budget, folder, self._cache, fingerprint, self._log.step, synthetic=synthetic
        )
        if steps := trainer.given_up():
            remarks.append(
                f"an unfinished training of {steps} steps is given up: its labels, recipe or settings were others, or "
                "another model is in service"
            )
            self._log.phase(remarks[-1])
        if self._wants_preview(model, budget) and not trainer.resumable():
            self._preview(model, learning, checking, parent)
        done = trainer.run()
        if done.stopped_early:
            remarks.append(
                f"ended after {done.step} steps, before its time was up: nothing better on the held-out cases since "
                f"round {done.best_round} of {ROUNDS}"
            )
        crossed = self._cross_validate(plan, learning, budget, remarks)
        result = self._publish(model, done, parent, crossed, remarks)
        trainer.forget()
        # The best of the early looks, at the model's own size, gives way to what the result has on the native grid.
        best = {"best_metric": result.interval.mean} if result.interval else {}
        self._log.end(
            "done",
            result.reason,
            **best,
            dice=result.dice,
            published=result.published,
            refused=None if result.published else result.reason,
            cross_validation=str(result.cross_validation) if result.cross_validation else None,
            model=result.model.name,
            remarks=result.remarks,
        )
        return result

    def _begun_from(
        self, start: Path | None, slices: Sequence[PreparedCase], model: AdaptedModel
    ) -> tuple[str | None, str]:
        """The version that this training goes on from, and its fingerprint.

        An unfinished training may have put its own preview in service since it began: what that went on from counts.
        """
        own = _fingerprint(slices, model, start)
        unfinished = (checkpoint.peek(self._project.training / checkpoint.FILE) or {}).get("fingerprint")
        made = read_info_if_readable(start) if start else None
        if made is not None and made.training.get("preview") and unfinished != own:
            before = made.training["parent"]
            file = self._project.models / f"{before}.safetensors" if before else None
            if unfinished == (earlier := _fingerprint(slices, model, file)):
                return before, earlier
        return start.stem if start else None, own

    def _shared_out(self, prepared: Sequence[PreparedCase], seed: int) -> tuple[list[PreparedCase], list[PreparedCase]]:
        """What is learned from, and the held-out cases, which need no second plane."""
        known = {case.id for case in self._training}
        learning = [case for case in prepared if case.id in known]
        if self._config.slices_per_case is not None:
            learning = [few_slices(case, self._config.slices_per_case, seed) for case in learning]
        return learning, [case for case in prepared if case.id not in known and case.plane == 0]

    def _odd_about(self, prepared: Sequence[PreparedCase], synthetic: SyntheticSlices | None) -> list[str]:
        """What the annotators should know of the labels that are learned from."""
        remarks = [f"{case.id}: {case.remark}" for case in prepared if case.remark and case.plane == 0]
        remarks += partly_labelled(prepared)
        if synthetic and synthetic.remark:
            remarks.append(synthetic.remark)
        if self._restored:
            remarks.append(
                f"{self._project.ledger.name} had lost {len(self._restored)} cases; they train or are held out as the "
                f"models' manifests say: {', '.join(self._restored)}"
            )
        return remarks

    def _unmeasured(self, learning: Sequence[PreparedCase], checking: Sequence[PreparedCase]) -> list[str]:
        """What is learned, but shown by no held-out case: nobody would see that it got worse."""
        learned, shown = ({index for case in cases for index in case.slices_of} for cases in (learning, checking))
        names = [name for index, name in enumerate(self._labels.names, start=1) if index in learned - shown]
        if not names or not self._held_out:
            return []
        return [
            f"no held-out case shows {', '.join(names)}, so models are not compared on it; the next new patient who "
            "shows it is held out"
        ]

    def _untrained(self, plan: Plan) -> AdaptedModel:
        config = self._config
        recipe = recipes.configured(config)
        model = recipes.build(recipe, self._labels, config.backbone, config.weights, plan.image_size)
        model.describe(window=plan.window, context=recipe.context, planes=config.planes)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _prepare(self, model: AdaptedModel) -> list[PreparedCase]:
        info = model.info
        assert info.window is not None
        return prepare(
            [*self._training, *self._held_out],
            self._labels,
            info.window,
            info.context,
            info.image_size,
            self._project.training / "slices",
            lambda done, total: self._log.phase(f"preparing case {done} of {total}"),
            info.planes,
        )

    def _wants_preview(self, model: AdaptedModel, budget: Budget) -> bool:
        """A preview is for those who would wait long, for more than a head; where nothing is held out, it must not
        replace a better model."""
        comparable = self._measurable or self._project.published() is None
        return (
            comparable
            and model.learns_encoder
            and budget.seconds >= preview.WORTHWHILE
            and budget.steps > preview.STEPS
        )

    def _preview(
        self,
        model: AdaptedModel,
        learning: Sequence[PreparedCase],
        checking: Sequence[PreparedCase],
        parent: str | None,
    ) -> None:
        """Publish a model with a new head, if it is better, before the long training; it goes on from that head."""

        def report(progress: Progress) -> None:
            self._log.phase(f"preview: step {progress.step}")

        done = preview.refit_head(model, learning, checking, self._project.training / "preview", self._cache, report)
        model.describe(trained=True)
        measured = self._measure(model)
        scores = mean_by_class(list(measured.held_out.values()))
        if scores and max(scores.values()) < NOT_FOUND:
            self._log.phase("preview finds nothing yet, so it is not published")
            return
        # Whether it follows clicks is found out after the long training; until then nothing changes for clicks.
        model.describe(answers_prompts=self._answers_clicks_now())
        file, verdict = self._decide(model, done, parent, measured)
        if not verdict.published:
            file.unlink()
        self._log.phase(f"preview {verdict.reason}")

    def _cross_validate(
        self, plan: Plan, learning: Sequence[PreparedCase], budget: Budget, remarks: list[str]
    ) -> CrossValidation | None:
        """Where nothing is held out that shows a structure, a figure all the same; a remark tells it, or why there is
        none."""
        if self._measurable:
            return None
        found, folds = None, crossval.make_folds(learning, self._training)
        if budget.seconds < crossval.WORTHWHILE:
            why = f"the training is shorter than {crossval.WORTHWHILE:.0f} s"
        elif not folds:
            why = "a single labelled slice cannot be divided"
        else:
            found = crossval.cross_validate(
                folds, len(self._training), budget, self._cache, lambda *fold: self._fit_fold(plan, *fold)
            )
            why = "no structure is shown by more than one part"
        nothing = "the held-out cases show no structure" if self._held_out else "nothing is held out yet"
        remarks.append(str(found) if found else f"{nothing}, and not cross-validated: {why}")
        self._log.phase(remarks[-1])
        return found

    def _fit_fold(self, plan: Plan, learning: Sequence[PreparedCase], budget: Budget, name: str) -> AdaptedModel:
        """Train an untrained model as this training does, but for its starting point, its time and its cases."""
        model = self._untrained(plan)
        folder = self._project.training / "fold"
        bank = _synthetic(learning, model.info.recipe)

        def report(progress: Progress) -> None:
            self._log.phase(name)

        trainer = Trainer(model, learning, [], budget, folder, self._cache, "", report, synthetic=bank)
        trainer.forget()
        trainer.run()
        trainer.forget()
        return model

    def _publish(
        self,
        model: AdaptedModel,
        done: Progress,
        parent: str | None,
        crossed: CrossValidation | None,
        remarks: list[str],
    ) -> TrainResult:
        """Measure a trained model, save it, and publish it if it is no worse than what is published."""
        self._log.phase("measuring on the held-out cases")
        model.describe(trained=True)
        measured = self._measure(model, crossed)
        scores = mean_by_class(list(measured.held_out.values()))
        clicks = compare_clicks(
            model,
            self._held_out or self._training,
            self._labels,
            self._config,
            lambda number, total: self._log.phase(f"clicking on object {number} of {total}"),
        )
        follows = clicks.adapted >= clicks.plain if clicks.objects else self._answers_clicks_now()
        model.describe(answers_prompts=model.takes_prompts and follows)
        candidate, verdict = self._decide(model, done, parent, measured, clicks)
        if not verdict.published:
            self._versions.refuse(candidate, verdict.reason, self._name)
        missed = [f"{name}: not found on the held-out cases yet" for name, score in scores.items() if score < NOT_FOUND]
        interval = interval_of(measured.held_out) if measured.held_out else None
        return TrainResult(
            candidate,
            verdict.published,
            verdict.reason,
            scores,
            interval,
            crossed,
            clicks,
            done.step,
            done.seconds,
            [*remarks, *missed],
        )

    def _answers_clicks_now(self) -> bool:
        """Whether the model in service does, and not the plain one."""
        current = self._project.published()
        info = read_info_if_readable(current) if current else None
        return info is not None and info.answers_prompts

    def _measure(self, model: AdaptedModel, crossed: CrossValidation | None = None) -> Measured:
        true, expected = measure_cases(model, self._held_out, self._labels, self._cache)
        return Measured(true, crossed, expected, self._measurable, self._drawn)

    def _decide(
        self,
        model: AdaptedModel,
        done: Progress,
        parent: str | None,
        measured: Measured,
        clicks: ClickScores | None = None,
    ) -> tuple[Path, Verdict]:
        """Judge a candidate, save it with its manifest, and publish it if it may be; again if somebody came between."""
        while True:
            verdict = judge(measured, self._held_out, self._labels, self._config, self._project, self._cache)
            record = manifest(
                model, self._config, self._training, self._held_out, self._label_hashes, done, measured, verdict, clicks
            )
            model.describe(training={**record, "name": self._name, "parent": parent, "preview": clicks is None})
            file = self._project.next_model()
            model.save(file)
            if not verdict.published or self._versions.publish(file, verdict.reason, self._name, verdict.current):
                return file, verdict
            file.unlink()


@contextmanager
def _alone(project: Project) -> Iterator[None]:
    """Two trainings of one folder would write over each other's checkpoints."""
    project.training.mkdir(parents=True, exist_ok=True)
    lock = FileLock(project.training / "lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise StateError(
            f"a training of this folder runs already (process {project.status().get('pid')})",
            where=project.root,
            remedy="Wait for its end, or stop it.",
        ) from None
    try:
        yield
    finally:
        lock.release()


def make_plan(cases: Sequence[Case], labels: LabelMap, config: AppConfig) -> Plan:
    """Read every training case once, one at a time, to choose the window and the image size."""
    grids: list[Geometry] = []

    def pairs() -> Any:
        for case in cases:
            volume, mask, _ = read_case(case, labels)
            grids.append(volume.geometry)
            yield volume, mask

    window = _window(pairs())
    side = max(_longest_side(grid, axis) for grid in grids for axis in grid.slice_axes(config.planes))
    return Plan(window, config.image_size or _image_size(side, config.backbone))


def _window(pairs: Any) -> Window:
    """``choose_window`` over one pass of (volume, mask) pairs."""
    masks: list[Any] = []

    def volumes() -> Any:
        for volume, mask in pairs:
            masks.append(mask)
            yield volume

    def taken() -> Any:
        while masks:
            yield masks.pop()

    return choose_window(volumes(), taken())


def _longest_side(geometry: Geometry, axis: int) -> int:
    """Longest side of a slice across ``axis`` in pixels, counted in the finer of its two spacings."""
    axes = [other for other in range(3) if other != axis]
    finest = min(geometry.spacing[axis] for axis in axes)
    return round(max(geometry.shape[axis] * geometry.spacing[axis] for axis in axes) / finest)


def _image_size(side: int, backbone: str) -> int:
    """The smallest multiple of 32 that holds a slice, within what the device trains in minutes."""
    largest = backbones.spec(backbone).image_size if torch.cuda.is_available() else CPU_IMAGE_SIZE
    return min(largest, max(SMALLEST_IMAGE_SIZE, -(-side // 32) * 32))


def _starting_point(project: Project, model: AdaptedModel) -> Path | None:
    """The published model, if it was built as ``model`` is; a damaged one is none to go on from."""
    published = project.published()
    known = read_info_if_readable(published) if published else None
    if known is None:
        return None

    def build(info: ModelInfo) -> tuple[Any, ...]:
        seen = info.image_size, info.context, info.planes
        return info.recipe, info.labels, info.backbone, info.weights_sha256, *seen

    return published if build(known) == build(model.info) else None


def refuse_empty(training: Sequence[PreparedCase], labels: LabelMap) -> None:
    """Raise ``StateError`` where no case shows any of the labels."""
    if not any(case.slices_of for case in training):
        raise StateError(
            f"none of the {len({case.id for case in training})} training cases shows any of {', '.join(labels.names)}",
            remedy="Check the names that the labels were submitted with, or set --conf labels.",
        )


def _synthetic(training: Sequence[PreparedCase], recipe: Recipe) -> SyntheticSlices | None:
    ranges = RANGES.get(recipe.synthesis)
    return SyntheticSlices(training, recipe.seed, ranges=ranges, share=recipe.synthetic_share) if ranges else None


def _fingerprint(prepared: Sequence[PreparedCase], model: AdaptedModel, start: Path | None) -> str:
    """Changes with the slices, the model, and the version that it goes on from, so that only the same training is
    resumed, and not one from a version that is no longer in service; its budget may change."""
    info = dataclasses.replace(model.info, trained=False, training={}, answers_prompts=True)
    begun_from = [start.name, sha256_of(start) if start.is_file() else None] if start else None
    parts = [[case.key for case in prepared], info.to_json(), begun_from]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Status:
    """Writes ``project.status()`` records, at most about one a second, and passes them on."""

    def __init__(self, project: Project, callback: ProgressCallback | None) -> None:
        self._project = project
        self._callback = callback
        self._started = time.time()
        self._last = 0.0
        self._record: dict[str, Any] = {"state": "running", "epoch": 0, "total_epochs": ROUNDS, "best_metric": 0.0}
        self.phase("starting")

    def phase(self, message: str) -> None:
        self._record["message"] = message
        self._write()

    def step(self, progress: Progress) -> None:
        changed = progress.round != self._record["epoch"]
        resumed = f" (went on from step {progress.resumed})" if progress.resumed else ""
        self._record.update(
            message=f"training: round {progress.round} of {ROUNDS}, step {progress.step}{resumed}",
            epoch=progress.round,
            step=progress.step,
            loss=progress.loss,
            best_metric=progress.best or 0.0,
            history=progress.history,
        )
        if changed or time.time() - self._last > STATUS_SECONDS:
            self._write()

    def end(self, state: str, message: str, **values: Any) -> None:
        self._record.update(state=state, message=message, **values)
        if state == "done":
            self._record["epoch"] = ROUNDS
        self._write()

    def _write(self) -> None:
        self._last = time.time()
        self._record.update(started=self._started, seconds=self._last - self._started)
        self._project.write_status(**plain(self._record))
        if self._callback:
            self._callback(dict(self._record))
