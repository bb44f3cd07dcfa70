"""What masked image modelling hides and reconstructs, as a picture for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from samadapt.files import atomic_path

COLUMNS = ("image", "what the encoder sees", "reconstructed before", "and after")
_NOTE = "A hidden patch is drawn with its own mean and contrast, which the model need not guess."


def draw(path: Path, columns: Sequence[Tensor], losses: tuple[float, float]) -> None:
    """A PNG with one row for each slice.

    Args:
        path: PNG, written atomically.
        columns: (B,3,S,S) in [0,1] for each of ``COLUMNS``; the middle channel, the slice itself, is drawn.
        losses: on these slices, before and after.
    """
    rows = len(columns[0])
    figure = Figure(figsize=(9, 2.3 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, len(COLUMNS), squeeze=False)
    titles = [*COLUMNS[:2], *(f"{name} (loss {loss:.2f})" for name, loss in zip(COLUMNS[2:], losses, strict=True))]
    for column, (title, images) in enumerate(zip(titles, columns, strict=True)):
        axes[0, column].set_title(title, fontsize=9)
        for axis, image in zip(axes[:, column], images[:, 1].cpu().numpy(), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.supxlabel(_NOTE, fontsize=8)
    FigureCanvasAgg(figure)  # no window system, whatever matplotlib is configured for
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
