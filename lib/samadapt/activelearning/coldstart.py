"""What to label before there is a model, by the frozen encoder's descriptors: cases that stand for many others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_score

from samadapt.activelearning.clusters import cluster, one_of_each
from samadapt.activelearning.pools import by_id, completed
from samadapt.activelearning.strategy import Candidate, Pool, Proposal, Strategy
from samadapt.activelearning.suggest import suggest_slices

NEIGHBOURS = 20
"""Over which TypiClust measures how typical a case is (the paper's number)."""

PURITY = 0.95
"""Share of balls that ProbCover's radius leaves within one cluster (the paper's number)."""

MOST_KINDS = 10
"""Clusters that ProbCover tries at most."""

_RADII = 50
_NO_DESCRIPTOR = "The encoder has not seen it yet, so nothing tells it from others; drawn at random."


@dataclass(frozen=True, eq=False)
class Space:
    """Where cases lie by their descriptors.

    Attributes:
        cases: (n) the unlabelled ones that have a descriptor, by id.
        points: (n,D) theirs.
        covered: (m,D) those of labelled and leased cases.
    """

    cases: list[Candidate]
    points: np.ndarray
    covered: np.ndarray

    @classmethod
    def of(cls, pool: Pool) -> Space:
        """All cases of a pool whose descriptors are known and finite."""
        cases, labelled = (
            [case for case in by_id(group) if _described(case)] for group in (pool.unlabelled, pool.chosen)
        )
        return cls(cases, _matrix(cases), _matrix(labelled))

    @property
    def all_points(self) -> np.ndarray:
        """(m+n,D), the labelled ones first."""
        return np.concatenate([self.covered, self.points]) if len(self.covered) else self.points


@dataclass(frozen=True)
class Pick:
    """One choice among the cases of a space: its number, and what ``Proposal`` says of it."""

    number: int
    score: float
    reason: str


class ByDescriptor(Strategy):
    """Chooses among the cases that have a descriptor; the others follow at random."""

    needs: ClassVar[frozenset[str]] = frozenset({"descriptor", "slice_descriptors"})

    @abstractmethod
    def choose(self, space: Space, count: int, seed: int) -> list[Pick]:
        """``count`` different cases of ``space``, which has so many; the most wanted first."""

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        space = Space.of(pool)
        wanted = min(count, len(space.cases))
        picks = self.choose(space, wanted, pool.seed) if wanted > 0 else []
        ranked = []
        for pick in picks:
            case = space.cases[pick.number]
            ranked.append(Proposal(case.id, pick.score, pick.reason, suggest_slices(case)))
        return completed(ranked, pool.unlabelled, pool, count, _NO_DESCRIPTOR)


class KCenter(ByDescriptor):
    """Greedy core-set: always the case farthest from all that are labelled or chosen (Sener and Savarese, 2018).

    Where nothing is labelled it begins with the most central case.
    """

    name = "kcenter"
    about = "the case least like all labelled ones (core-set)"

    def choose(self, space: Space, count: int, seed: int) -> list[Pick]:
        if len(space.covered):
            nearest = cdist(space.points, space.covered).min(axis=1)
            picks = []
        else:
            middle = _most_central(space.points)
            nearest = cdist(space.points, space.points[[middle]])[:, 0]
            picks = [Pick(middle, float(nearest.max()), "The most central of all cases, to begin with.")]
        chosen = [pick.number for pick in picks]
        while len(picks) < count:
            nearest[chosen] = -1
            number = int(nearest.argmax())
            picks.append(
                Pick(number, float(nearest[number]), "It is least like those that are labelled or come before it.")
            )
            chosen.append(number)
            nearest = np.minimum(nearest, cdist(space.points, space.points[[number]])[:, 0])
        return picks


class TypiClust(ByDescriptor):
    """The most typical case of each large group that has no label (Hacohen et al., 2022).

    As many clusters as cases will be labelled after the choice; typical is what lies nearest to its ``NEIGHBOURS``
    nearest neighbours in its cluster.
    """

    name = "typiclust"
    about = "the most typical case of the largest group of similar ones without a label"

    def choose(self, space: Space, count: int, seed: int) -> list[Pick]:
        labelled, points = len(space.covered), space.all_points
        groups = cluster(points, labelled + count, seed)
        chosen = one_of_each(groups, _typicality(points, groups.of), np.ones(len(points)), labelled, count)
        sizes = np.bincount(groups.of)
        return [
            Pick(point - labelled, 1 / (1 + place), _typical_reason(int(sizes[groups.of[point]])))
            for place, point in enumerate(chosen)
        ]


class ProbCover(ByDescriptor):
    """Greedy cover: always the case with most others near it that nothing labelled is near to (Yehuda et al., 2022).

    Near is within a radius. As in the paper it is the largest at which ``PURITY`` of all balls lie within one cluster;
    the paper makes as many clusters as there are image classes, which cases have none of: here as many, 2 to
    ``MOST_KINDS``, as are told apart best (silhouette; Rousseeuw, 1987).
    """

    name = "probcover"
    about = "the case that has most cases without a label around it"

    def choose(self, space: Space, count: int, seed: int) -> list[Pick]:
        apart = cdist(space.all_points, space.all_points)
        radius = pure_radius(apart, _kinds(space.all_points, apart, seed))
        labelled = len(space.covered)
        near = apart[labelled:, labelled:] <= radius
        open_cases = ~(apart[labelled:, :labelled] <= radius).any(axis=1)
        apart_unlabelled, nearest = apart[labelled:, labelled:], apart[labelled:, :labelled].min(axis=1, initial=np.inf)
        free, picks = np.ones(len(space.points), dtype=bool), []
        for _ in range(count):
            covers = near & open_cases
            gain = covers.sum(axis=1)
            close = -(apart_unlabelled * covers).sum(axis=1)
            order = np.lexsort(
                (nearest, close, gain)
            )  # most cases, and these as near as can be; then the least like all
            number = int(order[free[order]][-1])
            picks.append(Pick(number, float(gain[number]), _cover_reason(int(gain[number]))))
            free[number] = False
            open_cases &= ~near[number]
            nearest = np.minimum(nearest, apart[labelled:, labelled + number])
        return picks


def pure_radius(apart: np.ndarray, groups: np.ndarray) -> float:
    """The largest of some radii at which ``PURITY`` of the balls around all points lie within one group.

    Args:
        apart: (n,n) distances.
        groups: (n,) the group of each point.

    Returns:
        A quantile of the distances; 0 where none is pure enough.
    """
    radii = np.quantile(apart, np.linspace(0, 1, _RADII))
    other = np.where(groups[:, None] != groups[None], apart, np.inf).min(axis=1)  # to the nearest of another group
    pure = [radius for radius in radii if (other > radius).mean() >= PURITY]
    return float(max(pure, default=0.0))


def _kinds(points: np.ndarray, apart: np.ndarray, seed: int) -> np.ndarray:
    """(n,) the cluster of each point, of so many clusters as are told apart best; 0 for all where hardly any differ."""
    best, kinds = -1.0, np.zeros(len(points), dtype=int)
    for count in range(2, min(MOST_KINDS, len(points) - 1) + 1):
        groups = cluster(points, count, seed)
        if len(groups.centres) < count:
            break
        told_apart = float(silhouette_score(apart, groups.of, metric="precomputed"))
        if told_apart > best:
            best, kinds = told_apart, groups.of
    return kinds


def _typical_reason(size: int) -> str:
    return "No other case looks like it." if size == 1 else f"Typical of {size} cases that look alike."


def _cover_reason(gain: int) -> str:
    if gain == 0:
        return "Cases like it are labelled already, but it is the least like them."
    return f"It stands for {_cases(gain)} near it of which none is labelled, itself included."


def _cases(number: int) -> str:
    return f"{number} case{'' if number == 1 else 's'}"


def _typicality(points: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n,) 0 or less: minus the mean distance to the nearest neighbours in the same group; 0 for one that is alone."""
    typical = np.zeros(len(points))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        if len(members) > 1:
            near = np.sort(cdist(points[members], points[members]), axis=1)[:, 1 : NEIGHBOURS + 1]
            typical[members] = -near.mean(axis=1)
    return typical


def _most_central(points: np.ndarray) -> int:
    return int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())


def _described(case: Candidate) -> bool:
    return case.descriptor is not None and bool(np.isfinite(case.descriptor).all())


def _matrix(cases: list[Candidate]) -> np.ndarray:
    if not cases:
        return np.zeros((0, 0))
    return np.stack([np.asarray(case.descriptor, dtype=np.float64) for case in cases])
