"""A better model within seconds: the head alone, on embeddings that need no encoder any more once they are cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from samadapt.data.slice_cache import SliceCache
from samadapt.model import AdaptedModel
from samadapt.training.loop import Budget, Progress, Trainer
from samadapt.training.slices import PreparedCase

SECONDS = 10.0
STEPS = 400
ROUNDS = 3

WORTHWHILE = 120.0
"""Seconds of a training from which on it begins with a preview; a shorter one needs them for its own steps."""


def refit_head(
    model: AdaptedModel,
    training: Sequence[PreparedCase],
    held_out: Sequence[PreparedCase],
    folder: Path,
    cache: SliceCache,
    report: Callable[[Progress], None],
) -> Progress:
    """Train the head of ``model`` in place, for seconds; its encoder stays as it is.

    The slices are not augmented, so that their embeddings are those that answering annotators has cached already.

    Args:
        model: on its device.
        training: prepared training cases.
        held_out: prepared held-out cases; may be empty.
        folder: for the state of this training; nothing is left in it.
        cache: of embeddings.
        report: as ``Trainer``'s.
    """
    model.freeze_encoder()
    try:
        budget = Budget(SECONDS, STEPS, ROUNDS)
        trainer = Trainer(model, training, held_out, budget, folder, cache, "", report, copies=0)
        trainer.forget()
        done = trainer.run()
        trainer.forget()
        return done
    finally:
        model.release_encoder()
