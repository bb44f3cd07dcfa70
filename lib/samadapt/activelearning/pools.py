"""What several strategies share: chance that can be repeated, cases in an order, and what to do without knowledge."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from samadapt.activelearning.strategy import Candidate, Pool, Proposal, Strategy
from samadapt.activelearning.suggest import suggest_slices


def by_id(cases: Sequence[Candidate]) -> list[Candidate]:
    """In an order that does not depend on the one in which they came."""
    return sorted(cases, key=lambda case: case.id)


def chance(*parts: object) -> float:
    """A number between 0 and 1, never either, without pattern: the same for the same parts in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return (int.from_bytes(digest[:6], "big") + 0.5) / 2**48


def shuffled(cases: Sequence[Candidate], seed: int) -> list[Candidate]:
    """In an order without pattern; those proposed longest ago, or never, come first."""
    return sorted(cases, key=lambda case: (case.proposed, chance(seed, case.id), case.id))


def completed(
    ranked: list[Proposal], cases: Sequence[Candidate], pool: Pool, count: int, reason: str
) -> list[Proposal]:
    """``ranked``, and behind it as many of the other ``cases`` as make ``count``, in an order without pattern.

    Args:
        ranked: chosen for a reason, scores above or at 0.
        cases: all that may be proposed.
        pool: gives the seed.
        count: how many at most.
        reason: what is missing to say more of the others.
    """
    taken = {proposal.id for proposal in ranked}
    others = shuffled([case for case in cases if case.id not in taken], pool.seed)
    wanted = max(0, count - len(ranked))
    rest = [Proposal(case.id, 0.0, reason, suggest_slices(case)) for case in others[:wanted]]
    return [*ranked[: max(0, count)], *rest]


def patients_in_turn(rank: Callable[[Pool, int], list[Proposal]], pool: Pool, count: int) -> list[Proposal]:
    """A ranking of those cases whose patients have been chosen least often; the others follow, again by patient.

    Images of one patient teach nearly the same.

    Args:
        rank: a strategy's ``rank``; asked for the cases of some patients at a time.
        pool: all cases.
        count: how many at most.
    """
    waiting, taken, ranked = list(pool.unlabelled), list(pool.leased), list[Proposal]()
    while waiting and len(ranked) < count:
        chosen = Counter(map(_patient, [*pool.labelled, *taken]))
        least = min(chosen[_patient(case)] for case in waiting)
        group = {case.id: case for case in waiting if chosen[_patient(case)] == least}
        for proposal in rank(replace(pool, unlabelled=list(group.values()), leased=taken), count - len(ranked)):
            case = group[proposal.id]
            if chosen[_patient(case)] == least:
                chosen[_patient(case)] += 1
                ranked.append(replace(proposal, score=1 / (1 + len(ranked))))
                taken = [*taken, case]
                waiting.remove(case)
    return ranked


def _patient(case: Candidate) -> tuple[str, str]:
    """Capitals of a patient's name do not count, as in the ledger."""
    return ("case", case.id) if case.patient is None else ("patient", case.patient.casefold())


class ByScore(Strategy):
    """Ranks cases by one number of each; equal ones in an order without pattern."""

    @abstractmethod
    def score(self, case: Candidate) -> float | None:
        """0 or more, larger is wanted more; None where what it takes is not known of the case."""

    @abstractmethod
    def reason(self, case: Candidate, score: float) -> str:
        """One sentence for the annotator."""

    @abstractmethod
    def unknown(self) -> str:
        """The reason of cases without a score."""

    def cases(self, pool: Pool) -> Sequence[Candidate]:
        """Those that may be proposed."""
        return pool.unlabelled

    def slices(self, case: Candidate) -> list[int]:
        """Which slices to label."""
        return suggest_slices(case)

    def rank(self, pool: Pool, count: int = 1) -> list[Proposal]:
        known = [(score, case) for case in self.cases(pool) if (score := self.score(case)) is not None]
        known.sort(key=lambda pair: (-pair[0], chance(pool.seed, pair[1].id), pair[1].id))
        ranked = [
            Proposal(case.id, score, self.reason(case, score), self.slices(case))
            for score, case in known[: max(0, count)]
        ]
        return completed(ranked, self.cases(pool), pool, count, self.unknown())
