"""Orders that take no model, or hardly one: what every cleverer strategy has to beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from samadapt.activelearning.pools import by_id, chance, shuffled
from samadapt.activelearning.strategy import Candidate, Pool, Proposal, Strategy
from samadapt.activelearning.suggest import SLICES, suggest_slices
from samadapt.inference.examine import present


class First(Strategy):
    """By id."""

    name = "first"
    about = "the first case that has no label yet, by name"

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        return _in_order(by_id(pool.unlabelled), count, "The first by name of those without a label.")


class Last(Strategy):
    """By id, from the end."""

    name = "last"
    about = "the last case that has no label yet, by name"

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        return _in_order(by_id(pool.unlabelled)[::-1], count, "The last by name of those without a label.")


class Random(Strategy):
    """An order without pattern; cases proposed longest ago, or never, come first."""

    name = "random"
    about = "a case that has no label yet, in an arbitrary order"

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        return _in_order(shuffled(pool.unlabelled, pool.seed), count, "Drawn at random from those without a label.")


class RandomForeground(Strategy):
    """Random cases among those in which the model finds anything, and random slices among those that show it.

    Slices are drawn as by picking a class at random and then one of its pixels, which is how the improved random
    baselines of nnActive draw their patches (Lüth et al., 2025): a slice is the likelier the more of a class it shows.
    """

    name = "random_fg"
    about = "a random case in which the model finds something, and random slices that show it"
    needs: ClassVar[frozenset[str]] = frozenset({"examination"})

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        kinds: dict[str, list[Candidate]] = {reason: [] for reason in _FOREGROUND}
        for case in shuffled(pool.unlabelled, pool.seed):
            kinds[_foreground(case)].append(case)
        ordered = [(case, reason) for reason, cases in kinds.items() for case in cases][: max(0, count)]
        return [
            Proposal(case.id, 1 / (1 + place), reason, _random_slices(case, pool.seed))
            for place, (case, reason) in enumerate(ordered)
        ]


_FOUND = "Drawn at random from those in which the model finds something."
_NOT_LOOKED = "No model has looked at it yet, so it is drawn at random from all."
_NOTHING = "The model finds nothing in it; no case with a finding is left."
_FOREGROUND = (_FOUND, _NOT_LOOKED, _NOTHING)


def _foreground(case: Candidate) -> str:
    if case.examination is None:
        return _NOT_LOOKED
    return _FOUND if case.examination.areas.any() else _NOTHING


def _random_slices(case: Candidate, seed: int) -> list[int]:
    """Weighted draws without replacement (Efraimidis and Spirakis, 2006)."""
    if case.examination is None or not case.examination.areas.any():
        return suggest_slices(case)
    areas = case.examination.areas * present(case.examination)[:, None]
    share = (areas / np.maximum(areas.sum(axis=0), 1)).sum(axis=1)
    times = {int(n): -np.log(chance(seed, case.id, int(n))) / share[n] for n in np.flatnonzero(share)}
    return sorted(times, key=lambda n: times[n])[:SLICES]


def _in_order(cases: list[Candidate], count: int, reason: str) -> list[Proposal]:
    return [
        Proposal(case.id, 1 / (1 + place), reason, suggest_slices(case))
        for place, case in enumerate(cases[: max(0, count)])
    ]
