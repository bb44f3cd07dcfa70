"""Doubt and variety at once, so that one choice does not repeat what the one before has taught."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from samadapt.activelearning.clusters import cluster, one_of_each
from samadapt.activelearning.coldstart import Space
from samadapt.activelearning.pools import by_id, chance, completed
from samadapt.activelearning.strategy import Candidate, Pool, Proposal, Strategy
from samadapt.activelearning.suggest import suggest_slices
from samadapt.activelearning.uncertainty import doubt_of

FIRST_POWER, LAST_POWER = 1.0, 100.0
LAST_AFTER = 32
"""Labelled cases after which the noise is as small as it gets."""


class Claspe(Strategy):
    """Class-stratified scheduled power predictive entropy, ClaSP PE (Lüth et al., 2026, arXiv 2601.13677).

    The classes take turns, and after the last all foreground together has one: each turn chooses by the doubt about
    that class, so that rare ones are served as well. A case's score is the logarithm of its doubt plus Gumbel noise
    divided by a power (Kirsch et al., 2023): a draw in proportion to doubt**power. The power grows from 1 to 100, so
    that early choices vary and later ones follow the doubt. The paper's schedule runs over a budget known beforehand;
    this one over the first ``LAST_AFTER`` labelled cases, as nobody knows how many an annotator will do.

    Labelled and leased cases also decide whose turn it is, and labelled ones draw new noise, so that proposals asked
    for one by one behave as those of one ranking.
    """

    name = "claspe"
    about = "a case of which the model is unsure, the classes in turn, with some chance"
    needs: ClassVar[frozenset[str]] = frozenset({"examination"})

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        waiting = [case for case in by_id(pool.unlabelled) if case.examination is not None]
        turns = _turns(waiting)
        labelled, chosen = len(pool.labelled), len(pool.chosen)
        draws = {(turn, case.id): _drawn(case, turn, labelled, pool.seed) for turn in turns for case in waiting}
        ranked: list[Proposal] = []
        while waiting and len(ranked) < count:
            first = (chosen + len(ranked)) % len(turns)
            in_turn = [*turns[first:], *turns[:first]]
            turn = next((one for one in in_turn if any(draws[one, case.id] > -math.inf for case in waiting)), None)
            best = max(waiting, key=lambda case: draws[turn, case.id])
            waiting.remove(best)
            slices = suggest_slices(best, doubt=_measure(best, turn))
            reason = _reason(_doubt(best, turn), turn, pool)
            ranked.append(Proposal(best.id, 1 / (1 + len(ranked)), reason, slices))
        return completed(ranked, pool.unlabelled, pool, count, "No model has looked at it yet; drawn at random.")


class Clue(Strategy):
    """One case of each doubtful region: CLUE, clustering of uncertainty-weighted embeddings (Prabhu et al., 2021).

    k-means on the descriptors, weighted by doubt; of each cluster the case nearest to its centre. As many clusters as
    cases will be labelled after the choice; those with a labelled case come last. (BADGE would take the gradient of the
    last layer for each case, which nothing keeps; CLUE's two ingredients, an embedding and a doubt, are at hand.)
    """

    name = "clue"
    about = "a case of which the model is unsure, unlike the labelled ones"
    needs: ClassVar[frozenset[str]] = frozenset({"descriptor", "examination"})

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        examined = [case for case in pool.unlabelled if case.examination is not None]
        space = Space.of(Pool(examined, pool.chosen))
        wanted = min(count, len(space.cases))
        ranked: list[Proposal] = []
        for point in _clue(space, wanted, pool.seed) if wanted > 0 else []:
            case = space.cases[point]
            doubt = f"doubt {_doubt(case, None):.2f} of 1"
            reason = f"The model is unsure of cases like this one ({doubt}), and few of them are labelled."
            ranked.append(Proposal(case.id, 1 / (1 + len(ranked)), reason, suggest_slices(case)))
        missing = "The model or the encoder has not looked at it yet; drawn at random."
        return completed(ranked, pool.unlabelled, pool, count, missing)


def power(labelled: int) -> float:
    """By what power doubt counts after so many labelled cases: ``FIRST_POWER`` to ``LAST_POWER``, in equal ratios."""
    done = min(1.0, labelled / LAST_AFTER)
    return FIRST_POWER * (LAST_POWER / FIRST_POWER) ** done


def _clue(space: Space, count: int, seed: int) -> list[int]:
    """Numbers of chosen cases."""
    labelled, points = len(space.covered), space.all_points
    doubts = np.array([_doubt(case, None) for case in space.cases])
    weights = np.concatenate([np.full(labelled, doubts.mean()), doubts])
    groups = cluster(points, labelled + count, seed, weights)
    from_centre = np.linalg.norm(points - groups.centres[groups.of], axis=1)
    return [point - labelled for point in one_of_each(groups, -from_centre, weights, labelled, count)]


def _turns(cases: list[Candidate]) -> list[int | None]:
    """The classes, and behind them None: all foreground together."""
    classes = {len(case.examination.overlap) for case in cases if case.examination is not None}
    return [*range(min(classes, default=0)), None]


def _measure(case: Candidate, turn: int | None) -> np.ndarray:
    """(N,) the doubt about one class where it is found, or suspected if it is found nowhere; None: about all."""
    examination = case.examination
    assert examination is not None
    if turn is None:
        return np.nan_to_num(examination.doubt)
    doubt = np.nan_to_num(examination.class_doubt[:, turn])
    found = examination.areas[:, turn] > 0
    return doubt * found if found.any() else doubt


def _doubt(case: Candidate, turn: int | None) -> float:
    assert case.examination is not None
    return doubt_of(case.examination, _measure(case, turn))


def _drawn(case: Candidate, turn: int | None, labelled: int, seed: int) -> float:
    """The logarithm of a case's doubt with Gumbel noise; a case without doubt comes last."""
    doubt = _doubt(case, turn)
    noise = -math.log(-math.log(chance(seed, labelled, turn, case.id)))
    return math.log(doubt) + noise / power(labelled) if doubt > 0 else -math.inf


def _reason(doubt: float, turn: int | None, pool: Pool) -> str:
    if doubt <= 0:
        return "The model is sure of it; no less certain case is left."
    if turn is None:
        return f"Drawn from the cases of which the model is unsure (doubt {doubt:.2f} of 1)."
    name = pool.classes[turn] if turn < len(pool.classes) else f"class {turn + 1}"
    return f"Drawn from the cases in which the model is unsure of {name} (doubt {doubt:.2f} of 1)."
