"""The library's strategies as the host calls them."""

from __future__ import annotations

from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from samadapt.activelearning.registry import NAMES, strategy
from samadapt.activelearning.strategy import Strategy as Ranking
from samadapt.server.outlook import Outlook

ASKED_BY_OHIF = "random"
"""OHIF sends this name whatever people choose, so that it stands for the configured strategy."""


class Proposes(Strategy):
    """Gives each annotator the best case that nobody else has.

    Args:
        ranking: the strategy.
        outlook: what it may know.
    """

    def __init__(self, ranking: Ranking, outlook: Outlook) -> None:
        super().__init__(ranking.about)
        self._ranking = ranking
        self._outlook = outlook

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        return self._outlook.propose(self._ranking, request.get("client_id"))

    def why_nothing(self) -> str:
        """Why there was no case, for whoever has asked for one."""
        return self._outlook.why_nothing(self._ranking)


def all_strategies(configured: str, outlook: Outlook) -> dict[str, Strategy]:
    """Every strategy by name; ``random`` means ``configured``."""
    named: dict[str, Strategy] = {name: Proposes(strategy(name), outlook) for name in NAMES}
    return {**named, ASKED_BY_OHIF: Proposes(strategy(configured), outlook)}
