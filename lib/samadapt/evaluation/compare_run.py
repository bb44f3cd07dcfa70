"""``python -m samadapt.evaluation.compare_run FOLDER``: one run of a comparison, in a process of its own.

Reads ``FOLDER/job.json``, trains, segments the test cases into ``FOLDER/masks`` and writes ``FOLDER/result.json``,
which says ``{"failed": why}`` where that was not possible.
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from samadapt.config import AppConfig
from samadapt.data.cases import Case, assume, find_cases
from samadapt.data.labels import LabelMap
from samadapt.data.volume import Volume, write_mask
from samadapt.data.window import choose_window
from samadapt.evaluation.apart import job_main
from samadapt.evaluation.metrics import dice, hd95
from samadapt.evaluation.unet import TrainedUNet, train_unet
from samadapt.inference.auto import segment
from samadapt.model import AdaptedModel
from samadapt.project import Project
from samadapt.training import train
from samadapt.training.loop import ROUNDS
from samadapt.training.slices import read_case

MASKS = "masks"

UNETS: dict[str, int | None] = {"unet_auto": None, "unet_2d": 2, "unet_3d": 3}
"""Networks of ``samadapt.evaluation.unet`` that stand beside the recipes, with their dimensions; None: by the data."""

_Segmenter = Callable[[Volume], np.ndarray]


@dataclass(frozen=True)
class Job:
    """What one run does.

    Attributes:
        studies: folder of all cases.
        labels: the classes, in order.
        recipe: a recipe's name, or one of ``UNETS``.
        seed: of the run's randomness.
        training: ids of the cases to learn from.
        testing: ids of the cases to test on.
        settings: as ``AppConfig.from_strings`` takes them.
    """

    studies: str
    labels: list[str]
    recipe: str
    seed: int
    training: list[str]
    testing: list[str]
    settings: dict[str, str]

    @property
    def config(self) -> AppConfig:
        """All settings of the run; a U-Net keeps the default recipe's, which it does not use."""
        chosen = {} if self.recipe in UNETS else {"recipe": self.recipe}
        return AppConfig.from_strings({**self.settings, **chosen, "seed": str(self.seed)})

    @property
    def seconds(self) -> float:
        """Time of the training."""
        return self.config.train_seconds(len(self.training))


def run_folder(output: Path, recipe: str, labelled: int, seed: int) -> Path:
    """Where the model, the masks and the log of one run are."""
    return output / "runs" / f"{recipe.replace('/', '_')}-{labelled}-{seed}"


@dataclass
class Pace:
    """Steps and the times at which they were seen."""

    points: list[tuple[int, float]] = field(default_factory=list)

    def see(self, step: int, seconds: float) -> None:
        """``step`` steps were done ``seconds`` after the start."""
        if not self.points or step > self.points[-1][0]:
            self.points.append((step, seconds))

    def seconds_per_step(self) -> float:
        """Median over the steps between the points; NaN before the second point."""
        found = [((later - earlier) / (n - m), n - m) for (m, earlier), (n, later) in itertools.pairwise(self.points)]
        if not found:
            return math.nan
        paces, steps = zip(*found, strict=True)
        return float(np.median(np.repeat(paces, steps)))


def execute(job: Job, folder: Path) -> dict[str, Any]:
    """Train and test; what there is to report of it.

    Raises:
        SamAdaptError: as training and reading cases raise it.
    """
    labels = LabelMap(tuple(job.labels))
    known = {case.id: case for case in assume(find_cases(job.studies), job.config.coverage)}
    training, testing = ([known[name] for name in names] for names in (job.training, job.testing))
    learn = _train_unet if job.recipe in UNETS else _train_recipe
    about, segmenter = learn(job, training, labels, folder)
    started = time.monotonic()
    scores = score(segmenter, testing, labels, folder / MASKS)
    about["test_seconds_per_case"] = (time.monotonic() - started) / len(testing)
    if torch.cuda.is_available():
        about["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {**about, "cases": scores}


def score(
    segmenter: _Segmenter, cases: Sequence[Case], labels: LabelMap, folder: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """Case id -> class -> ``dice`` and ``hd95_mm``, as ``samadapt.evaluation.metrics`` defines them.

    Args:
        segmenter: volume -> uint8 (I,J,K) indices of ``labels``.
        cases: labelled ones.
        labels: the classes.
        folder: the masks are kept there, one ``ID.nii.gz`` for each case.
    """
    found = {}
    for case in cases:
        volume, truth, report = read_case(case, labels)
        mask = segmenter(volume)
        write_mask(folder / f"{case.id}.nii.gz", mask, volume.geometry)
        overlap = dice(mask, truth, labels, report.unknown)
        distance = hd95(mask, truth, labels, volume.geometry.spacing, report.unknown)
        found[case.id] = {name: {"dice": overlap[name], "hd95_mm": distance[name]} for name in labels.names}
    return found


def _train_recipe(job: Job, cases: Sequence[Case], labels: LabelMap, folder: Path) -> tuple[dict[str, Any], _Segmenter]:
    pace = Pace()

    def see(record: Mapping[str, Any]) -> None:
        if record["message"].startswith("training:") and "step" in record:
            pace.see(record["step"], record["seconds"])

    config, project = job.config, Project(folder)
    done = train(cases, labels, config, project, see)
    for made_again in (project.cache, project.training):
        shutil.rmtree(made_again, ignore_errors=True)
    model = AdaptedModel.load(done.model, config.weights)
    seconds_per_step = pace.seconds_per_step()
    about = {
        "trainable_parameters": sum(parameter.numel() for parameter in model.trainable().values()),
        "file_bytes": done.model.stat().st_size,
        "seconds_per_step": done.seconds / max(1, done.steps) if math.isnan(seconds_per_step) else seconds_per_step,
        "steps": done.steps,
        "seconds": done.seconds,
        "rounds": model.info.training["rounds"],
        "input": [model.info.image_size] * 2,
        "backbone": model.info.backbone,
        "trained_on": model.info.training["cases"],
        "held_out": model.info.training["held_out"],
        "one_click_dice": model.info.training["one_click_dice"],
        "remarks": done.remarks,
    }
    model.merge()
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return about, lambda volume: segment(model, volume)


def _train_unet(job: Job, cases: Sequence[Case], labels: LabelMap, folder: Path) -> tuple[dict[str, Any], _Segmenter]:
    config, progress = job.config, _UNetProgress(Project(folder), job.seconds)
    # Two passes, so that one volume at a time is in memory.
    window = choose_window(
        (read_case(case, labels)[0] for case in cases), (read_case(case, labels)[1] for case in cases)
    )
    trained: TrainedUNet = train_unet(
        cases,
        labels,
        window,
        job.seconds,
        folder / "slices",
        1 if config.context is None else config.context,
        job.seed,
        progress.see,
        UNETS[job.recipe],
    )
    shutil.rmtree(folder / "slices", ignore_errors=True)
    model = folder / "unet.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in trained.network.state_dict().items()}, model)
    about = {
        "trainable_parameters": trained.parameters,
        "file_bytes": model.stat().st_size,
        "seconds_per_step": progress.pace.seconds_per_step() if trained.steps > 1 else trained.seconds,
        "steps": trained.steps,
        "seconds": trained.seconds,
        "rounds": progress.rounds,
        "input": list(trained.plan.shape),
        "backbone": None,
        "trained_on": [case.id for case in cases],
        "held_out": [],
        "one_click_dice": None,
        "remarks": [],
    }
    return about, trained.segment


class _UNetProgress:
    """Records a U-Net's training as the library records its own: in rounds of equal time, with a smoothed loss."""

    def __init__(self, project: Project, seconds: float) -> None:
        self.pace = Pace()
        self.rounds: list[dict[str, Any]] = []
        self._project = project
        self._seconds = seconds
        self._loss: float | None = None

    def see(self, used: float, step: int, loss: float) -> None:
        self.pace.see(step, used)
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        reached = min(ROUNDS, int(ROUNDS * used / self._seconds))
        if reached > (self.rounds[-1]["round"] if self.rounds else 0):
            self.rounds.append({"round": reached, "step": step, "loss": self._loss, "dice": {}})
            self._project.write_status(state="running", epoch=reached, total_epochs=ROUNDS)


def main(arguments: Sequence[str]) -> int:
    """Do the job of one folder; the exit status."""
    folder = Path(arguments[0])
    return job_main(folder, lambda job: execute(Job(**job), folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
