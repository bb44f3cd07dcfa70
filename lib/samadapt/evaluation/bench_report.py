"""What the bench shows people: one Markdown page and pictures, made from its JSON results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from samadapt.data.cases import Case
from samadapt.data.labels import LabelMap
from samadapt.evaluation.click_simulation import median_by_click
from samadapt.evaluation.metrics import mean, mean_by_class
from samadapt.evaluation.pictures import colour, widest_slice_of
from samadapt.evaluation.records import describe_machine
from samadapt.files import atomic_path

PAGE = "bench.md"
CLICKS_PICTURE = "clicks.png"
SHOWN = 4
"""Test cases in a picture: evenly spread from our worst to our best, so that nothing is picked by eye."""

METHODS = {"untrained": "untrained model", "ours": "samadapt, default recipe", "unet": "U-Net from scratch"}


def write(value: Mapping[str, Any], output: Path) -> None:
    """Write the Markdown page, and the picture of the clicks where there are any.

    Args:
        value: content of ``bench.json``.
        output: folder.
    """
    results = value["results"]
    sets = dict.fromkeys(key.split("/")[0] for key in results if not key.startswith(("clicks/", "speed/", "growth/")))
    parts = [describe_machine(value["machine"]), *(_set(name, results) for name in sets)]
    clicks = {key.removeprefix("clicks/"): record for key, record in results.items() if key.startswith("clicks/")}
    if clicks:
        parts.append(_clicks(clicks))
        _draw_clicks(clicks, output / CLICKS_PICTURE)
    if duels := [record for key, record in results.items() if key.startswith("speed/")]:
        parts.append(_speed(duels))
    if figures := [record for key, record in results.items() if key.startswith("growth/")]:
        parts.append(_growth(figures))
    with atomic_path(output / PAGE) as temporary:
        temporary.write_text("\n\n".join(["# Bench", *parts]) + "\n", encoding="utf-8")


def _speed(duels: Sequence[Mapping[str, Any]]) -> str:
    """A table of every duel: how many times faster than the rival, and whether that is enough."""
    head = [
        "## Speed",
        "",
        "| what | beside | ms | rival ms | times as fast | wanted |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    rows = [
        f"| {duel['name']} | {duel['rival']} | {1000 * duel['ours_seconds']:.0f} | {1000 * duel['rival_seconds']:.0f} "
        f"| {duel['ratio']:.2f} | {duel['target']:.2f} |"
        for duel in duels
    ]
    return "\n".join([*head, *rows])


def _growth(figures: Sequence[Mapping[str, Any]]) -> str:
    """A table of every figure that is to stay below a limit."""
    head = ["## Growth and waiting", "", "| what | measured | at most |", "| --- | ---: | ---: |"]
    rows = [
        f"| {s['figure']} | {figure['value']:.3g} {s['unit']} | {s['wanted']:g} {s['unit']} |"
        for figure in figures
        for s in [figure["settings"]]
    ]
    return "\n".join([*head, *rows])


def mean_dice(record: Mapping[str, Any]) -> dict[str, float]:
    """Mean Dice of each class (and of all as one) over the test cases of a record; NaN where it was in none."""
    return mean_by_class([_numbers(scores) for scores in record["cases"].values()])


def median_dice(record: Mapping[str, Any]) -> list[float]:
    """Median Dice over the cases of a clicks record after 1, 2, ... clicks."""
    return median_by_click(list(record["cases"].values()))


def overlay(
    cases: Sequence[Case], labels: LabelMap, folder: Path, ours: Mapping[str, Mapping[str, float | None]], path: Path
) -> None:
    """Picture of test slices: image, truth, our mask, the U-Net's; the slice with the largest labelled area.

    Args:
        cases: test cases.
        labels: their classes.
        folder: holds ``ours/ID.nii.gz`` and ``unet/ID.nii.gz``.
        ours: our Dice per case and class, for the order.
        path: PNG.
    """
    scores = {case.id: mean(_numbers(ours[case.id]).get(name, math.nan) for name in labels.names) for case in cases}
    order = sorted(cases, key=lambda case: scores[case.id] if not math.isnan(scores[case.id]) else -1.0)
    chosen = [order[round(n)] for n in np.linspace(0, len(order) - 1, min(SHOWN, len(order)))]
    figure = Figure(figsize=(11, 2.8 * len(chosen) + 0.5), layout="constrained")
    axes = figure.subplots(len(chosen), 4, squeeze=False)
    for row, case in zip(axes, chosen, strict=True):
        panels = _panels(case, labels, folder)
        for axis, (title, image, mask) in zip(row, panels, strict=True):
            _show(axis, title, image, mask)
        row[0].set_ylabel(f"{case.id}\nours {scores[case.id]:.2f}")
    patches = [Patch(color=colour(n), label=name) for n, name in enumerate(labels.names, start=1)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    _save(figure, path)


def _panels(case: Case, labels: LabelMap, folder: Path) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    image, shown = widest_slice_of(case, labels, [folder / name / f"{case.id}.nii.gz" for name in ("ours", "unet")])
    titles = ("image", "truth", "samadapt", "U-Net from scratch")
    return list(zip(titles, [image] * 4, [None, *shown], strict=True))


def _show(axis: Axes, title: str, image: np.ndarray, mask: np.ndarray | None) -> None:
    axis.imshow(image)
    if mask is not None:
        colours = np.zeros((*mask.shape, 4))
        for label in np.unique(mask[mask > 0]):
            colours[mask == label] = (*colour(int(label)), 0.5)
        axis.imshow(colours, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def _set(name: str, results: Mapping[str, Any]) -> str:
    records = {method: results[f"{name}/{method}"] for method in METHODS if f"{name}/{method}" in results}
    columns = list(next(iter(next(iter(records.values()))["cases"].values())))
    lines = [
        _row(["", *columns[:-1], "mean of classes", columns[-1], "training", "steps"]),
        _row(["---"] + ["---:"] * (len(columns) + 3)),
    ]
    for method, record in records.items():
        scores = mean_dice(record)
        figures = [*(scores[n] for n in columns[:-1]), mean(scores[n] for n in columns[:-1]), scores[columns[-1]]]
        time = f"{record['seconds']:.0f} s" if "seconds" in record else "-"
        lines.append(_row([METHODS[method], *map(_figure, figures), time, str(record.get("steps", "-"))]))
    return "\n".join([f"## {name}", "", _about(records), "", *lines, "", f"![Test slices]({name}.png)"])


def _about(records: Mapping[str, Any]) -> str:
    settings = next(iter(records.values()))["settings"]
    given, tested = len(settings["training"]), len(settings["testing"])
    text = (
        f"Mean Dice on the native grid of {tested} test cases; {given} labelled cases of other patients to learn from."
    )
    if "ours" in records:
        ours = records["ours"]
        text += (
            f" Ours ({ours['backbone']}, {ours['image_size']} px) trains on {len(ours['trained_on'])} of them"
            f" and keeps {len(ours['chosen_on'])} to choose its best round."
        )
    if "unet" in records:
        unet = records["unet"]
        text += (
            f" The U-Net ({len(unet['input'])}D, {unet['parameters'] / 1e6:.1f} million weights,"
            f" input {' x '.join(map(str, unet['input']))}) trains on all {len(unet['trained_on'])}."
        )
    return text


def _clicks(clicks: Mapping[str, Any]) -> str:
    counts = max(len(median_dice(record)) for record in clicks.values())
    heads = ["1 click", *(f"{n} clicks" for n in range(2, counts + 1))]
    lines = [
        _row(["data", "object", "model", "cases", *heads]),
        _row(["---"] * 3 + ["---:"] * (counts + 1)),
    ]
    for key, record in clicks.items():
        name, model = key.split("/")
        figures = map(_figure, median_dice(record))
        lines.append(_row([name, record["object"], model, str(len(record["cases"])), *figures]))
    text = (
        "Median Dice on the native grid, on the slice that shows most of the object: one click at its centre, then "
        "each further click at the centre of the largest error. LiteMedSAM has probably seen some of these public "
        "sets, which flatters it here."
    )
    return "\n".join(["## Clicks", "", text, "", *lines, "", f"![Median Dice per click]({CLICKS_PICTURE})"])


def _draw_clicks(clicks: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(key.split("/")[0] for key in clicks))
    for key, record in clicks.items():
        name, model = key.split("/")
        values = median_dice(record)
        style = "--" if model == "plain" else "-"
        shade = colour(names.index(name) + 1)
        label = f"{name}, {record['object']}: {model}"
        axis.plot(range(1, len(values) + 1), values, style, color=shade, marker="o", label=label)
    axis.set(xlabel="clicks", ylabel="median Dice", ylim=(0, 1))
    axis.set_xticks(range(1, 1 + max(len(median_dice(record)) for record in clicks.values())))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)  # no window system, whatever matplotlib is configured for
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _numbers(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in scores.items()}


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
