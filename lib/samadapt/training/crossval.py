"""A figure for trainings that hold nothing out: parts of the labels are left out in turn, and found by a short training
on the others.

With one to three labelled patients the ledger holds nobody out, since every label teaches much. Cross-validation
(Stone 1974) still tells whether these labels can be learned from one another: a label that does not fit its image
cannot be found by a model of the others, and spoils what the others find.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from samadapt.data.cases import Case
from samadapt.data.slice_cache import SliceCache
from samadapt.evaluation.intervals import DICE, Estimate, estimate
from samadapt.evaluation.metrics import mean
from samadapt.model import AdaptedModel
from samadapt.training.ledger import group_of
from samadapt.training.loop import Budget, frame_dice
from samadapt.training.slices import PreparedCase, SliceSampler
from samadapt.training.tokens import TokenSource

SHARE = 0.2
"""Share of a training's time, and of its steps, that all folds learn for together; with what it takes to measure them
it is about a quarter. The intensity window and the image size are those of the whole training."""

WORTHWHILE = 120.0
"""Seconds of a training from which on it is cross-validated: the folds of a shorter one would learn next to nothing."""

CHECKED_SLICES = 64
"""Slices of a left-out case that are measured; evenly spread where it has more."""

BLOCKS = 4
"""A single case is cut into so many blocks of neighbouring slices, of which every other one is left out."""

MOST = 3
"""Folds."""

_SHARES = {2: "a tenth", 3: "a fifteenth"}

Fit = Callable[[Sequence[PreparedCase], Budget, str], AdaptedModel]
"""Trains an untrained model on slices and gives it back in eval mode; the text says which fold it is."""


@dataclass(frozen=True)
class Fold:
    """One part that is left out.

    Attributes:
        name: of the part.
        learning: what the model learns from.
        checking: what it is measured on.
    """

    name: str
    learning: list[PreparedCase]
    checking: list[PreparedCase]


@dataclass(frozen=True)
class CrossValidation:
    """How well parts of the labels were found by models that learned from the others for a short time.

    Attributes:
        cases: how many there are; the parts of a single one are slices, else they are cases (of other patients, where
            these are known).
        scores: part -> class -> Dice 0..1 at the model's image size; NaN for classes that the fold cannot have learned.
        seconds: longest time that each fold learned for.
    """

    cases: int
    scores: dict[str, dict[str, float]]
    seconds: float

    @property
    def interval(self) -> Estimate:
        """Over the parts, each the mean of its classes."""
        return estimate((mean(part.values()) for part in self.scores.values()), DICE)

    @property
    def dice(self) -> float:
        """Mean Dice over the parts, 0..1; NaN where no part could be found at all."""
        return self.interval.mean

    @property
    def method(self) -> str:
        """What the figure is, for people."""
        parts = len(self.scores)
        time = f"with {_SHARES[parts]} of the time each"
        if self.cases == 1:
            return f"cross-validated over two halves of one case's slices, {time}: it says nothing of other patients"
        groups = "" if self.cases == parts else f"{parts} groups of "
        return f"cross-validated over {groups}{self.cases} cases, {time}: a lower bound"

    def __str__(self) -> str:
        return f"Dice {self.dice:.3f}, {self.method}"


def make_folds(prepared: Sequence[PreparedCase], cases: Sequence[Case]) -> list[Fold]:
    """A fold for each patient (of a single patient: each case) that is left out, three at most; two for a single case.

    Args:
        prepared: the training cases.
        cases: the same, with their patients.

    Returns:
        Two or three folds; none where there is nothing to divide: a single slice that shows a structure.
    """
    patients = {case.id: group_of(case) for case in cases}
    by_patient = len(set(patients.values())) > 1
    groups: dict[str, list[PreparedCase]] = {}
    for one in prepared:
        groups.setdefault(patients[one.id] if by_patient else one.id, []).append(one)
    if len(groups) == 1:
        return _halves(next(one for one in prepared if one.plane == 0))
    parts = [[one for group in list(groups.values())[n::MOST] for one in group] for n in range(min(MOST, len(groups)))]
    return [
        Fold(
            ", ".join(sorted({one.id for one in left_out})),
            [one for one in prepared if one not in left_out],
            [one for one in left_out if one.plane == 0],
        )
        for left_out in parts
    ]


def cross_validate(
    folds: Sequence[Fold], cases: int, budget: Budget, cache: SliceCache, fit: Fit
) -> CrossValidation | None:
    """Train and measure each fold.

    Args:
        folds: of ``make_folds``.
        cases: how many cases they are made of.
        budget: of the whole training.
        cache: of tokens.
        fit: trains a fold.

    Returns:
        None where no structure is shown by more than one part, so that nothing could be measured.
    """
    share = SHARE / len(folds)
    each = Budget(share * budget.seconds, max(1, round(share * budget.steps)))
    scores = {}
    for number, fold in enumerate(folds, start=1):
        model = fit(fold.learning, each, f"cross-validation, part {number} of {len(folds)}")
        scores[fold.name] = _measure(model, fold, cache)
    found = CrossValidation(cases, scores, each.seconds)
    return None if math.isnan(found.dice) else found


def _measure(model: AdaptedModel, fold: Fold, cache: SliceCache) -> dict[str, float]:
    recipe, size = model.info.recipe, model.info.image_size
    source = TokenSource(model, SliceSampler(fold.learning, size, recipe.batch_size, recipe.seed), cache)
    scores = [
        frame_dice(model, case, CHECKED_SLICES, source) for case in (_whole(case, fold) for case in fold.checking)
    ]
    learned = {label for case in fold.learning for label in case.slices_of}
    names = enumerate(model.info.labels.names, start=1)
    return {name: mean(score[name] for score in scores) if n in learned else math.nan for n, name in names}


def _whole(case: PreparedCase, fold: Fold) -> PreparedCase:
    """A case that is left out as a whole is measured on all its slices, also where a training learns from few."""
    shared = any(case.id == other.id for other in fold.learning)
    return case if shared else replace(case, learned_from=range(len(case)))


def _halves(case: PreparedCase) -> list[Fold]:
    """Blocks of neighbouring slices with equally many labelled ones each, in turn to one half and to the other."""
    shown = sorted({index for indices in case.slices_of.values() for index in indices})
    if len(shown) < 2:
        return []
    blocks = np.array_split(shown, min(BLOCKS, len(shown)))
    starts = [int(block[0]) for block in blocks[1:]]
    first, second = (
        _part(case, {n for n in range(len(case)) if np.searchsorted(starts, n, side="right") % 2 == side})
        for side in (0, 1)
    )
    return [
        Fold(f"{case.id}, odd blocks of slices", [second], [first]),
        Fold(f"{case.id}, even blocks of slices", [first], [second]),
    ]


def _part(case: PreparedCase, kept: set[int]) -> PreparedCase:
    areas = {
        label: {index: area for index, area in zip(indices, case.areas[label], strict=True) if index in kept}
        for label, indices in case.slices_of.items()
    }
    return replace(
        case,
        slices_of={label: list(here) for label, here in areas.items() if here},
        areas={label: list(here.values()) for label, here in areas.items() if here},
        learned_from=[index for index in case.learned_from if index in kept],
    )
