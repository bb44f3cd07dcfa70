"""``python -m samadapt.evaluation.simulate_run FOLDER``: one run of a simulation, in a process of its own.

Starts with nothing labelled. Every round asks a strategy what to label, labels it with the truth, trains a new model
from all labels so far and measures it on the test cases. Each finished round is kept in ``FOLDER/rounds.json``, so that
an interrupted run goes on after it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samadapt import recipes
from samadapt.activelearning.strategy import Candidate, Pool, Proposal
from samadapt.config import AppConfig
from samadapt.data.cases import Case, find_cases
from samadapt.data.geometry import Geometry, turn_to_lps
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import read_volume
from samadapt.data.window import Window
from samadapt.errors import StateError
from samadapt.evaluation import simulate_pool
from samadapt.evaluation.annotator import Annotator, Costs, Effort, FullAnnotator, RobotAnnotator
from samadapt.evaluation.apart import job_main
from samadapt.evaluation.epistemic import mean_entropy
from samadapt.evaluation.metrics import dice, mean
from samadapt.files import write_json
from samadapt.inference.auto import segment
from samadapt.model import AdaptedModel
from samadapt.terminal import plain
from samadapt.training.loop import Budget, Trainer
from samadapt.training.slices import PreparedCase, prepare, read_case, with_slices

ROUNDS = "rounds.json"

VOLUMES, SLICES, SCATTERED = UNITS = ("volumes", "slices", "scattered")
"""What is labelled: whole cases; of more cases those slices that the strategy suggests; or slices drawn blindly from
all cases, without a strategy. Each round labels about as many slices whichever it is."""

ROBOT, FULL = ANNOTATORS = ("robot", "full")

EARLIER = 2
"""Models before the one in service that a strategy may compare with it."""

SURVEY, CACHE, PREPARED, TRAINED = "survey", "cache", "slices", "trained"
"""Folders that all runs share."""

TRAINED_KEPT = 64
"""Models and their scores kept for strategies that choose the same cases, as most do before there is a model."""


@dataclass(frozen=True)
class Protocol:
    """What all runs of a simulation share.

    Attributes:
        rounds: labelling, training and measuring, so many times at most.
        per_round: whole cases that are labelled in a round.
        slices_per_case: where single slices are labelled, how many of one case.
        steps: of a training.
        copies: augmented copies of each slice to learn from; 0 learns from the slices as they are.
        annotator: one of ``ANNOTATORS``.
        costs: of its time.
    """

    rounds: int
    per_round: int
    slices_per_case: int
    steps: int
    copies: int
    annotator: str
    costs: Costs = field(default_factory=Costs)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Protocol:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**value, "costs": Costs(**value["costs"])})


@dataclass(frozen=True)
class Job:
    """What one run does.

    Attributes:
        studies: folder of all cases.
        labels: the classes, in order.
        recipe: a recipe's name.
        strategy: a strategy's name; empty where nothing is asked (``SCATTERED``).
        unit: one of ``UNITS``.
        seed: of the draws, the strategy's randomness and the trainings.
        pool: ids of the cases that may be labelled.
        testing: ids of the cases to test on.
        window: intensity window of all models, as ``Window.to_dict`` gives it.
        image_size: side of the model input in pixels.
        protocol: see there.
        settings: as ``AppConfig.from_strings`` takes them.
        shared: folder of what all runs share.
    """

    studies: str
    labels: list[str]
    recipe: str
    strategy: str
    unit: str
    seed: int
    pool: list[str]
    testing: list[str]
    window: dict[str, Any]
    image_size: int
    protocol: Protocol
    settings: dict[str, str]
    shared: str

    @property
    def config(self) -> AppConfig:
        """All settings of the run."""
        return AppConfig.from_strings({**self.settings, "recipe": self.recipe, "seed": str(self.seed)})

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Job:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**value, "protocol": Protocol.from_dict(value["protocol"])})


@dataclass(frozen=True)
class Chosen:
    """One case that is labelled in a round.

    Attributes:
        id: case id.
        slices: which ones, across the acquisition axis of the image as stored; None: all.
        reason: the strategy's.
    """

    id: str
    slices: list[int] | None
    reason: str


def execute(job: Job, folder: Path, tell: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Play all rounds; what there is to report of them.

    Args:
        job: what to do.
        folder: of this run; rounds that are finished there are not played again.
        tell: told the share of rounds that is done, 0..1.

    Returns:
        ``rounds``, a list of ``{"chosen", "volumes", "slices", "clicks", "outlines", "seconds", "dice", "by_class",
        "cases", "compute"}``: what was labelled in the round and why; cumulative budgets; mean Dice over classes and
        test cases, that of each class, and of each case and class; seconds of computation by what they went into.

    Raises:
        SamAdaptError: as training and reading cases raise it.
        StateError: the strategy proposes what is labelled already.
    """
    return {"rounds": _Run(job, folder).play(tell or (lambda share: None))}


class _Run:
    """What the rounds of one run share."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._labels = LabelMap(tuple(job.labels))
        self._config = job.config
        self._recipe = recipes.configured(self._config)
        known = {case.id: case for case in find_cases(job.studies)}
        self._pool = {name: known[name] for name in job.pool}
        self._testing = [known[name] for name in job.testing]
        self._cache = SliceCache(Path(job.shared) / CACHE, self._config.cache_gib)
        self._prepared = self._prepare(known)
        self._labelled: dict[str, set[int] | None] = {}
        self._models: list[AdaptedModel] = []
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def play(self, tell: Callable[[float], None]) -> list[dict[str, Any]]:
        rounds = self._resume()
        for number in range(len(rounds), self._job.protocol.rounds):
            tell(number / self._job.protocol.rounds)
            compute: dict[str, float] = {}
            with _timed(compute, "choosing"):
                chosen = self._choose(number)
            if not chosen:
                break
            with _timed(compute, "annotator"):
                spent = self._label(chosen)
            known = _Trained(Path(self._job.shared) / TRAINED, self._what_a_round_depends_on())
            with _timed(compute, "training"):
                self._train(number, known)
            with _timed(compute, "testing"):
                scores = known.score or self._score()
            known.keep(self._file(number), scores)
            totals = _added(rounds[-1] if rounds else {}, spent)
            rounds.append(plain({"chosen": [vars(one) for one in chosen], **totals, **scores, "compute": compute}))
            write_json(self._folder / ROUNDS, {"job": _as_json(self._job), "rounds": rounds})
        return rounds

    def _resume(self) -> list[dict[str, Any]]:
        """The rounds that an earlier process finished of the same job, their labels and their last models."""
        record = finished(self._folder)
        rounds = record["rounds"] if record.get("job") == _as_json(self._job) else []
        for record in rounds:
            self._mark(Chosen(**chosen) for chosen in record["chosen"])
        for number in range(len(rounds))[-1 - EARLIER :]:
            file = self._file(number)
            if file.is_file():
                self._models.append(AdaptedModel.load(file, self._config.weights).to(self._device))
        return rounds

    # ---- choosing

    def _choose(self, number: int) -> list[Chosen]:
        """What to label in a round; nothing where all is labelled."""
        if self._job.unit == SCATTERED:
            return self._scattered(number)
        protocol, left = self._job.protocol, self._slices_per_round
        whole = self._job.unit == VOLUMES
        count = protocol.per_round if whole else -(-left // protocol.slices_per_case)
        proposals = self._ranking(number, count)
        if whole:
            return [Chosen(one.id, None, one.reason) for one in proposals]
        found = []
        for one in proposals:
            slices = suggested(one, len(self._prepared[one.id]), min(left, protocol.slices_per_case))
            left -= len(slices)
            if slices:
                found.append(Chosen(one.id, slices, one.reason))
        return found

    def _ranking(self, number: int, count: int) -> list[Proposal]:
        unlabelled = [case for case in self._pool.values() if case.id not in self._labelled]
        if not unlabelled:
            return []
        trained = [model for model in self._models if model.info.trained]
        model = trained[-1] if trained else None
        strategy = simulate_pool.strategy(self._job.strategy, self._entropy(model))
        version = f"{self._folder.name}-{number}" if model else None

        def look(case: Case) -> Candidate:
            if not strategy.needs:
                return Candidate(case.id, patient=case.patient)
            truth = read_case(case, self._labels)[1] if case.id in self._labelled else None
            known = self._lookout.look(case, strategy.needs, model, version, trained[:-1], truth)
            return replace(known, patient=case.patient)

        labelled = [look(self._pool[name]) for name in self._labelled]
        seed = 1000 * self._job.seed + number
        ranking = strategy.rank(Pool([look(case) for case in unlabelled], labelled, self._labels.names, seed), count)
        if any(one.id in self._labelled or one.id not in self._pool for one in ranking):
            raise StateError(
                f"{self._job.strategy} proposes cases that are labelled already",
                remedy="Such a strategy finds wrong labels; leave it out of the simulation.",
            )
        return ranking[:count]

    def _entropy(self, model: AdaptedModel | None) -> Callable[[str], float] | None:
        if model is None:
            return None
        seed = self._job.seed
        return lambda name: mean_entropy(model, read_volume(self._pool[name].image), seed, self._cache)

    def _scattered(self, number: int) -> list[Chosen]:
        """Slices of all cases, each as likely as any other."""
        free = [
            (name, index)
            for name in self._pool
            for index in range(len(self._prepared[name]))
            if index not in (self._labelled.get(name) or ())
        ]
        random = np.random.default_rng([self._job.seed, number])
        drawn: dict[str, list[int]] = {}
        for place in random.permutation(len(free))[: self._slices_per_round]:
            name, index = free[place]
            drawn.setdefault(name, []).append(index)
        return [Chosen(name, sorted(slices), "drawn blindly") for name, slices in drawn.items()]

    @property
    def _slices_per_round(self) -> int:
        """Where single slices are labelled: as many as ``per_round`` whole cases of the pool have on the median."""
        return round(float(np.median([len(case) for case in self._prepared.values()])) * self._job.protocol.per_round)

    @cached_property
    def _lookout(self) -> simulate_pool.Lookout:
        return simulate_pool.Lookout(Path(self._job.shared) / SURVEY, self._plain, self._cache)

    @cached_property
    def _plain(self) -> AdaptedModel:
        """The backbone as it came, which sees the same slices as the trained models, so that each is encoded once."""
        config, recipe = self._config, self._recipe
        model = recipes.build(recipes.PLAIN, self._labels, config.backbone, config.weights, self._job.image_size)
        model.describe(window=Window.from_dict(self._job.window), context=recipe.context)
        return model.to(self._device)

    # ---- labelling

    def _label(self, chosen: Sequence[Chosen]) -> dict[str, float]:
        """Label what was chosen; what that cost."""
        annotator, costs = self._annotator, self._job.protocol.costs
        spent = dict.fromkeys(("volumes", "slices", "clicks", "outlines", "seconds"), 0.0)
        for one in chosen:
            case = self._pool[one.id]
            volume, truth, _ = read_case(case, self._labels)
            slices = range(len(self._prepared[one.id])) if one.slices is None else one.slices
            found = segment(self._models[-1], volume, cache=self._cache) if self._models else np.zeros_like(truth)
            effort: Effort = annotator.label(volume, truth, found, slices, self._job.seed)
            seconds = costs.seconds(len(slices), effort.clicks, effort.outlines)
            parts = (one.id not in self._labelled, len(slices), effort.clicks, effort.outlines, seconds)
            for name, value in zip(spent, parts, strict=True):
                spent[name] += value
        self._mark(chosen)
        return spent

    def _mark(self, chosen: Any) -> None:
        for one in chosen:
            before = self._labelled.get(one.id) or set()
            self._labelled[one.id] = None if one.slices is None else before | set(one.slices)

    @cached_property
    def _annotator(self) -> Annotator:
        if self._job.protocol.annotator == FULL:
            return FullAnnotator(self._labels)
        config = self._config
        answering = recipes.build(recipes.PLAIN, self._labels, config.backbone, config.weights).to(self._device)
        return RobotAnnotator(self._labels, answering, self._cache)

    # ---- learning and measuring

    def _prepare(self, known: Mapping[str, Case]) -> dict[str, PreparedCase]:
        """The slices of the pool. Those of other seeds lie in the same folder, so all labelled cases are prepared."""
        prepared = prepare(
            [case for case in known.values() if case.label],
            self._labels,
            Window.from_dict(self._job.window),
            self._recipe.context,
            self._job.image_size,
            Path(self._job.shared) / PREPARED,
        )
        return {case.id: case for case in prepared if case.id in self._pool}

    def _learning(self) -> list[PreparedCase]:
        found = []
        for name, slices in sorted(self._labelled.items()):  # in whatever order they were labelled
            case = self._prepared[name]
            if slices is None:
                found.append(case)
            else:
                geometry = read_volume(self._pool[name].image).geometry
                found.append(with_slices(case, {turned_index(geometry, index) for index in slices}))
        return found

    def _what_a_round_depends_on(self) -> dict[str, Any]:
        """Its labels, and all of the job but how they were chosen."""
        chosen_by = {"strategy", "unit", "pool", "shared"}
        job = {name: value for name, value in _as_json(self._job).items() if name not in chosen_by}
        labelled = {name: None if slices is None else sorted(slices) for name, slices in self._labelled.items()}
        return {"job": job, "labelled": labelled}

    def _train(self, number: int, known: _Trained) -> None:
        """A model from nothing but the labels so far, so that a round depends on its labels alone."""
        if known.model:
            shutil.copy(known.model, self._file(number))
            model = AdaptedModel.load(self._file(number), self._config.weights).to(self._device)
        else:
            model = self._trained()
            model.save(self._file(number))
        self._models = [*self._models[-EARLIER:], model.eval()]
        for old in range(number - EARLIER):
            self._file(old).unlink(missing_ok=True)

    def _trained(self) -> AdaptedModel:
        job, config = self._job, self._config
        model = recipes.build(self._recipe, self._labels, config.backbone, config.weights, job.image_size)
        model.describe(window=Window.from_dict(job.window), context=self._recipe.context)
        model = model.to(self._device)
        learning = self._learning()
        if any(case.slices_of for case in learning):  # else there is nothing to learn yet, and it finds nothing
            self._fit(model, learning)
            model.describe(trained=True)
        return model

    def _fit(self, model: AdaptedModel, learning: Sequence[PreparedCase]) -> None:
        budget = Budget(math.inf, self._job.protocol.steps, rounds=1)
        folder, copies = self._folder / "training", self._job.protocol.copies
        folder.mkdir(exist_ok=True)
        trainer = Trainer(model, learning, [], budget, folder, self._cache, "", lambda progress: None, copies=copies)
        trainer.forget()
        trainer.run()
        trainer.forget()

    def _score(self) -> dict[str, Any]:
        found = {}
        for case in self._testing:
            volume, truth, report = read_case(case, self._labels)
            mask = segment(self._models[-1], volume, cache=self._cache)
            found[case.id] = dice(mask, truth, self._labels, report.unknown)
        return {
            "dice": mean(value for one in found.values() for value in one.values()),
            "by_class": {name: mean(one[name] for one in found.values()) for name in self._labels.names},
            "cases": found,
        }

    def _file(self, number: int) -> Path:
        return self._folder / f"model-{number}.safetensors"


class _Trained:
    """What an earlier run has trained from the same labels with the same settings, if any has.

    Args:
        folder: of all such models.
        what: all that the model depends on.

    Attributes:
        model: its file; None where there is none.
        score: what its test gave; empty where there is none.
    """

    def __init__(self, folder: Path, what: Mapping[str, Any]) -> None:
        self._folder = folder
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        self._model, self._record = folder / f"{name}.safetensors", folder / f"{name}.json"
        known = self._record.is_file() and self._model.is_file()
        self.model = self._model if known else None
        self.score: dict[str, Any] = json.loads(self._record.read_text(encoding="utf-8")) if known else {}

    def keep(self, model: Path, score: Mapping[str, Any]) -> None:
        """Keep it for later runs, in place of what was used longest ago."""
        if self.model:
            os.utime(self._record)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(model, self._model)
        write_json(self._record, plain(score))  # last, so that it stands for a whole model
        records = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in records[:-TRAINED_KEPT]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)


def finished(folder: Path) -> dict[str, Any]:
    """Of a run's folder: ``job`` and the ``rounds`` that are finished; no rounds where nothing is kept."""
    path = folder / ROUNDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rounds": []}


def _as_json(job: Job) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(job)))


def suggested(proposal: Proposal, slices: int, count: int) -> list[int]:
    """The slices to label of a proposed case: those that the strategy names first, then evenly spread ones.

    Args:
        proposal: names any number of slices.
        slices: that the case has.
        count: how many are wanted.

    Returns:
        Rising; fewer than ``count`` only where the case has fewer.
    """
    named = list(dict.fromkeys(proposal.slices))
    spread = ((np.arange(count) + 0.5) * slices / max(1, count)).astype(int).tolist()
    order = dict.fromkeys([*named, *spread, *range(slices)])
    return sorted(list(order)[:count])


def turned_index(geometry: Geometry, index: int) -> int:
    """Where slice ``index`` across the acquisition axis of an image as stored lies among a model's slices of it."""
    axis = geometry.acquisition_axis
    sign = turn_to_lps(geometry).steps[axis][1]
    return index if sign > 0 else geometry.shape[axis] - 1 - index


def _added(before: Mapping[str, Any], spent: Mapping[str, float]) -> dict[str, float]:
    return {name: before.get(name, 0.0) + value for name, value in spent.items()}


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[what] = round(time.monotonic() - started, 3)


def main(arguments: Sequence[str]) -> int:
    """Do the job of one folder; the exit status."""
    folder = Path(arguments[0])
    return job_main(folder, lambda job: execute(Job.from_dict(job), folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
