"""``python -m samadapt.evaluation.bench``: the default recipe beside a U-Net from scratch, and simulated clicks.

For each data set the cases are split once by patient, with a fixed seed, into labelled and test cases. Three models
answer for the test cases, on their native grid: the untrained one, the default recipe after a training of so many
minutes, and a U-Net (:mod:`samadapt.evaluation.unet`) that had the same labels for the same wall-clock seconds, right
afterwards on the same machine. Our training itself keeps every fourth labelled patient to choose its best round; the
U-Net trains on all of them.

Clicks are simulated (:mod:`samadapt.evaluation.click_simulation`) on the widest slice of one object of each test case,
for the plain model and for the one that was adapted above, on the same cases.

Everything measured goes to ``bench.json`` as soon as it is known; a later call does only what is missing.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import Case, find_cases
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.data.volume import Volume, write_mask
from samadapt.errors import ConfigError, InputError, SamAdaptError
from samadapt.evaluation import bench_report, growth, speed
from samadapt.evaluation.click_simulation import simulate_clicks, widest_slice
from samadapt.evaluation.metrics import dice
from samadapt.evaluation.records import Records
from samadapt.evaluation.split import Split, split_by_patient
from samadapt.evaluation.unet import train_unet
from samadapt.inference.auto import segment
from samadapt.memory import keep_freed_memory
from samadapt.model import AdaptedModel
from samadapt.project import Project
from samadapt.training import train
from samadapt.training.loop import ROUNDS
from samadapt.training.slices import read_case

MERGED = "all as one"
"""Name under which the Dice of all classes together is kept, beside the classes' own."""

UNTRAINED, OURS, UNET = "untrained", "ours", "unet"


@dataclass(frozen=True)
class DataSet:
    """One set of the bench.

    Attributes:
        key: its name on the command line.
        folder: its folder among the shared data.
        labels: its classes, in the order of the label values.
        training: labelled patients (cases, where the patient is unknown).
        testing: test patients.
    """

    key: str
    folder: str
    labels: LabelMap
    training: int
    testing: int


SETS = {
    bench_set.key: bench_set
    for bench_set in [
        DataSet("acdc", "acdc_mr", LabelMap(("right ventricle", "myocardium", "left ventricle")), 4, 6),
        DataSet("busi", "busi_us_2d", LabelMap(("benign lesion", "malignant lesion")), 20, 10),
        DataSet("hippocampus", "hippocampus_mr", LabelMap(("anterior", "posterior")), 8, 10),
    ]
}
CLICKS = "clicks"
SPEED = "speed"
GROWTH = "growth"
PARTS = (*SETS, CLICKS, SPEED, GROWTH)

CLICKED_CASES = 10
"""Test cases of each set that are clicked on."""


@dataclass(frozen=True)
class Target:
    """What is clicked on in one set.

    Attributes:
        key: of the :class:`DataSet` whose test cases and adapted model are used; any other name has neither, so that
            all its cases count and only the plain model answers.
        folder: among the shared data.
        labels: the set's classes.
        name: the object: one class, or all as one.
    """

    key: str
    folder: str
    labels: LabelMap
    name: str

    def mask(self, truth: np.ndarray) -> np.ndarray:
        """Indices of ``labels`` -> bool, the object."""
        index = self.labels.find(self.name)
        return truth > 0 if index is None else truth == index


TARGETS = [
    Target("acdc", SETS["acdc"].folder, SETS["acdc"].labels, "left ventricle"),
    Target("busi", SETS["busi"].folder, SETS["busi"].labels, "lesion"),
    Target("hippocampus", SETS["hippocampus"].folder, SETS["hippocampus"].labels, "anterior"),
    Target("spleen", "spleen_ct_crop", LabelMap(("spleen",)), "spleen"),
]


def run_set(bench_set: DataSet, shared: Path, minutes: float, output: Path, records: Records) -> None:
    """Measure the untrained model, ours and the U-Net on one set."""
    labels, folder = bench_set.labels, output / bench_set.key
    split = load_split(bench_set, shared)
    names = {"training": _ids(split.training), "testing": _ids(split.testing)}

    def untrained() -> dict[str, Any]:
        model = recipes.build(recipes.DEFAULT, labels)
        return _test(lambda volume: segment(model, volume), split.testing, labels, folder / UNTRAINED)

    def ours() -> dict[str, Any]:
        trained = _train_ours(split.training, labels, minutes, folder)
        model = AdaptedModel.load(folder / trained["model"])
        return trained | _test(lambda volume: segment(model, volume), split.testing, labels, folder / OURS)

    records.measure(f"{bench_set.key}/{UNTRAINED}", names, untrained)
    result = records.measure(f"{bench_set.key}/{OURS}", names | {"minutes": minutes}, ours)
    seconds, model_file = float(result["seconds"]), folder / result["model"]
    records.measure(
        f"{bench_set.key}/{UNET}",
        names | {"seconds": seconds},
        lambda: _unet(split, labels, seconds, model_file, folder),
    )
    bench_report.overlay(split.testing, labels, folder, result["cases"], output / f"{bench_set.key}.png")


def run_clicks(target: Target, shared: Path, output: Path, records: Records) -> None:
    """Simulate clicks with the plain model and, where the results have one, with the adapted model."""
    if target.key in SETS:
        cases = load_split(SETS[target.key], shared).testing[:CLICKED_CASES]
    else:
        cases = find_cases(shared / target.folder)
    settings = {"testing": _ids(cases), "object": target.name}

    def plain() -> dict[str, Any]:
        return _click(recipes.build(recipes.DEFAULT, target.labels), cases, target, "plain")

    records.measure(f"{CLICKS}/{target.key}/plain", settings, plain)
    ours = records.get(f"{target.key}/{OURS}")
    if ours is not None:
        path = output / target.key / ours["model"]
        settings = settings | {"trained": ours["date"]}
        records.measure(
            f"{CLICKS}/{target.key}/adapted",
            settings,
            lambda: _click(AdaptedModel.load(path), cases, target, "adapted"),
        )
    elif target.key in SETS:
        print(f"  no adapted model of {target.key} yet: --only {target.key},{CLICKS} trains one", file=sys.stderr)


def run_speed(output: Path, records: Records) -> None:
    """Measure how fast the parts are, beside their rivals."""
    for number, duel in enumerate(speed.duels(output / SPEED)):
        settings = {"duel": [duel.name, duel.rival], "turns": duel.turns}
        result = records.measure(f"{SPEED}/{number}", settings, lambda duel=duel: speed.fight(duel))  # type: ignore[misc]
        print(f"  {result['name']}: {result['ratio']:.2f} times as fast as {result['rival']}", file=sys.stderr)


def run_growth(shared: Path, output: Path, records: Records) -> None:
    """Measure memory, waiting times and the like, each for itself."""
    for figure in growth.figures(shared, output / GROWTH):
        settings = {"figure": figure.name, "unit": figure.unit, "wanted": figure.wanted}
        result = records.measure(f"{GROWTH}/{figure.name}", settings, figure.measure)
        print(f"  {figure.name}: {result['value']:.3g} {figure.unit} (at most {figure.wanted:g})", file=sys.stderr)


def _click(model: AdaptedModel, cases: Sequence[Case], target: Target, name: str) -> dict[str, Any]:
    """Dice after 1, 2, ... clicks of each case, on the slice that shows most of the object."""
    found: dict[str, list[float]] = {}
    for case in tqdm(cases, desc=f"  {target.key}, {name}: clicking", unit="case"):
        volume, truth, _ = read_case(case, target.labels)
        wanted, axis = target.mask(truth), volume.geometry.acquisition_axis
        scores = simulate_clicks(model, volume, wanted, axis, widest_slice(wanted, axis))
        found[case.id] = [round(score, 4) for score in scores]
    return {"object": target.name, "image_size": model.info.image_size, "cases": found}


def load_split(bench_set: DataSet, shared: Path) -> Split:
    """The set's cases, split."""
    return split_by_patient(find_cases(shared / bench_set.folder), bench_set.training, bench_set.testing)


def _train_ours(cases: Sequence[Case], labels: LabelMap, minutes: float, folder: Path) -> dict[str, Any]:
    """Train from the start with the defaults; where the model lies and what the training says of itself."""
    project = Project(folder)
    if project.published() is not None:
        shutil.rmtree(project.root)  # or the next training would start from that model
    processor = time.process_time()
    with tqdm(total=ROUNDS, desc="  ours: training", unit="round") as bar:

        def show(status: dict[str, Any]) -> None:
            bar.set_postfix_str(status["message"], refresh=False)
            bar.update(status["epoch"] - bar.n)

        done = train(cases, labels, AppConfig(max_train_minutes=minutes), project, show)
    info = AdaptedModel.load(done.model).info
    return {
        "model": str(done.model.relative_to(folder)),
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
        "steps": done.steps,
        "recipe": info.recipe.name,
        "backbone": info.backbone,
        "image_size": info.image_size,
        "trained_on": info.training["cases"],
        "chosen_on": info.training["held_out"],
    }


def _unet(split: Split, labels: LabelMap, seconds: float, ours: Path, folder: Path) -> dict[str, Any]:
    info = AdaptedModel.load(ours).info
    if info.window is None:
        raise InputError("a trained model without a window", where=ours)
    processor = time.process_time()
    with tqdm(total=round(seconds), desc="  U-Net: training", unit="s") as bar:

        def show(used: float, steps: int, loss: float) -> None:
            bar.set_postfix_str(f"step {steps}, loss {loss:.3f}", refresh=False)
            bar.update(min(bar.total, round(used)) - bar.n)

        slices = folder / "unet-slices"
        trained = train_unet(split.training, labels, info.window, seconds, slices, info.context, progress=show)
    shutil.rmtree(slices, ignore_errors=True)
    about = {
        "seconds": round(trained.seconds, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
        "steps": trained.steps,
        "input": list(trained.plan.shape),
        "parameters": trained.parameters,
        "trained_on": _ids(split.training),
        "chosen_on": [],
    }
    return about | _test(trained.segment, split.testing, labels, folder / UNET)


def _test(
    segmenter: Callable[[Volume], np.ndarray], cases: Sequence[Case], labels: LabelMap, folder: Path
) -> dict[str, Any]:
    """Dice per test case and class (null where a class is in neither mask); the masks are kept in ``folder``."""
    found: dict[str, dict[str, float | None]] = {}
    started = time.monotonic()
    for case in tqdm(cases, desc=f"  {folder.name}: testing", unit="case"):
        volume, truth, report = read_case(case, labels)
        mask = segmenter(volume)
        write_mask(folder / f"{case.id}.nii.gz", mask, volume.geometry)
        either = np.where(truth == IGNORE, IGNORE, truth > 0)
        merged = dice((mask > 0).astype(np.uint8), either, LabelMap((MERGED,)))
        scores = dice(mask, truth, labels, report.unknown) | merged
        found[case.id] = {name: None if math.isnan(value) else round(value, 4) for name, value in scores.items()}
    return {"cases": found, "seconds_per_case": round((time.monotonic() - started) / len(cases), 2)}


def _ids(cases: Sequence[Case]) -> list[str]:
    return [case.id for case in cases]


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    return [part for part in PARTS if part in parts]  # clicks last: they use the models of the sets


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1440:
        raise argparse.ArgumentTypeError("minutes of training, above 0, are needed")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m samadapt.evaluation.bench", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--only", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--minutes", type=_minutes, default=4.0, help="training time of each model on each set")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="where the results go")
    parser.add_argument("--again", action="store_true", help="measure again what is already in the results")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    try:
        _run(options)
    except SamAdaptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    if not options.shared.is_dir():
        raise ConfigError("no such folder", where=options.shared, remedy="Name the data sets' folder with --shared.")
    forget = options.only if options.again else ()
    records = Records(options.output / "bench.json", "python -m samadapt.evaluation.bench", forget)
    for key in options.only:
        print(f"{key}:", flush=True)
        if key == CLICKS:
            for target in TARGETS:
                run_clicks(target, options.shared, options.output, records)
        elif key == SPEED:
            run_speed(options.output, records)
        elif key == GROWTH:
            run_growth(options.shared, options.output, records)
        else:
            run_set(SETS[key], options.shared, options.minutes, options.output, records)
        bench_report.write(records.value, options.output)
    print((options.output / "bench.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
