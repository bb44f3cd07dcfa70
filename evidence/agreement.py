"""Print the README's table of estimated and true Dice from the agreements in this folder, and draw its picture:
python evidence/agreement.py
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "lib"))

from strategies import SETS  # noqa: E402

from samadapt.evaluation.agreement import draw  # noqa: E402
from samadapt.evaluation.page import chart_png  # noqa: E402

PICTURE = HERE.parent / "docs" / "agreement.png"


def by_structure(cases: list[dict[str, Any]], what: str) -> dict[str, list[float]]:
    """Structure -> one figure per case, NaN where there is none."""
    names = dict.fromkeys(name for case in cases for name in case["dice"])
    return {name: [_number(case[what].get(name)) for case in cases] for name in names}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def main() -> None:
    files = {name: HERE / f"agreement-{name}" / "results.json" for name in SETS}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}
    print("| data | masks | rank correlation | mean absolute error | estimate less truth |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, result in found.items():
        agreed = result["estimates"]
        figures = f"{agreed['rank_correlation']:.2f} | {agreed['error']:.2f} | {agreed['bias']:+.2f}"
        print(f"| {SETS[name]} | {agreed['count']} | {figures} |")
    chart = Figure(figsize=(4 * len(found), 4), layout="constrained")
    for panel, (name, result) in zip(chart.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        draw(panel, by_structure(result["cases"], "estimated_dice"), by_structure(result["cases"], "dice"), {})
        panel.set_title(SETS[name])
    PICTURE.write_bytes(chart_png(chart))
    print(f"\n{PICTURE}")


if __name__ == "__main__":
    main()
