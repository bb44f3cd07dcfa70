"""Print what an optimiser step of a recipe costs: OMP_NUM_THREADS=1 taskset -c 0 python evidence/pace.py lora_late ...

Seconds, median of ten steps on 8 slices of four hippocampus volumes at 64 px; what a cache holds is there already.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "lib"))

from samadapt import recipes  # noqa: E402
from samadapt.config import AppConfig  # noqa: E402
from samadapt.data.cases import find_cases  # noqa: E402
from samadapt.data.labels import LabelMap  # noqa: E402
from samadapt.data.slice_cache import SliceCache  # noqa: E402
from samadapt.training.loop import Budget, Progress, Trainer  # noqa: E402
from samadapt.training.run import make_plan  # noqa: E402
from samadapt.training.slices import prepare  # noqa: E402

STUDIES = HERE.parents[1] / "shared" / "data" / "hippocampus_mr"
LABELS = LabelMap(("anterior", "posterior"))
STEPS, SIZE = 10, 64


def seconds_per_step(name: str, scratch: Path) -> float:
    """Of one recipe; the second of two equal trainings is measured."""
    cases = [case for case in find_cases(STUDIES) if case.label][:4]
    config = AppConfig.from_strings({"recipe": name, "image_size": str(SIZE)})
    window, recipe = make_plan(cases, LABELS, config).window, recipes.configured(config)
    prepared = prepare(cases, LABELS, window, recipe.context, SIZE, scratch / "slices")
    cache = SliceCache(scratch / "cache", gib=2)
    for run in ("first", "second"):
        model = recipes.build(recipe, LABELS, config.backbone, config.weights, SIZE)
        model.describe(window=window, context=recipe.context)
        folder, ends = scratch / run, []
        folder.mkdir()

        def note(progress: Progress, ends: list[float] = ends) -> None:
            ends.append(time.perf_counter())

        Trainer(model, prepared, [], Budget(float("inf"), STEPS, rounds=1), folder, cache, "", note).run()
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[1:]))


def main() -> None:
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            print(f"{name} {seconds_per_step(name, Path(scratch)):.2f}", flush=True)


if __name__ == "__main__":
    main()
