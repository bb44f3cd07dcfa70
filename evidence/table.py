"""Print a table of all recipes from the comparisons in this folder: python evidence/table.py

With --readme it writes the Dice columns of the README's table of methods instead. Every figure is the mean over classes
and seeds, then over test cases, as in the comparisons' reports.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
sys.path.insert(0, str(HERE.parent / "lib"))

from samadapt.data.labels import LabelMap  # noqa: E402
from samadapt.evaluation.compare_report import Row, summarise  # noqa: E402

SETS = {"hippocampus_mr": "hippocampus", "acdc_mr": "ACDC", "busi_us_2d": "BUSI", "curvas_ct_2d": "CURVAS"}
HEAD = "| method | recipe |"
"""How the README's table begins."""
BASELINE = "unet"
"""U-Nets have a budget of their own, so that nothing is bold or not because of them."""

Column = tuple[str, int]
Rows = dict[str, Row]


def rows_of(name: str) -> list[Row]:
    """Of one set; U-Nets have a folder of their own, as their budget is another one."""
    found = []
    for folder in (f"compare-{name}", f"compare-{name}-unet"):
        file = HERE / folder / "results.json"
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8"))
            finished = [record for record in value["results"].values() if "failed" not in record]
            found += summarise(finished, LabelMap(tuple(value["comparison"]["labels"])))
    return found


def columns() -> dict[Column, Rows]:
    """Every set and number of labelled cases, in the README's order, with its recipes."""
    found: dict[Column, Rows] = {}
    for name, short in SETS.items():
        for row in sorted(rows_of(name), key=lambda row: row.labelled):
            found.setdefault((short, row.labelled), {})[row.recipe] = row
    return found


def cells(recipe: str | None, found: Mapping[Column, Rows]) -> list[str]:
    """Dice in each column; bold where no other recipe has more."""
    texts = []
    for rows in found.values():
        row = rows.get(recipe or "")
        best = max(row.scores.dice.mean for name, row in rows.items() if not name.startswith(BASELINE))
        dice = f"{row.scores.dice.mean:.2f}" if row else ""
        texts.append(f"**{dice}**" if row and row.scores.dice.mean == best else dice)
    return texts


def line(parts: Sequence[str]) -> str:
    return ("| " + " | ".join(parts) + " |").replace("|  |", "| |").replace("|  |", "| |")


def print_all(found: Mapping[Column, Rows]) -> None:
    """Every recipe with its pace and memory; the numbers of seeds."""
    heads = [f"{short}, {count}" for short, count in found]
    print(line(["recipe", *heads, "s per step", "peak GiB"]))
    print(line(["---", *["---:"] * (len(heads) + 2)]))
    for recipe in dict.fromkeys(recipe for rows in found.values() for recipe in rows):
        known = [rows[recipe] for rows in found.values() if recipe in rows]
        pace = sorted(row.seconds_per_step for row in known)[len(known) // 2]
        print(line([f"`{recipe}`", *cells(recipe, found), f"{pace:.2f}", f"{max(row.peak_gib for row in known):.1f}"]))
    for head, rows in zip(heads, found.values(), strict=True):
        print(f"{head}: {sorted({len(row.seeds) for row in rows.values()})} seeds")


def measured(text: str, found: Mapping[Column, Rows]) -> str | None:
    """The first recipe named in a row of the README that any comparison has."""
    names = [name.replace("BACKBONE", "lite_medsam") for name in re.findall(r"`([^`]+)`", text)]
    return next((name for name in names if any(name in rows for rows in found.values())), None)


def write_readme(found: Mapping[Column, Rows]) -> None:
    """What follows the column *s per step* is written anew; the rest of the table is people's."""
    lines = README.read_text(encoding="utf-8").split("\n")
    start = next(number for number, text in enumerate(lines) if text.startswith(HEAD))
    own = lines[start].split(" | ").index("s per step") + 1
    heads = [f"{short}, {count}" for short, count in found]
    for number in range(start, len(lines)):
        if not lines[number].startswith("|"):
            break
        parts = [part.strip() for part in lines[number].strip("|").split("|")][:own]
        ends = {start: heads, start + 1: ["---:"] * len(heads)}
        lines[number] = line([*parts, *ends.get(number, cells(measured(parts[1], found), found))])
    README.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    found = columns()
    if sys.argv[1:] == ["--readme"]:
        write_readme(found)
    else:
        print_all(found)


if __name__ == "__main__":
    main()
