"""Cases about which a model is least sure, and labels that it does not believe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from samadapt.activelearning.pools import ByScore
from samadapt.activelearning.strategy import Candidate, Pool, Proposal
from samadapt.activelearning.suggest import suggest_slices
from samadapt.inference.examine import Examination, doubtful_foreground

MOST = 5
"""A case is as doubtful as so many of its slices are on average, the most doubtful of those with foreground: as many
as are suggested for labelling. A mean over all would make long volumes look easy, a sum would make them look hard."""

_CHECKED = "Its label was checked already and submitted as it was"
_NOT_LOOKED = "No model has looked at it yet, so nobody knows how hard it is; drawn at random."


def doubt_of(examination: Examination, measure: np.ndarray | None = None) -> float:
    """How doubtful a case is, 0..1: the mean over its ``MOST`` most doubtful slices with foreground.

    Where the model finds nothing, over those where it suspects something; 0 where there are none of these either.

    Args:
        examination: says where there is foreground.
        measure: (N,) 0..1 of each slice; None takes the examination's doubt.
    """
    values = np.nan_to_num(examination.doubt if measure is None else measure)
    inside = np.sort(values[doubtful_foreground(examination, values)])[-MOST:]
    return float(inside.mean()) if len(inside) else 0.0


class Entropy(ByScore):
    """By the entropy of what the model says of its most doubtful slices inside predicted foreground."""

    name = "entropy"
    about = "the case of which the model is least sure where it finds something"
    needs: ClassVar[frozenset[str]] = frozenset({"examination"})

    def score(self, case: Candidate) -> float | None:
        return None if case.examination is None else doubt_of(case.examination)

    def reason(self, case: Candidate, score: float) -> str:
        assert case.examination is not None
        if not score:
            return "The model is sure of it; no less certain case is left."
        found = "" if case.examination.areas.any() else ", and finds nothing that it would mark"
        return f"The model is unsure of its most doubtful slices (entropy {score:.2f} of 1){found}."

    def unknown(self) -> str:
        return _NOT_LOOKED


class Bald(ByScore):
    """By mutual information: several answers are each sure, but not of the same (Houlsby et al., 2011; Gal, 2017)."""

    name = "bald"
    about = "the case on which versions of the model, or answers to altered images, disagree most"
    needs: ClassVar[frozenset[str]] = frozenset({"examination", "spread"})

    def score(self, case: Candidate) -> float | None:
        if case.spread is None:
            return None
        spread = np.nan_to_num(case.spread)
        if case.examination is not None:
            return doubt_of(case.examination, spread)
        return float(np.sort(spread)[-MOST:].mean()) if len(spread) else 0.0

    def slices(self, case: Candidate) -> list[int]:
        return suggest_slices(case, doubt=case.spread)

    def reason(self, case: Candidate, score: float) -> str:
        return f"Several answers of the model disagree on it (mutual information {score:.3f} of 1)."

    def unknown(self) -> str:
        return "Nobody has compared several answers of a model on it yet; drawn at random."


class Disagreement(ByScore):
    """By how far the model's two heads are apart: the one that finds classes, and the one that answers boxes."""

    name = "disagreement"
    about = "the case on which the model's two ways to find the same object disagree most"
    needs: ClassVar[frozenset[str]] = frozenset({"examination", "disagreement"})

    def score(self, case: Candidate) -> float | None:
        value = case.disagreement
        return None if value is None or np.isnan(value) else max(0.0, value)

    def reason(self, case: Candidate, score: float) -> str:
        return f"The model's own mask and what it answers to a box around that mask agree at Dice {1 - score:.2f} only."

    def unknown(self) -> str:
        return "The model's two heads have not been compared on it; drawn at random."


class Revisit(ByScore):
    """Labelled cases by 1 - Dice of label and model: what disagrees most is a label error, or a case to learn from.

    The only strategy that proposes cases that have a label. Those whose label somebody has confirmed come last.
    """

    name = "revisit"
    about = "the labelled case whose label the model believes least: check it for errors"
    needs: ClassVar[frozenset[str]] = frozenset({"examination", "label_dice"})
    of_labelled: ClassVar[bool] = True

    def cases(self, pool: Pool) -> Sequence[Candidate]:
        return pool.labelled

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        in_question, confirmed = (
            [case for case in pool.labelled if case.confirmed == known] for known in (False, True)
        )
        ranked = super().rank(replace(pool, labelled=in_question), count)
        checked = super().rank(replace(pool, labelled=confirmed), count - len(ranked))
        return [*ranked, *(replace(one, score=0.0, reason=f"{_CHECKED}: {one.reason}") for one in checked)]

    def score(self, case: Candidate) -> float | None:
        value = case.label_dice
        return None if value is None or np.isnan(value) else max(0.0, 1 - value)

    def reason(self, case: Candidate, score: float) -> str:
        return f"Its label and the model's mask agree at Dice {1 - score:.2f}; check whether the label is right."

    def unknown(self) -> str:
        return "Its label has not been compared with the model's mask."
