"""Print the README's table of recipes from the comparisons in this folder: python evidence/table.py

Every figure is the mean over classes and seeds, then over test cases, as in the comparisons' reports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "lib"))

from samadapt.data.labels import LabelMap  # noqa: E402
from samadapt.evaluation.compare_report import Row, summarise  # noqa: E402

SETS = {"hippocampus_mr": "hippocampus", "acdc_mr": "ACDC", "busi_us_2d": "BUSI", "curvas_ct_2d": "CURVAS"}


def rows(name: str) -> list[Row]:
    """Of one set; U-Nets have a folder of their own, as their budget is another one."""
    found = []
    for folder in (f"compare-{name}", f"compare-{name}-unet"):
        file = HERE / folder / "results.json"
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8"))
            finished = [record for record in value["results"].values() if "failed" not in record]
            found += summarise(finished, LabelMap(tuple(value["comparison"]["labels"])))
    return found


def cell(row: Row | None, best: float) -> str:
    """Dice; bold where no other recipe has more."""
    if row is None:
        return ""
    mean = row.scores.dice.mean
    return f"**{mean:.2f}**" if mean == best else f"{mean:.2f}"


def main() -> None:
    columns = {}
    for name, short in SETS.items():
        for row in rows(name):
            columns.setdefault((short, row.labelled), {})[row.recipe] = row
    order = sorted(columns, key=lambda column: (list(SETS.values()).index(column[0]), column[1]))
    recipes = list(dict.fromkeys(recipe for column in order for recipe in columns[column]))
    heads = [f"{short}, {count}" for short, count in order]
    print(f"| recipe | {' | '.join(heads)} | s per step | peak GiB |")
    print(f"| --- |{' ---: |' * (len(heads) + 2)}")
    best = {column: max(row.scores.dice.mean for row in columns[column].values()) for column in order}
    for recipe in recipes:
        own = [columns[column].get(recipe) for column in order]
        known = [row for row in own if row is not None]
        cells = [cell(row, best[column]) for column, row in zip(order, own, strict=True)]
        pace = sorted(row.seconds_per_step for row in known)[len(known) // 2]
        print(f"| `{recipe}` | {' | '.join(cells)} | {pace:.2f} | {max(row.peak_gib for row in known):.1f} |")
    for column, head in zip(order, heads, strict=True):
        print(f"{head}: {sorted({len(row.seeds) for row in columns[column].values()})} seeds")


if __name__ == "__main__":
    main()
