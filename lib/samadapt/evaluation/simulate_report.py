"""What a simulation shows people: ``report.html``, one file that needs nothing else, ``rounds.csv``, ``curves.png``.

All are made from the results file, the images and the labels.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from samadapt.data.cases import Case, find_cases
from samadapt.data.geometry import turn_to_lps
from samadapt.data.labels import LabelMap
from samadapt.data.slices import take_slice
from samadapt.data.window import default_window
from samadapt.evaluation import annotator, page
from samadapt.evaluation.intervals import DICE, METHOD, Estimate, estimate
from samadapt.evaluation.label_efficiency import (
    FEWEST_DRAWS,
    Curve,
    Duel,
    area_under_budget_curve,
    duels,
    mean_curve,
    mean_stretch,
    shared_stretch,
)
from samadapt.evaluation.pictures import blend, colour
from samadapt.evaluation.records import describe_machine
from samadapt.evaluation.simulate_run import SCATTERED, SLICES, turned_index
from samadapt.files import atomic_path
from samadapt.training.slices import read_case

PAGE, SHEET, CURVES = "report.html", "rounds.csv", "curves.png"

BUDGETS = {
    "slices": "labelled slices",
    "volumes": "cases with a label",
    "clicks": "clicks",
    "seconds": "annotation, minutes",
}
"""What a curve may be drawn over, and what people read below it."""

SHOWN_IN = {"seconds": 60}
"""How much of a budget is one of what people read; 1 where nothing is said."""

DECIDING = "slices"
"""The budget by which ways to choose are compared: a case with more slices is more work and teaches more."""

THUMBNAIL_SIDE, THUMBNAILS = 96, 4
"""Pixels of the longer side of a picture of a chosen case, and how many are shown of one round."""

COLUMNS = (
    "recipe",
    "strategy",
    "unit",
    "seed",
    "round",
    "chosen",
    "volumes",
    "slices",
    "clicks",
    "outlines",
    "annotation_seconds",
    "computation_seconds",
    "mean_dice",
    "class",
    "dice",
)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One way to choose with one recipe.

    Attributes:
        recipe: its name.
        arm: see ``arm``.
        seeds: of the runs that ended well.
        areas: budget -> area under the curve over the stretch that all ways to choose cover, over the seeds.
        final: Dice after the last round.
        slices: labelled at the end, mean over the seeds.
        volumes: cases with a label at the end.
        clicks: of the annotator.
        minutes: of the annotator.
    """

    recipe: str
    arm: str
    seeds: list[int]
    areas: dict[str, Estimate]
    final: Estimate
    slices: float
    volumes: float
    clicks: float
    minutes: float


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        sheet: the CSV file.
        curves: the PNG file; None where there is no finished run.
        rows: the summary.
        stretches: recipe -> budget -> begin and end, mean over the seeds, of what the areas in ``rows`` are over; NaN
            where the ways to choose share nothing.
        duels: recipe -> every pair of ways to choose, by the area over ``DECIDING``.
        failed: the runs without a result: ``recipe``, ``arm``, ``seed`` and ``why``.
    """

    page: Path
    sheet: Path
    curves: Path | None
    rows: list[Row]
    stretches: dict[str, dict[str, tuple[float, float]]]
    duels: dict[str, list[Duel]]
    failed: list[dict[str, Any]]


def arm(strategy: str, unit: str) -> str:
    """A way to choose, for people: the strategy, and what it labels if not whole cases."""
    if unit == SCATTERED:
        return "scattered slices"
    return f"{strategy}, slices" if unit == SLICES else strategy


def write(value: Mapping[str, Any], output: Path) -> Report:
    """Write page, sheet and picture from the results file's content.

    Args:
        value: content of the results file.
        output: its folder.
    """
    results = list(value["results"].values())
    finished = [record for record in results if "failed" not in record and record["rounds"]]
    failed = [
        {**_names(record), "seed": record["settings"]["seed"], "why": record["failed"]}
        for record in results
        if "failed" in record
    ]
    recipes = _grouped(finished, "recipe")
    tests = {recipe: duels(curves_of(runs, DECIDING), largest_test_share(finished)) for recipe, runs in recipes.items()}
    rows = [row for recipe, runs in recipes.items() for row in _rows(recipe, runs)]
    stretches = {
        recipe: {budget: mean_stretch(_real(by_seed.values())) for budget, by_seed in stretches_of(runs).items()}
        for recipe, runs in recipes.items()
    }
    curves = output / CURVES if finished else None
    report = Report(output / PAGE, output / SHEET, curves, rows, stretches, tests, failed)
    with atomic_path(report.sheet) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        writer.writerows(_sheet_rows(finished))
    if report.curves:
        with atomic_path(report.curves) as temporary:
            temporary.write_bytes(page.chart_png(_curves(finished, DECIDING)))
    with atomic_path(report.page) as temporary:
        temporary.write_text(_page(value, finished, report), encoding="utf-8")
    return report


def curves_of(runs: Sequence[Record], budget: str) -> dict[str, dict[int, Curve]]:
    """Way to choose -> seed -> Dice over a budget."""
    found: dict[str, dict[int, Curve]] = {}
    for run in runs:
        found.setdefault(_names(run)["arm"], {})[run["settings"]["seed"]] = Curve(_spent(run, budget), _dice(run))
    return found


def stretches_of(runs: Sequence[Record]) -> dict[str, dict[int, tuple[float, float]]]:
    """Budget -> seed -> begin and end of what all ways to choose cover; the end may lie before the begin."""
    by_seed = _grouped(runs, "seed")
    return {
        budget: {seed: shared_stretch([_spent(run, budget) for run in same]) for seed, same in by_seed.items()}
        for budget in BUDGETS
    }


def areas_of(runs: Sequence[Record]) -> dict[str, dict[str, dict[int, float]]]:
    """Budget -> way to choose -> seed -> area under the curve, over the stretch that all ways cover with that seed."""
    return {
        budget: {
            name: {seed: area_under_budget_curve(*curve, *stretches[seed]) for seed, curve in own.items()}
            for name, own in curves_of(runs, budget).items()
        }
        for budget, stretches in stretches_of(runs).items()
    }


def largest_test_share(runs: Sequence[Record]) -> float:
    """Test cases by cases of the pool, of the run where this is largest; see ``corrected_paired_test``."""
    return max(len(run["settings"]["testing"]) / len(run["settings"]["pool"]) for run in runs)


def _real(stretches: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(begin, end) for begin, end in stretches if begin < end]


def _rows(recipe: str, runs: Sequence[Record]) -> list[Row]:
    areas = areas_of(runs)
    rows = []
    for name, own in _by_arm(runs).items():
        last = [run["rounds"][-1] for run in own]
        rows.append(
            Row(
                recipe,
                name,
                sorted(run["settings"]["seed"] for run in own),
                {budget: estimate(by_arm[name].values(), DICE) for budget, by_arm in areas.items()},
                estimate((_float(done["dice"]) for done in last), DICE),
                **{key: _mean(last, key) for key in ("slices", "volumes", "clicks")},
                minutes=_mean(last, "seconds") / 60,
            )
        )
    return sorted(rows, key=lambda row: -_sortable(row.areas[DECIDING].mean))


def _sheet_rows(finished: Sequence[Record]) -> Iterator[list[Any]]:
    for run in finished:
        settings = run["settings"]
        for number, done in enumerate(run["rounds"], start=1):
            chosen = " ".join(one["id"] for one in done["chosen"])
            spent = [done[key] for key in ("volumes", "slices", "clicks", "outlines", "seconds")]
            named = [settings[key] for key in ("recipe", "strategy", "unit", "seed")]
            for label, dice in done["by_class"].items():
                seconds = round(sum(done["compute"].values()), 2)
                yield [*named, number, chosen, *spent, seconds, done["dice"], label, dice]


# ---- the page


def _page(value: Mapping[str, Any], finished: Sequence[Record], report: Report) -> str:
    simulation = value["simulation"]
    labels = LabelMap(tuple(simulation["labels"]))
    recipes = _grouped(finished, "recipe")
    return page.template("simulate.html").render(
        simulation=simulation,
        intervals=METHOD,
        protocol=simulation["protocol"],
        annotator=annotator,
        labels=[(name, to_hex(colour(index))) for index, name in enumerate(labels.names, start=1)],
        budgets=BUDGETS,
        units={key: SHOWN_IN.get(key, 1) for key in BUDGETS},
        fewest=FEWEST_DRAWS,
        deciding=BUDGETS[DECIDING],
        report=report,
        charts=[(BUDGETS[key], page.chart_uri(_curves(finished, key))) for key in BUDGETS] if finished else [],
        choices=[_choices(recipe, runs, labels, simulation["studies"]) for recipe, runs in recipes.items()],
        by_class=_by_class(recipes, labels),
        runs=[{**run, **_names(run)} for run in finished],
        machine=describe_machine(value["machine"]) if value["machine"] else "Nothing was measured yet.",
        versions=value.get("versions", {}),
        commands=list(dict.fromkeys(record["command"] for record in value["results"].values())),
    )


def _curves(finished: Sequence[Record], budget: str) -> Figure:
    """Dice over a budget: one panel for each recipe, one line for each way to choose, a band over the seeds."""
    recipes = _grouped(finished, "recipe")
    names = list(dict.fromkeys(_names(run)["arm"] for run in finished))
    # Names may hold what matplotlib would take for formulas.
    with matplotlib.rc_context({"text.parse_math": False}):
        chart = Figure(figsize=(5.5 * len(recipes) + 2, max(4.5, 0.18 * len(names) + 0.5)), layout="constrained")
        panels = chart.subplots(1, len(recipes), squeeze=False, sharey=True)[0]
        for panel, (recipe, runs) in zip(panels, recipes.items(), strict=True):
            for name, own in _by_arm(runs).items():
                x, found = mean_curve([_spent(run, budget) for run in own], [_dice(run) for run in own])
                x = [value / SHOWN_IN.get(budget, 1) for value in x]
                style = page.line_style(names.index(name))
                panel.plot(x, [one.mean for one in found], label=name, marker="o", markersize=3, **style)
                low, high = ([getattr(one, end) for one in found] for end in ("low", "high"))
                panel.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            panel.set(title=recipe, xlabel=BUDGETS[budget])
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("mean Dice on the test cases")
        panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return chart


def _by_class(recipes: Mapping[str, Sequence[Record]], labels: LabelMap) -> list[dict[str, Any]]:
    """Dice of each class after the last round."""
    return [
        {
            "recipe": recipe,
            "arm": name,
            "dice": [
                estimate((_float(run["rounds"][-1]["by_class"][label]) for run in own), DICE) for label in labels.names
            ],
        }
        for recipe, runs in recipes.items()
        for name, own in _by_arm(runs).items()
    ]


def _choices(recipe: str, runs: Sequence[Record], labels: LabelMap, studies: str) -> dict[str, Any]:
    """What each way to choose took in every round, with pictures, for the smallest seed."""
    known = {case.id: case for case in find_cases(studies)} if Path(studies).is_dir() else {}
    seed = min(run["settings"]["seed"] for run in runs)

    @functools.cache
    def picture(name: str, slices: tuple[int, ...]) -> str | None:
        return page.slice_uri(_thumbnail(known[name], labels, slices), THUMBNAIL_SIDE) if name in known else None

    arms = []
    for run in runs:
        if run["settings"]["seed"] != seed:
            continue
        rounds = []
        for number, done in enumerate(run["rounds"], start=1):
            shown = [{**one, "uri": picture(one["id"], tuple(one["slices"] or ()))} for one in _first(done["chosen"])]
            more = len(done["chosen"]) - len(shown)
            rounds.append({"number": number, "dice": _float(done["dice"]), "chosen": shown, "more": more})
        arms.append({"name": _names(run)["arm"], "rounds": rounds})
    return {"recipe": recipe, "seed": seed, "arms": arms}


def _first(chosen: Sequence[Record]) -> Sequence[Record]:
    return chosen[:THUMBNAILS]


def _thumbnail(case: Case, labels: LabelMap, slices: Sequence[int]) -> np.ndarray:
    """(H,W,3) in 0..1: of ``slices`` (none: all) the one that shows most of the true label, upright, label over it."""
    volume, truth, _ = read_case(case, labels)
    turn = turn_to_lps(volume.geometry)
    axis = int(turn.steps[volume.geometry.acquisition_axis][0])
    upright = turn.forward(truth)
    areas = np.moveaxis(upright > 0, axis, 0).sum(axis=(1, 2))
    places = [turned_index(volume.geometry, index) for index in slices] or range(len(areas))
    index = max(places, key=lambda place: int(areas[place]))
    channels = turn.forward(default_window(volume).apply(volume.array))
    image = np.stack([take_slice(channel, axis, index) for channel in channels], axis=-1)
    return blend(np.broadcast_to(image, (*image.shape[:2], 3)), take_slice(upright, axis, index))


# ---- reading records


def _names(run: Record) -> dict[str, str]:
    settings = run["settings"]
    return {"recipe": settings["recipe"], "arm": arm(settings["strategy"], settings["unit"])}


def _grouped(runs: Sequence[Record], key: str) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = {}
    for run in runs:
        found.setdefault(run["settings"][key], []).append(run)
    return found


def _by_arm(runs: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for run in runs:
        found.setdefault(_names(run)["arm"], []).append(run)
    return found


def _spent(run: Record, budget: str) -> list[float]:
    return [float(done[budget]) for done in run["rounds"]]


def _dice(run: Record) -> list[float]:
    return [_float(done["dice"]) for done in run["rounds"]]


def _mean(rounds: Sequence[Record], key: str) -> float:
    return float(np.mean([done[key] for done in rounds]))


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _sortable(value: float) -> float:
    return -1.0 if math.isnan(value) else value
