"""Labelled and test cases, drawn by patient: no patient is ever on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from samadapt.data.cases import Case
from samadapt.errors import InputError

SEED = 0
"""Of what is tested on; never chosen by its outcome."""


@dataclass(frozen=True)
class Split:
    """Labelled cases for the training, and test cases of other patients."""

    training: list[Case]
    testing: list[Case]


def split_by_patient(cases: Sequence[Case], training: int, testing: int, seed: int = SEED) -> Split:
    """Draw ``training`` and ``testing`` patients; a case whose patient is unknown is a patient of its own.

    Raises:
        InputError: there are fewer labelled patients than that.
    """
    groups = _by_patient(cases)
    if len(groups) < training + testing:
        raise InputError(f"{len(groups)} labelled patients, where {training} + {testing} are needed")
    order = random.Random(seed).sample(sorted(groups), training + testing)
    drawn = [
        sorted((case for patient in part for case in groups[patient]), key=lambda case: case.id)
        for part in (order[:training], order[training:])
    ]
    return Split(drawn[0], drawn[1])


@dataclass(frozen=True)
class NestedSplit:
    """One set of test cases, and training sets of any size of which the larger ones contain the smaller ones.

    Attributes:
        testing: test cases, by id.
        pool: the labelled cases of all other patients, one list per patient.
    """

    testing: list[Case]
    pool: list[list[Case]]

    @property
    def available(self) -> list[Case]:
        """Every case that may be trained on, by id."""
        return sorted((case for patient in self.pool for case in patient), key=lambda case: case.id)

    def training(self, count: int, seed: int) -> list[Case]:
        """The first ``count`` cases in the order that ``seed`` gives the pool, patient by patient.

        Raises:
            InputError: the pool has fewer cases.
        """
        order = random.Random(seed)
        drawn = [
            case for patient in order.sample(self.pool, len(self.pool)) for case in order.sample(patient, len(patient))
        ]
        if count > len(drawn):
            raise InputError(
                f"{len(drawn)} labelled cases beside the {len(self.testing)} test cases and their patients, "
                f"where {count} are needed",
                remedy="Ask for fewer labelled or test cases, or label more.",
            )
        return drawn[:count]


def nested_split(cases: Sequence[Case], testing: int, seed: int = SEED) -> NestedSplit:
    """Draw ``testing`` cases, patient by patient; what is left of the last of these patients is used nowhere.

    Another ``seed`` draws others.

    Raises:
        InputError: there are not more labelled cases, or not more patients, than are tested on.
    """
    groups = _by_patient(cases)
    order = [groups[patient] for patient in random.Random(seed).sample(sorted(groups), len(groups))]
    drawn: list[Case] = []
    taken = 0
    while len(drawn) < testing and taken < len(order):
        drawn += order[taken]
        taken += 1
    if len(drawn) < testing or taken == len(order):
        raise InputError(
            f"{sum(map(len, order))} labelled cases of {len(order)} patients, which leaves none to learn from "
            f"beside {testing} test cases",
            remedy="Ask for fewer test cases, or label more.",
        )
    return NestedSplit(sorted(drawn[:testing], key=lambda case: case.id), order[taken:])


def _by_patient(cases: Sequence[Case]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.id):
        if case.label is not None:
            groups.setdefault(case.patient or f"case {case.id}", []).append(case)
    return groups
