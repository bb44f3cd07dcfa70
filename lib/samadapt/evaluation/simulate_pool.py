"""What a simulation measures (strategies by name) and what it tells them: the link to ``samadapt.activelearning``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from samadapt.activelearning import registry
from samadapt.activelearning.strategy import Candidate, Strategy
from samadapt.activelearning.survey import Survey
from samadapt.activelearning.uncertainty import Revisit
from samadapt.data.cases import Case
from samadapt.data.slice_cache import SliceCache
from samadapt.evaluation.epistemic import Epistemic
from samadapt.model import AdaptedModel


def names() -> list[str]:
    """Every strategy that can be measured: the app's but for the one that looks for wrong labels, and MONAI Label's."""
    return [*(name for name in registry.NAMES if name != Revisit.name), Epistemic.name]


def strategy(name: str, entropy: Callable[[str], float] | None) -> Strategy:
    """The strategy of that name.

    Args:
        name: one of ``names()``.
        entropy: see ``Epistemic``.
    """
    return Epistemic(entropy) if name == Epistemic.name else registry.strategy(name)


class Lookout:
    """Finds out about cases what a strategy reads, and keeps it for later rounds.

    Args:
        folder: where that is kept.
        plain: the model before it learned anything; describes images.
        cache: of embeddings.
    """

    def __init__(self, folder: Path, plain: AdaptedModel, cache: SliceCache) -> None:
        # Descriptors of different backbones, or of other inputs, do not fit together.
        self._survey = Survey(folder / f"{plain.info.backbone}-{plain.info.context}")
        self._plain = plain
        self._cache = cache

    def look(
        self,
        case: Case,
        needs: frozenset[str],
        model: AdaptedModel | None,
        version: str | None,
        earlier: Sequence[AdaptedModel],
        truth: np.ndarray | None,
    ) -> Candidate:
        """What is known of one case.

        Args:
            case: the case.
            needs: names of ``Candidate``'s fields.
            model: in service; None before the first one.
            version: names it; another model has another name.
            earlier: those before it, the latest last.
            truth: uint8 (I,J,K), the label of a labelled case, else None.
        """
        return self._survey.look(
            case.id,
            case.image,
            needs,
            model=model,
            version=version,
            plain=self._plain,
            earlier=earlier,
            cache=self._cache,
            label=truth,
        )
