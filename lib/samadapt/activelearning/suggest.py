"""Which slices of a case to label: few, spread out, uncertain and with something on them."""

from __future__ import annotations

import numpy as np

from samadapt.activelearning.clusters import cluster
from samadapt.activelearning.strategy import Candidate
from samadapt.inference.examine import doubtful_foreground

SLICES = 5
"""A few slices of many cases teach more than many slices of a few."""


def suggest_slices(
    case: Candidate, count: int = SLICES, doubt: np.ndarray | None = None, total: int | None = None
) -> list[int]:
    """The slices of one case to label first.

    With an examination: the slices that show foreground are cut into ``count`` stretches, and the most doubtful of
    each is taken, those with most doubt first. Before any model: the slices that stand for the largest groups of
    similar ones, by the encoder's descriptors. Without these: evenly spaced ones.

    Args:
        case: what is known of it.
        count: how many at most.
        doubt: (N,) 0 or more, what is looked for; None takes the examination's doubt.
        total: number of slices of the image, for cases of which nothing else is known.

    Returns:
        Slices as ``Proposal`` counts them, none twice; empty where not even their number is known.
    """
    if count < 1:
        return []
    if case.examination is not None:
        measure = np.nan_to_num(case.examination.doubt if doubt is None else doubt)
        stretch = doubtful_foreground(case.examination, measure)
        if len(stretch):
            return _most_doubtful(stretch, measure, count)
    if case.slice_descriptors is not None and np.isfinite(case.slice_descriptors).all(axis=1).any():
        return _typical(case.slice_descriptors, count)
    return evenly(number_of_slices(case) or total or 0, count)


def evenly(total: int, count: int) -> list[int]:
    """At most ``count`` of ``total`` slices, in the middle of equal stretches, in ascending order."""
    count = min(count, total)
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def number_of_slices(case: Candidate) -> int | None:
    """N of the case's image, None where nothing known of it tells."""
    if case.examination is not None:
        return len(case.examination.doubt)
    return None if case.slice_descriptors is None else len(case.slice_descriptors)


def _most_doubtful(numbers: np.ndarray, measure: np.ndarray, count: int) -> list[int]:
    """One of each of ``count`` stretches of ``numbers``; of equal ones that nearest to the stretch's middle."""
    found = []
    for stretch in np.array_split(numbers, min(count, len(numbers))):
        middle = stretch[len(stretch) // 2]
        found.append(int(min(stretch, key=lambda n: (-measure[n], abs(n - middle)))))
    return sorted(found, key=lambda n: (-measure[n], n))


def _typical(descriptors: np.ndarray, count: int) -> list[int]:
    """The slice in the middle of each group of similar ones, the largest group first."""
    numbers = np.flatnonzero(np.isfinite(descriptors).all(axis=1))
    points = descriptors[numbers]
    groups = cluster(points, count, seed=0)
    sizes = np.bincount(groups.of)
    distance = np.linalg.norm(points - groups.centres[groups.of], axis=1)
    best = [min(np.flatnonzero(groups.of == group), key=lambda n: distance[n]) for group in range(len(sizes))]
    return [int(numbers[best[group]]) for group in np.argsort(-sizes, kind="stable")]
