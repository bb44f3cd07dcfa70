"""Print the README's tables of strategies and draw its curves from the simulations in this folder:
python evidence/strategies.py

Areas are those of the simulations' reports: mean Dice over the labelled slices that all strategies of a seed cover, and
for a comparison of two those that the two cover. The p-values are of the corrected resampled t-test, not adjusted: each
asks about one rival alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "lib"))

from samadapt.evaluation.label_efficiency import Curve, duels, mean_curve  # noqa: E402
from samadapt.evaluation.page import chart_png  # noqa: E402
from samadapt.evaluation.simulate_report import DECIDING, areas_of, arm, curves_of, largest_test_share  # noqa: E402
from samadapt.terminal import figure  # noqa: E402

SETS = {"hippocampus_mr": "hippocampus", "acdc_mr": "ACDC", "curvas_ct_2d": "CURVAS (2D)"}
UNITS = "units"
OURS, RIVALS = "auto", ("random_fg", "epistemic")
PICTURE = HERE.parent / "docs" / "strategies.png"
COLOURS = {OURS: "tab:blue", "random_fg": "tab:orange", "epistemic": "tab:green"}


def runs_of(name: str) -> list[dict[str, Any]]:
    """The finished runs of one simulation; those seeds alone that every strategy has played."""
    file = HERE / f"simulate-{name}" / "results.json"
    if not file.is_file():
        return []
    found = [run for run in json.loads(file.read_text(encoding="utf-8"))["results"].values() if "failed" not in run]
    seeds = {run["settings"]["seed"] for run in found}
    most = max(sum(run["settings"]["seed"] == seed for run in found) for seed in seeds)
    whole = {seed for seed in seeds if sum(run["settings"]["seed"] == seed for run in found) == most}
    return [run for run in found if run["settings"]["seed"] in whole]


def against(curves: Mapping[str, Mapping[int, Curve]], one: str, other: str, share: float) -> str:
    """Mean difference of two strategies' areas, who won how many seeds, and how likely that is by chance."""
    (duel,) = duels({name: curves[name] for name in (one, other)}, share)
    return f"{duel.difference:+.3f} ({duel.wins} : {duel.losses}, p {figure(duel.p_value, 2)})"


def scatter(areas: Mapping[int, float]) -> str:
    """The standard deviation over seeds; nothing where there is one alone."""
    return f" ± {np.std(list(areas.values()), ddof=1):.3f}" if len(areas) > 1 else ""


def summary(found: Mapping[str, list[dict[str, Any]]]) -> None:
    """One row for each strategy: area on each set with its standard deviation over seeds, and the mean of all sets."""
    areas = {name: areas_of(runs)[DECIDING] for name, runs in found.items()}
    means = {name: {key: np.mean(list(own.values())) for key, own in areas[name].items()} for name in areas}
    strategies = list(next(iter(means.values())))
    overall = {key: float(np.mean([means[name][key] for name in means])) for key in strategies}
    print(f"| strategy | {' | '.join(SETS[name] for name in means)} | mean |")
    print(f"| --- |{' ---: |' * (len(means) + 1)}")
    for key in sorted(strategies, key=lambda key: -overall[key]):
        cells = [f"{means[name][key]:.3f}{scatter(areas[name][key])}" for name in means]
        print(f"| `{key}` | {' | '.join(cells)} | {overall[key]:.3f} |")
    for name, runs in found.items():
        curves, share = curves_of(runs, DECIDING), largest_test_share(runs)
        told = [f"{rival} {against(curves, OURS, rival, share)}" for rival in RIVALS]
        print(f"\n{SETS[name]}, {len(areas[name][OURS])} seeds: {OURS} less {', '.join(told)}")


def units(runs: list[dict[str, Any]]) -> None:
    """What the same number of labelled slices teaches as whole cases, as suggested slices, as scattered ones."""
    areas = areas_of(runs)[DECIDING]
    print("\n| what is labelled | area | Dice at the end | cases | slices | minutes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, own in sorted(areas.items(), key=lambda item: -np.mean(list(item[1].values()))):
        last = [run["rounds"][-1] for run in runs if arm(run["settings"]["strategy"], run["settings"]["unit"]) == name]
        dice, cases, slices, seconds = (
            np.mean([done[key] for done in last]) for key in ("dice", "volumes", "slices", "seconds")
        )
        area = np.mean(list(own.values()))
        print(f"| {name} | {area:.3f} | {dice:.3f} | {cases:.0f} | {slices:.0f} | {seconds / 60:.0f} |")


def picture(found: Mapping[str, list[dict[str, Any]]]) -> None:
    """Dice over labelled slices: ours and the two rivals in colour, the others behind them."""
    chart = Figure(figsize=(4 * len(found), 3.6), layout="constrained")
    for panel, (name, runs) in zip(chart.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        curves = curves_of(runs, DECIDING)
        for key in sorted(curves, key=lambda key: key in COLOURS):
            own = curves[key].values()
            x, means = mean_curve([curve.budget for curve in own], [curve.dice for curve in own])
            style = {"color": COLOURS[key], "label": key} if key in COLOURS else {"color": "0.8", "linewidth": 1}
            panel.plot(x, [one.mean for one in means], marker="o", markersize=3, **style)
            if key in COLOURS:
                low, high = ([getattr(one, end) for one in means] for end in ("low", "high"))
                panel.fill_between(x, low, high, color=COLOURS[key], alpha=0.1, linewidth=0)
        panel.set(title=SETS[name], xlabel="labelled slices", ylabel="mean Dice of the test cases")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", fontsize=8)
    PICTURE.write_bytes(chart_png(chart))
    print(f"\n{PICTURE}")


def main() -> None:
    found = {name: runs for name in SETS if (runs := runs_of(name))}
    if found:
        summary(found)
        picture(found)
    if runs := runs_of(UNITS):
        units(runs)


if __name__ == "__main__":
    main()
