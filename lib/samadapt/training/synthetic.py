"""Synthetic slices beside the real ones of a training: a bank that slices are drawn from as they are from a case."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from samadapt.data.synthesis import LESIONS, ORGANS, LabelledSlice, Synthesis, choose_exemplars, synthesize
from samadapt.training.slices import PreparedCase

VERSION = 2
"""Of how samples are made: raise it with any change, and no token of an old one is taken for a new one's."""

BANK = 200
"""Synthetic slices of a training. A frozen encoder runs once for each, so their number bounds time and cache."""

BACKGROUNDS = 200
"""Slices to paste onto, at most."""

FEWEST = 0.25
"""Share of all slices that serve as backgrounds where each one shows a structure: those that show least."""

RANGES = {"exemplar": ORGANS, "lesions": LESIONS}
"""What is drawn for each kind of synthesis, by its name in recipes and settings."""

Choice = Callable[[Sequence[LabelledSlice]], list[int]]


Source = tuple[PreparedCase, int]
"""A real slice that samples are made of: its case, and which slice."""


class SyntheticSlices:
    """``BANK`` synthetic slices, each made when it is asked for; no image is kept.

    Args:
        cases: training cases, at least one of which shows a class.
        seed: of all draws.
        choose: labelled slices -> positions of the exemplars among them.
        ranges: of what is drawn for each structure.
        share: see Attributes; None takes ``synthetic_share``.

    Attributes:
        key: changes with everything that the samples depend on.
        view_key: the same; see ``PreparedCase``.
        share: of the draws of a training that are synthetic, 0..1.
        exemplars: slices that structures are cut from.
        backgrounds: slices that they are pasted onto.
        remark: what people should know about them; empty where there is nothing.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        seed: int,
        choose: Choice = choose_exemplars,
        ranges: Synthesis = ORGANS,
        share: float | None = None,
    ) -> None:
        self._seed = seed
        self._ranges = ranges
        shown = {(case, index): areas for case in cases for index, areas in _areas(case).items()}
        sources = list(shown)
        labelled = [LabelledSlice(case, areas) for (case, _), areas in shown.items()]
        self.exemplars = [sources[n] for n in choose(labelled)]
        self.backgrounds, self.remark = _backgrounds(cases, shown, seed)
        self.share = synthetic_share(len({case.id for case in cases})) if share is None else share
        self.key = self.view_key = self._digest()

    def __len__(self) -> int:
        return BANK

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3,S,S) float32 in [0,1] and label (S,S) int64 of a sample; always the same for the same ``index``."""
        (case, cut), (other, onto), random = self._sources(index)
        return synthesize(case.pair(cut), other.pair(onto), self._ranges, random)

    def unknown_on(self, index: int) -> tuple[int, ...]:
        """Classes that the background of a sample may be: those of the slice that it is made on."""
        _, (case, onto), _ = self._sources(index)
        return case.unknown_on(onto)

    def _sources(self, index: int) -> tuple[Source, Source, np.random.Generator]:
        """Exemplar and background of a sample, and what draws the rest."""
        random = np.random.default_rng([self._seed, index, 1])  # [seed, number] draws the batches
        exemplar = self.exemplars[random.integers(len(self.exemplars))]
        background = self.backgrounds[random.integers(len(self.backgrounds))]
        return exemplar, background, random

    def _digest(self) -> str:
        used = [
            [[case.key, case.view_key, index] for case, index in sources]
            for sources in (self.exemplars, self.backgrounds)
        ]
        parts = [VERSION, self._seed, dataclasses.astuple(self._ranges), used]
        return "synthetic " + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def synthetic_share(cases: int) -> float:
    """Share of synthetic draws: four for each real one with one case, one for each from five cases on.

    Between them the four fall in equal steps (methods 6.2 gives the ends): 3.25, 2.5 and 1.75 with 2, 3 and 4 cases.
    """
    ratio = float(np.interp(cases, [1, 5], [4.0, 1.0]))
    return ratio / (1 + ratio)


def _areas(case: PreparedCase) -> dict[int, dict[int, int]]:
    """Slice index -> class -> its pixels; only slices that show something."""
    found: dict[int, dict[int, int]] = {}
    for label, indices in case.slices_of.items():
        for index, area in zip(indices, case.areas[label], strict=True):
            found.setdefault(index, {})[label] = area
    return found


def _backgrounds(
    cases: Sequence[PreparedCase], shown: dict[Source, dict[int, int]], seed: int
) -> tuple[list[Source], str]:
    """Slices without a label, drawn evenly from all; where there are none, those that show least, and a remark."""
    empty = [(case, index) for case in cases for index in case.learned_from if (case, index) not in shown]
    if empty:
        chosen = np.random.default_rng(seed).permutation(len(empty))[:BACKGROUNDS]
        return [empty[n] for n in sorted(chosen)], ""
    count = min(BACKGROUNDS, max(1, round(FEWEST * len(shown))))
    fewest = sorted(shown, key=lambda source: sum(shown[source].values()))[:count]
    return fewest, "every slice shows a structure, so synthetic ones are made on those that show least"
