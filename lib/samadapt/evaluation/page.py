"""What the HTML reports share: one file each, without anything outside it."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import jinja2
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from samadapt.evaluation.intervals import Estimate
from samadapt.terminal import figure as number

PICTURE_SIDE = 200
"""Longer side of a picture of a slice, pixels."""


def template(name: str) -> jinja2.Template:
    """A template of this package. It escapes every text; its filters are ``number``, ``interval`` and ``count``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("samadapt.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "interval": interval, "count": "{:,}".format}
    return environment.get_template(name)


def interval(found: Estimate, digits: int = 3) -> str:
    """A mean with its interval, for people."""
    if math.isnan(found.low):
        return number(found.mean, digits)
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def line_style(position: int) -> dict[str, Any]:
    """Colour and dashes of the line at ``position`` (from 0) of a chart; 40 differ."""
    return {"color": colormaps["tab10"](position % 10), "linestyle": ("-", "--", ":", "-.")[position // 10 % 4]}


def chart_png(chart: Figure) -> bytes:
    """A chart as PNG, without any window system, whatever matplotlib is configured for."""
    FigureCanvasAgg(chart)
    data = io.BytesIO()
    chart.savefig(data, dpi=100, format="png")
    return data.getvalue()


def chart_uri(chart: Figure) -> str:
    """A chart as address of an inline PNG."""
    return _data_uri(chart_png(chart))


def slice_uri(picture: np.ndarray, side: int = PICTURE_SIDE) -> str:
    """(H,W,3) in 0..1 as address of an inline PNG whose longer side has ``side`` pixels."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    data = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS).save(data, format="png")
    return _data_uri(data.getvalue())


def _data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
