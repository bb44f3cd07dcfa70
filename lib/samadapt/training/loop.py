"""The training loop: an ignite engine with warm-up, clipping, rounds, early stopping and resume."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from samadapt.data.labels import IGNORE, resize_label
from samadapt.data.slice_cache import SliceCache
from samadapt.encoding import working_precision
from samadapt.errors import StateError
from samadapt.evaluation.metrics import mean
from samadapt.model import AdaptedModel
from samadapt.recipes import Recipe
from samadapt.training import checkpoint
from samadapt.training.losses import class_loss, prompt_loss
from samadapt.training.slices import Draw, PreparedCase, SliceSampler, unknown_classes
from samadapt.training.synthetic import SyntheticSlices
from samadapt.training.tokens import TokenSource

ROUNDS = 20
"""A training is shown to people as so many rounds ("epochs" in the viewers) of equal budget; each ends with a check."""

PATIENCE = 14
"""Rounds without a better held-out Dice before training stops early. Many, because the best ones are the last, when the
learning rate is low: with 8 a training on eight volumes ended at round 15 with the weights of round 7."""

CLIP = 1.0
"""Largest norm of the gradient."""

VALIDATION_SLICES = 32
"""Slices per held-out case in the check after each round; evenly spread where a case has more."""

VALIDATION_SHARE = 0.1
"""Share of a training's time for these checks: where they have taken more, a round ends without one. The last never."""


@dataclass(frozen=True)
class Budget:
    """Training ends when either limit is reached; the learning rate falls over the same stretch.

    Attributes:
        seconds: wall-clock time of the loop, over all resumed parts.
        steps: optimiser steps.
        rounds: parts that it is divided into; each ends with a check.
    """

    seconds: float
    steps: int
    rounds: int = ROUNDS

    def used(self, seconds: float, steps: int) -> float:
        """Share of the budget that is used, 0..1."""
        return min(1.0, max(seconds / self.seconds, steps / self.steps))


@dataclass
class Progress:
    """Where a training stands; part of every checkpoint.

    Attributes:
        step: optimiser steps done.
        seconds: time spent in the loop by earlier processes, and after the end by all of them.
        checking: seconds of these that went into checks on the held-out cases.
        resumed: the step at which this process took over from an earlier one; 0: it began itself.
        round: rounds done.
        best: best mean held-out Dice so far (None: nothing held out, or no round done).
        best_round: the round that reached it.
        loss: smoothed training loss.
        stopped_early: whether it ended before its budget because it did not get better.
        history: one record per round.
    """

    step: int = 0
    seconds: float = 0.0
    checking: float = 0.0
    resumed: int = 0
    round: int = 0
    best: float | None = None
    best_round: int = 0
    loss: float | None = None
    stopped_early: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains ``model`` in place; afterwards it holds the best round's parameters (without held-out cases: the last).

    Args:
        model: on its device.
        training: prepared training cases.
        held_out: prepared held-out cases; may be empty.
        budget: when to end.
        folder: where the checkpoint and the best parameters are kept until ``forget``.
        cache: of tokens.
        fingerprint: changes with anything that makes an old checkpoint useless.
        report: called often with ``Progress``; cheap.
        copies: see ``SliceSampler``; None takes the recipe's.
        synthetic: see ``SliceSampler``.
    """

    def __init__(
        self,
        model: AdaptedModel,
        training: Sequence[PreparedCase],
        held_out: Sequence[PreparedCase],
        budget: Budget,
        folder: Path,
        cache: SliceCache,
        fingerprint: str,
        report: Callable[[Progress], None],
        copies: int | None = None,
        synthetic: SyntheticSlices | None = None,
    ) -> None:
        recipe = model.info.recipe
        self._model = model
        self._held_out = held_out
        self._budget = budget
        self._checkpoint = folder / checkpoint.FILE
        self._best = folder / "best.safetensors"
        self._fingerprint = fingerprint
        self._report = report
        size = model.info.image_size
        self._sampler = SliceSampler(
            training, size, recipe.batch_size, recipe.seed, recipe.copies if copies is None else copies, synthetic
        )
        self._tokens = TokenSource(model, self._sampler, cache)
        self._parameters = {name: p for name, p in model.trainable().items() if p.requires_grad}
        self._buffers = model.learned_buffers()
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._parameters, recipe, model.head.pretrained), fused=True
        )
        self._device = next(model.parameters()).device
        self._started = 0.0
        self.progress = Progress()

    def run(self) -> Progress:
        """Train to the end of the budget, from the last checkpoint if there is one of the same training.

        Raises:
            StateError: the loss is no longer a number.
        """
        self._resume()
        self._started = time.monotonic()
        self._report(self.progress)
        engine = Engine(self._step)
        engine.logger.setLevel(logging.CRITICAL)  # what goes wrong in it is said by whoever called it
        engine.add_event_handler(Events.ITERATION_STARTED, self._set_learning_rate)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        remaining = self._budget.steps - self.progress.step
        if remaining > 0 and self._used() < 1:
            self._model.train()
            engine.run(self._batches(), max_epochs=1, epoch_length=remaining)
        self.progress.seconds, self._started = self._seconds(), time.monotonic()
        if self._best.is_file():
            self._model.load_trained(self._best)
        self._model.eval()
        return self.progress

    def resumable(self) -> bool:
        """Whether ``run`` would go on where an earlier process was stopped."""
        state = checkpoint.peek(self._checkpoint)
        return state is not None and state.get("fingerprint") == self._fingerprint

    def given_up(self) -> int:
        """Steps of an unfinished training that ``run`` cannot go on from, since it was of something else; 0: none."""
        state = checkpoint.peek(self._checkpoint)
        return 0 if state is None or self.resumable() else int(state.get("step", 0))

    def forget(self) -> None:
        """Remove the checkpoint: the training is over and its result is safe."""
        self._checkpoint.unlink(missing_ok=True)
        self._best.unlink(missing_ok=True)

    def _batches(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        for step in itertools.count(self.progress.step):
            draws = self._sampler.draws(step)
            unknown = unknown_classes(draws, self._model.info.labels)
            yield step, *self._tokens.batch(draws), None if unknown is None else unknown.to(self._device)

    def _step(self, engine: Engine, batch: tuple[int, Tensor, Tensor, Tensor | None]) -> float:
        step, tokens, labels, unknown = batch
        recipe = self._model.info.recipe
        generator = torch.Generator().manual_seed((recipe.seed << 32) + step)
        with working_precision(self._device):
            embeddings = self._model.embed_tokens(tokens)
            loss = class_loss(self._model.class_logits(embeddings), labels, unknown)
            if recipe.prompt_weight and self._model.takes_prompts:
                loss = loss + recipe.prompt_weight * prompt_loss(self._model, embeddings, labels, generator)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), CLIP)
        self._optimizer.step()
        return float(loss.detach())

    def _set_learning_rate(self, engine: Engine) -> None:
        factor = schedule(self._used(), self._model.info.recipe.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _after_step(self, engine: Engine) -> None:
        progress, loss = self.progress, float(engine.state.output or 0.0)
        if not math.isfinite(loss):
            raise StateError(
                f"the loss became {loss} at step {progress.step}",
                remedy="Train with a lower learning rate; the published model is unchanged.",
            )
        progress.step += 1
        progress.loss = loss if progress.loss is None else 0.9 * progress.loss + 0.1 * loss
        if self._used() >= min(1.0, (progress.round + 1) / self._budget.rounds):
            self._finish_round()
            progress.stopped_early = self._used() < 1 and self._hopeless()
            if self._used() >= 1 or progress.stopped_early:
                engine.terminate()
        self._report(progress)

    def _finish_round(self) -> None:
        progress = self.progress
        progress.round = max(progress.round + 1, int(self._used() * self._budget.rounds))
        due = progress.checking < VALIDATION_SHARE * self._seconds() or self._used() >= 1
        scores = self._validate() if due else {}
        found = mean(scores.values()) if scores else None
        # Nothing found yet is no best to wait from: the first Dice above 0 starts the patience.
        if found is not None and found > (progress.best or 0.0):  # false for NaN, too
            progress.best, progress.best_round = found, progress.round
            self._model.save(self._best)
        record = {"round": progress.round, "step": progress.step, "loss": progress.loss, "dice": scores}
        progress.history.append(record)
        state = {**vars(progress), "seconds": self._seconds(), "fingerprint": self._fingerprint}
        checkpoint.save(self._checkpoint, self._parameters, self._buffers, self._optimizer, state)

    def _hopeless(self) -> bool:
        return self.progress.best is not None and self.progress.round - self.progress.best_round >= PATIENCE

    def _resume(self) -> None:
        state = checkpoint.peek(self._checkpoint)
        if state is None or not self.resumable():
            self.forget()
            return
        del state["fingerprint"]
        checkpoint.restore(self._checkpoint, self._parameters, self._buffers, self._optimizer)
        self.progress = Progress(**{**state, "resumed": state["step"]})

    def _validate(self) -> dict[str, float]:
        """Mean Dice of each class over the held-out cases, in the model frame, on a few slices: quick, for choosing."""
        if not self._held_out:
            return {}
        started = time.monotonic()
        self._model.eval()
        scores = [frame_dice(self._model, case, VALIDATION_SLICES, self._tokens) for case in self._held_out]
        self._model.train()
        self.progress.checking += time.monotonic() - started
        return {name: mean(score[name] for score in scores) for name in self._model.info.labels.names}

    def _seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self._started

    def _used(self) -> float:
        return self._budget.used(self._seconds(), self.progress.step)


def schedule(used: float, warmup: float) -> float:
    """Linear rise over the first ``warmup`` of the budget, then half a cosine down to one hundredth."""
    if used < warmup:
        return max(used / warmup, 0.02)
    return max(0.5 * (1 + math.cos(math.pi * (used - warmup) / (1 - warmup))), 0.01)


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter], recipe: Recipe, pretrained: Collection[str] = ()
) -> list[dict[str, Any]]:
    """AdamW's parameter groups. Norms, biases and tokens are not decayed: zero is no natural value for them.

    Args:
        parameters: of a whole model, by name.
        recipe: its rates and its weight decay.
        pretrained: see ``Head.pretrained``.
    """
    rates = {"head.prompted.": recipe.prompt_learning_rate, "head.": recipe.head_learning_rate}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), recipe.learning_rate)
        if name.removeprefix("head.") in pretrained:
            rate = recipe.transformer_learning_rate
        matrix = parameter.ndim >= 2 and "token" not in name
        groups.setdefault((rate, recipe.weight_decay if matrix else 0.0), []).append(parameter)
    return [
        {"params": members, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


@torch.inference_mode()
def frame_dice(model: AdaptedModel, case: PreparedCase, most: int, source: TokenSource) -> dict[str, float]:
    """Dice of each class over at most ``most`` labelled slices of one case together, evenly spread, in the model frame.

    NaN where a class is in neither mask, or where nobody has looked for it.
    """
    names = model.info.labels.names
    overlap, total = [0] * len(names), [0] * len(names)
    places = torch.linspace(0, len(case.learned_from) - 1, min(len(case.learned_from), most)).round().long().tolist()
    for start in range(0, len(places), model.info.recipe.batch_size):
        chunk = places[start : start + model.info.recipe.batch_size]
        tokens, label = source.batch([Draw(case, case.learned_from[place], None) for place in chunk])
        found = model.class_logits(model.embed_tokens(tokens)).argmax(dim=1)
        truth = resize_label(label, found.shape)
        found[truth == IGNORE] = 0
        for n in range(len(names)):
            a, b = found == n + 1, truth == n + 1
            overlap[n] += int((a & b).sum())
            total[n] += int(a.sum() + b.sum())
    measured = [total[n] > 0 and n + 1 not in case.unknown for n in range(len(names))]
    return {name: 2 * overlap[n] / total[n] if measured[n] else math.nan for n, name in enumerate(names)}
