"""All strategies by name."""

from __future__ import annotations

from samadapt.activelearning.automatic import Auto
from samadapt.activelearning.coldstart import KCenter, ProbCover, TypiClust
from samadapt.activelearning.hybrid import Claspe, Clue
from samadapt.activelearning.simple import First, Last, Random, RandomForeground
from samadapt.activelearning.strategy import Strategy
from samadapt.activelearning.uncertainty import Bald, Disagreement, Entropy, Revisit
from samadapt.errors import ConfigError

_STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (
        Auto,
        Random,
        First,
        Last,
        RandomForeground,
        KCenter,
        TypiClust,
        ProbCover,
        Entropy,
        Bald,
        Disagreement,
        Claspe,
        Clue,
        Revisit,
    )
}

NAMES: tuple[str, ...] = tuple(_STRATEGIES)
"""The default first."""


def strategy(name: str) -> Strategy:
    """A strategy by name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in _STRATEGIES:
        raise ConfigError(f"there is no strategy {name!r}", where="strategy", remedy=f"There are: {', '.join(NAMES)}.")
    return _STRATEGIES[name]()
