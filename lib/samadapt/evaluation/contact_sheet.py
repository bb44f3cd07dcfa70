"""A picture of synthetic slices, so that people see what a training would learn from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import Case, assume
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.errors import StateError
from samadapt.files import atomic_path
from samadapt.project import Project
from samadapt.training.ledger import Ledger
from samadapt.training.run import make_plan, refuse_empty
from samadapt.training.slices import PreparedCase, prepare
from samadapt.training.synthetic import SyntheticSlices

COLUMNS = 5
"""Slices side by side, each as image and as image with its label."""


@contextmanager
def training_slices(
    cases: Sequence[Case], labels: LabelMap, config: AppConfig, project: Project, progress: Callable[[int, int], None]
) -> Iterator[list[PreparedCase]]:
    """What a training would learn from now, as long as the context lasts; nothing of the project is changed.

    Raises:
        StateError: no case is labelled, or no training case shows any of the labels.
        InputError: a case that cannot be read.
    """
    labelled = assume((case for case in cases if case.label), config.coverage)
    if not labelled:
        raise StateError(
            "no case is labelled yet", where=project.root.parent, remedy="Submit at least one label first."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = folder / "ledger.json"
        if project.ledger.is_file():
            shutil.copy(project.ledger, ledger)
        training = Ledger(ledger).split(labelled)[0] or labelled
        plan = make_plan(training, labels, config)
        context = recipes.configured(config).context
        prepared = prepare(
            training, labels, plan.window, context, plan.image_size, folder / "slices", progress, config.planes
        )
        refuse_empty(prepared, labels)
        yield prepared


def draw(bank: SyntheticSlices, labels: LabelMap, count: int, path: Path) -> list[dict[str, int]]:
    """Write the exemplars, then the first ``count`` samples, to a PNG; returns the samples' pixels by class name.

    Every slice is shown twice, plain and with its label.
    """
    rows = [-(-number // COLUMNS) for number in (len(bank.exemplars), count)]
    figure = Figure(figsize=(3.2 * COLUMNS, 1.75 * sum(rows) + 0.5), layout="constrained")
    grid = figure.subplots(sum(rows), COLUMNS, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, (case, index) in zip(grid[: rows[0]].flat, bank.exemplars, strict=False):
        _show(axis, f"exemplar: {case.id}, slice {index}", _picture(case.image(index), case), case.label(index))
    areas = []
    for axis, number in zip(grid[rows[0] :].flat, range(count), strict=False):
        image, label = bank.pair(number)
        _show(axis, f"synthetic {number}", _picture(image, bank.exemplars[0][0]), label)
        areas.append({name: int((label == n).sum()) for n, name in enumerate(labels.names, start=1)})
    patches = [Patch(color=_colour(n), label=name) for n, name in enumerate(labels.names, start=1)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(8, len(patches)))
    FigureCanvasAgg(figure)  # no window system, whatever matplotlib is configured for
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return areas


def _show(axis: Axes, title: str, image: np.ndarray, label: Tensor) -> None:
    overlay = image.copy()
    for n in np.unique(label[(label > 0) & (label != IGNORE)]):
        here = label.numpy() == n
        overlay[here] = 0.5 * overlay[here] + 0.5 * np.array(_colour(int(n)))
    gap = np.ones((len(image), 1 + len(image) // 40, 3), image.dtype)
    axis.imshow(np.concatenate([image, gap, overlay], axis=1), interpolation="nearest")
    axis.set_title(title, fontsize=7)


def _picture(image: Tensor, case: PreparedCase) -> np.ndarray:
    """(3,S,S) -> (S,S,3): colour as it is, of three neighbouring slices of ``case`` the middle one."""
    colour = case.images.shape[1] == 3
    return (image if colour else image[1].expand(3, -1, -1)).permute(1, 2, 0).numpy()


def _colour(label: int) -> tuple[float, float, float]:
    return colormaps["tab10"]((label - 1) % 10)[:3]


def missing_classes(prepared: Sequence[PreparedCase], labels: LabelMap) -> list[str]:
    """Names of the classes that no slice shows, so that no sample can."""
    shown = {label for case in prepared for label in case.slices_of}
    return [name for n, name in enumerate(labels.names, start=1) if n not in shown]
