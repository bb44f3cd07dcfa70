"""What a comparison shows people: ``report.html``, one file without anything outside it, and ``results.csv``.

Both are made from the results file, the kept masks and the images.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap
from samadapt.evaluation import page
from samadapt.evaluation.compare_run import MASKS, run_folder
from samadapt.evaluation.intervals import DICE, LENGTH, METHOD, Estimate, estimate
from samadapt.evaluation.metrics import mean
from samadapt.evaluation.pictures import blend, colour, widest_slice_of
from samadapt.evaluation.records import describe_machine
from samadapt.files import atomic_path
from samadapt.terminal import figure as number
from samadapt.training.loop import ROUNDS

FEW_STEPS = 60
"""With fewer optimiser steps a recipe has hardly left its warm-up, and a comparison says who starts quickest."""

PAGE, SHEET = "report.html", "results.csv"

DICE_RANGE = (-0.02, 1.02)
"""Of an axis; a little more than 0 to 1, so that points at the ends are seen whole."""

COLUMNS = (
    "recipe",
    "labelled_cases",
    "seed",
    "test_case",
    "class",
    "dice",
    "hd95_mm",
    "missed",
    "trainable_parameters",
    "file_bytes",
    "seconds_per_step",
    "steps",
    "training_seconds",
    "peak_gib",
)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """How well the runs of one recipe with one number of labelled cases did; over the seeds first, then over cases.

    Attributes:
        dice: 0..1.
        hd95: mm.
        defined: pairs of masks with a surface distance, over cases, classes and seeds.
        missed: pairs of which exactly one is empty: they count as Dice 0 and have no distance.
    """

    dice: Estimate
    hd95: Estimate
    defined: int
    missed: int


@dataclass(frozen=True)
class Row:
    """One recipe with one number of labelled cases.

    Attributes:
        recipe: its name.
        labelled: number of labelled cases.
        seeds: of the runs that ended well.
        scores: over all classes.
        by_class: class -> its own.
        trainable_parameters: number of weights that training changes.
        file_bytes: size of the model file.
        seconds_per_step: median over steps, then over seeds.
        steps: optimiser steps, median over seeds.
        peak_gib: largest resident size of a run, the largest of the seeds.
    """

    recipe: str
    labelled: int
    seeds: list[int]
    scores: Scores
    by_class: dict[str, Scores]
    trainable_parameters: int
    file_bytes: int
    seconds_per_step: float
    steps: float
    peak_gib: float


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        sheet: the CSV file.
        rows: the summary, one for each recipe and number of labelled cases.
        failed: the runs without a result: ``recipe``, ``labelled``, ``seed`` and ``why``.
        remarks: what people should know before they believe the figures.
    """

    page: Path
    sheet: Path
    rows: list[Row]
    failed: list[dict[str, Any]]
    remarks: list[str]


def write(value: Mapping[str, Any], output: Path) -> Report:
    """Write page and sheet from the results file's content.

    Args:
        value: content of the results file.
        output: its folder.
    """
    results = list(value["results"].values())
    finished = [record for record in results if "failed" not in record]
    failed = [
        {**{key: record["settings"][key] for key in ("recipe", "labelled", "seed")}, "why": record["failed"]}
        for record in results
        if "failed" in record
    ]
    labels = LabelMap(tuple(value["comparison"]["labels"]))
    rows = summarise(finished, labels)
    remarks = _remarks(rows)
    sheet, report = output / SHEET, output / PAGE
    with atomic_path(sheet) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        writer.writerows(_sheet_rows(finished))
    with atomic_path(report) as temporary:
        temporary.write_text(_page(value, finished, failed, rows, remarks, labels, output), encoding="utf-8")
    return Report(report, sheet, rows, failed, remarks)


def _remarks(rows: Sequence[Row]) -> list[str]:
    few = [f"{row.recipe} with {row.labelled} ({row.steps:g})" for row in rows if row.steps < FEW_STEPS]
    if not few:
        return []
    return [
        f"Fewer than {FEW_STEPS} optimiser steps, too few to judge by: {', '.join(few)}. Give more --minutes, or count "
        "steps: --conf max_steps with ample --minutes."
    ]


def summarise(finished: Sequence[Record], labels: LabelMap) -> list[Row]:
    """One row for each recipe and number of labelled cases, ordered by that number, then as the recipes came."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in finished:
        settings = record["settings"]
        groups.setdefault((settings["labelled"], settings["recipe"]), []).append(record)
    return [
        Row(
            recipe,
            labelled,
            sorted(record["settings"]["seed"] for record in runs),
            _scores(runs, labels.names),
            {name: _scores(runs, [name]) for name in labels.names},
            runs[0]["trainable_parameters"],
            runs[0]["file_bytes"],
            statistics.median(record["seconds_per_step"] for record in runs),
            statistics.median(record["steps"] for record in runs),
            max(record["peak_gib"] for record in runs),
        )
        for (labelled, recipe), runs in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _scores(runs: Sequence[Record], names: Sequence[str]) -> Scores:
    pairs = {
        case: [run["cases"][case][name] for run in runs for name in names]
        for case in dict.fromkeys(case for run in runs for case in run["cases"])
    }
    flat = [pair for found in pairs.values() for pair in found]
    return Scores(
        estimate((mean(_float(pair["dice"]) for pair in found) for found in pairs.values()), DICE),
        estimate((mean(_float(pair["hd95_mm"]) for pair in found) for found in pairs.values()), LENGTH),
        sum(pair["hd95_mm"] is not None for pair in flat),
        sum(map(_missed, flat)),
    )


def _missed(pair: Mapping[str, float | None]) -> bool:
    """Exactly one of the two masks is empty."""
    return pair["dice"] is not None and pair["hd95_mm"] is None


def _sheet_rows(finished: Iterable[Record]) -> Iterator[list[Any]]:
    for record in finished:
        settings = record["settings"]
        cost = [record[key] for key in (*COLUMNS[8:12], "seconds", "peak_gib")]
        for case, classes in record["cases"].items():
            for name, pair in classes.items():
                measured = [pair["dice"], pair["hd95_mm"], int(_missed(pair))]
                yield [settings["recipe"], settings["labelled"], settings["seed"], case, name, *measured, *cost]


# ---- the page


def _page(
    value: Mapping[str, Any],
    finished: Sequence[Record],
    failed: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    remarks: Sequence[str],
    labels: LabelMap,
    output: Path,
) -> str:
    comparison = value["comparison"]
    # Names may hold what matplotlib would take for formulas; those of classes and cases stand in the HTML only.
    with matplotlib.rc_context({"text.parse_math": False}):
        charts = [_dice_chart(rows), *_learning_curves(finished)] if finished else []
    return page.template("compare.html").render(
        comparison=comparison,
        intervals=METHOD,
        labels=[(name, to_hex(colour(index))) for index, name in enumerate(labels.names, start=1)],
        rows=rows,
        remarks=remarks,
        failed=failed,
        charts=charts,
        overlays=_overlays(finished, labels, comparison["studies"], output) if finished else [],
        runs=finished,
        training=_training_sets(finished),
        machine=describe_machine(value["machine"]) if value["machine"] else "Nothing was measured yet.",
        versions=value.get("versions", {}),
        commands=list(dict.fromkeys(record["command"] for record in value["results"].values())),
    )


def _training_sets(finished: Sequence[Record]) -> list[dict[str, Any]]:
    """The labelled cases of each seed and number, once."""
    found = {}
    for record in finished:
        settings = record["settings"]
        found[settings["seed"], settings["labelled"]] = settings["training"]
    return [{"seed": seed, "labelled": count, "ids": ids} for (seed, count), ids in sorted(found.items())]


def _dice_chart(rows: Sequence[Row]) -> dict[str, str]:
    """Dice against the number of labelled cases."""
    names, counts = _names(row.recipe for row in rows), sorted({row.labelled for row in rows})
    chart = Figure(figsize=(8, _height(4.5, names)), layout="constrained")
    axis = chart.subplots()
    for position, name in enumerate(names):
        own = [row for row in rows if row.recipe == name]
        shift = 0.2 * (position / max(1, len(names) - 1) - 0.5)
        means = np.array([row.scores.dice.mean for row in own])
        spread = np.array([[_reach(row.scores.dice, end) for row in own] for end in ("low", "high")])
        places = [counts.index(row.labelled) + shift for row in own]
        axis.errorbar(places, means, spread, label=name, marker="o", capsize=3, **page.line_style(position))
    axis.set(xlabel="labelled cases", ylabel="mean Dice on the test cases", ylim=DICE_RANGE)
    axis.set_xticks(range(len(counts)), list(map(str, counts)))
    axis.set_xlim(-0.5, len(counts) - 0.5)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    title = "Dice against the number of labelled cases"
    return {
        "title": title,
        "about": "Bars: 95 % confidence interval over the test cases.",
        "uri": page.chart_uri(chart),
    }


def _reach(found: Estimate, end: str) -> float:
    edge = getattr(found, end)
    return 0.0 if math.isnan(edge) else abs(edge - found.mean)


def _learning_curves(finished: Sequence[Record]) -> Iterator[dict[str, str]]:
    """For every number of labelled cases: training loss and, where something is held out, Dice, round by round."""
    names = _names(record["settings"]["recipe"] for record in finished)
    for count in sorted({record["settings"]["labelled"] for record in finished}):
        runs = [record for record in finished if record["settings"]["labelled"] == count]
        checked = any(done["dice"] for record in runs for done in record["rounds"])
        columns = 2 if checked else 1
        chart = Figure(figsize=(4.5 * columns + 2, _height(3.5, names)), layout="constrained")
        axes = chart.subplots(1, columns, squeeze=False)[0]
        _plot_rounds(axes[0], runs, names, lambda done: _float(done["loss"]))
        axes[0].set_title("training loss")
        if checked:
            _plot_rounds(axes[1], runs, names, lambda done: mean(map(_float, done["dice"].values())))
            axes[1].set(title="held-out Dice", ylim=DICE_RANGE)
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        about = "One line for each seed. Losses of different recipes are made of different terms: compare their course."
        if not checked:
            about += " Nothing is held out of so few cases, so there is no Dice to show."
        yield {
            "title": f"Learning curves, {count} labelled case{'s' if count > 1 else ''}",
            "about": about,
            "uri": page.chart_uri(chart),
        }


def _plot_rounds(axis: Axes, runs: Sequence[Record], names: Sequence[str], read: Callable[[Record], float]) -> None:
    """A line for each run; ``read`` takes the value from the record of a round, NaN where it has none."""
    labelled: set[str] = set()
    for record in runs:
        name = record["settings"]["recipe"]
        points = [(done["round"] / ROUNDS, read(done)) for done in record["rounds"]]
        shares, values = np.reshape([point for point in points if not math.isnan(point[1])], (-1, 2)).T
        label = None if name in labelled else name
        labelled.add(name)
        axis.plot(shares, values, label=label, marker=".", **page.line_style(names.index(name)))
    axis.set(xlabel="share of the training", xlim=(0, 1))
    axis.grid(alpha=0.3)


def _overlays(finished: Sequence[Record], labels: LabelMap, studies: str, output: Path) -> list[dict[str, Any]]:
    """Best, median and worst test case of the runs with most labels, by the mean over recipes; of the first seed."""
    most = max(record["settings"]["labelled"] for record in finished)
    runs = [record for record in finished if record["settings"]["labelled"] == most]
    seed = min(record["settings"]["seed"] for record in runs)
    runs = [record for record in runs if record["settings"]["seed"] == seed]
    means = {
        case: mean(_float(pair["dice"]) for run in runs for pair in run["cases"][case].values())
        for case in runs[0]["cases"]
    }
    order = sorted((case for case in means if not math.isnan(means[case])), key=lambda case: -means[case])
    known = {case.id: case for case in find_cases(studies)} if Path(studies).is_dir() else {}
    places = {"best": 0, "median": len(order) // 2, "worst": -1} if order else {}
    found: list[dict[str, Any]] = []
    for word, place in places.items():
        case = order[place]
        if case in (overlay["case"] for overlay in found):
            continue
        files = [run_folder(output, run["settings"]["recipe"], most, seed) / MASKS / f"{case}.nii.gz" for run in runs]
        if case not in known or not all(file.is_file() for file in files):
            continue
        image, masks = widest_slice_of(known[case], labels, files)
        captions = ["image", "truth"]
        for run in runs:
            dice = mean(_float(pair["dice"]) for pair in run["cases"][case].values())
            captions.append(f"{run['settings']['recipe']}: {number(dice, 2)}")
        pictures = [image, *(blend(image, mask) for mask in masks)]
        panels = [(text, page.slice_uri(picture)) for text, picture in zip(captions, pictures, strict=True)]
        found.append(
            {"word": word, "case": case, "dice": means[case], "labelled": most, "seed": seed, "panels": panels}
        )
    return found


def _names(recipes: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(recipes))


def _height(least: float, names: Sequence[str]) -> float:
    """Inches, so that the legend has room."""
    return max(least, 0.18 * len(names) + 0.5)


def _float(value: float | None) -> float:
    return math.nan if value is None else value
