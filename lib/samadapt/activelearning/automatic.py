"""The default: variety first, doubt as soon as a model can say what it doubts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from samadapt.activelearning.coldstart import TypiClust
from samadapt.activelearning.hybrid import Claspe
from samadapt.activelearning.pools import patients_in_turn
from samadapt.activelearning.strategy import Pool, Proposal, Strategy

LABELLED = 4
"""Labels that a model needs before its doubt counts: with fewer, typical cases teach most (Hacohen et al., 2022)."""

EXAMINED = 8
"""Unlabelled cases that a model must have looked at before its doubt about some of them says anything: all where there
are fewer."""


class Auto(Strategy):
    """``TypiClust`` until there are some labels and a model has examined enough cases, then ``Claspe``.

    Both among the patients of whom fewest images are labelled.
    """

    name = "auto"
    about = "typical cases first; later those of which the model is unsure, the classes in turn; new patients first"
    needs: ClassVar[frozenset[str]] = TypiClust.needs | Claspe.needs

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        examined = sum(case.examination is not None for case in pool.unlabelled)
        enough = min(EXAMINED, len(pool.unlabelled))
        if len(pool.labelled) >= LABELLED and examined >= enough:
            return _because(
                f"By doubt, as the model has examined {examined} of {len(pool.unlabelled)} cases",
                patients_in_turn(Claspe().rank, pool, count),
            )
        if len(pool.labelled) < LABELLED:
            waits = f"only {len(pool.labelled)} of {LABELLED} labels are there"
        else:
            waits = f"the model has examined only {examined} of {enough} cases"
        return _because(f"By variety, as {waits}", patients_in_turn(TypiClust().rank, pool, count))


def _because(why: str, proposals: list[Proposal]) -> list[Proposal]:
    """The same, with what was decided before the reasons."""
    return [replace(proposal, reason=f"{why}: {proposal.reason}") for proposal in proposals]
