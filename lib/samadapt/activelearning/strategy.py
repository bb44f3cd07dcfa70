"""The one interface of all strategies: a pool of cases in, a ranking with reasons out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from samadapt.inference.examine import Examination


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is known of one case.

    Attributes:
        id: case id.
        descriptor: (D,) float32 of the frozen encoder, of unit length; None where it has not been computed.
        slice_descriptors: (N,D) the same of single slices, for suggestions; NaN for all but some, evenly spread; None
            where not computed.
        examination: of the model in service; None where it has not seen the case yet, or there is no model.
        variants: examinations of the same case by other versions or of altered images; empty where there are none.
        spread: (N,) 0..1, how much these disagree in each slice (mutual information of BALD in units of log(K+1), over
            suspected pixels); None where there are none.
        disagreement: 0..1, 1 - Dice between the model's two heads; None where not computed.
        label_dice: for a labelled case, Dice of label and the model's mask; None where not computed.
        confirmed: whether somebody has checked its label and left it as it is.
        proposed: when it was proposed last (seconds since the epoch); 0: never.
        patient: whose image it is; None where that is unknown, which counts as a patient of its own.
    """

    id: str
    descriptor: np.ndarray | None = None
    slice_descriptors: np.ndarray | None = None
    examination: Examination | None = None
    variants: Sequence[Examination] = ()
    spread: np.ndarray | None = None
    disagreement: float | None = None
    label_dice: float | None = None
    confirmed: bool = False
    proposed: float = 0.0
    patient: str | None = None


@dataclass(frozen=True, eq=False)
class Pool:
    """All cases that a strategy may think about.

    Attributes:
        unlabelled: may be proposed (those that somebody is at, or that cannot be read, are not among them).
        labelled: have a final label.
        classes: names of the model's classes.
        seed: of whatever is random; the same pool and seed give the same ranking.
        leased: have none yet, but somebody is at them: where a choice depends on what was chosen before, they count as
            labelled.
    """

    unlabelled: Sequence[Candidate]
    labelled: Sequence[Candidate]
    classes: Sequence[str] = ()
    seed: int = 0
    leased: Sequence[Candidate] = ()

    @property
    def chosen(self) -> list[Candidate]:
        """What was proposed and taken: the labelled and the leased ones."""
        return [*self.labelled, *self.leased]


@dataclass(frozen=True)
class Proposal:
    """One case to label.

    Attributes:
        id: case id.
        score: larger is wanted more; comparable within one ranking only.
        reason: one sentence for the annotator: why this case.
        slices: which slices to label if not all, the most useful first; counted across the acquisition axis of the
            image as stored, from 0.
    """

    id: str
    score: float
    reason: str
    slices: list[int] = field(default_factory=list)


class Strategy(ABC):
    """Ranks the cases of a pool.

    Attributes:
        name: as people choose it.
        about: one sentence for the viewers.
        needs: which of ``Candidate``'s fields it reads, beside the id; without them it says so in its reasons and falls
            back to what it can do.
        of_labelled: whether it proposes cases that have a label, instead of those without.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    of_labelled: ClassVar[bool] = False

    @abstractmethod
    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        """The best ``count`` cases in the order in which to label them, fewer where there are fewer.

        Those of one ranking belong together: a strategy that wants variety counts the earlier ones as labelled.
        """
