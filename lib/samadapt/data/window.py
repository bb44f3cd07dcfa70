"""From image units to the [0, 1] that a backbone takes: one rule per model, stored with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from samadapt.data.labels import IGNORE
from samadapt.data.volume import Volume
from samadapt.errors import ConfigError, InputError

SOFT_TISSUE = (-160.0, 240.0)
"""HU, for CT without training data."""

ROBUST_PERCENTILES = (0.5, 99.5)
MARGIN_PART, MARGIN_HU = 0.25, 50.0
MINIMUM_WIDTH_HU = 300.0
HU_RANGE = (-1024.0, 3071.0)

_SAMPLE = 2_000_000
_SAMPLE_PER_CLASS = 20_000
_BACKGROUND_PART = 0.1


@dataclass(frozen=True)
class Window:
    """How grey values become [0, 1]: ``low`` -> 0, ``high`` -> 1, clipped outside.

    Args:
        kind: ``"fixed"``: ``low`` and ``high`` are image units (HU, grey levels). ``"percentile"``: they are
            percentiles, 0 to 100, of each case's own voxels, a constant background left out
            (:func:`foreground_values`).
        low: lower end.
        high: upper end, above ``low``.

    Raises:
        ConfigError: an unknown kind or ends out of order.
    """

    kind: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "percentile"):
            raise ConfigError(f"unknown window kind '{self.kind}'", where="window", remedy="Use fixed or percentile.")
        inside = self.kind == "fixed" or (self.low >= 0 and self.high <= 100)
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high and inside):
            raise ConfigError(f"a window cannot run from {self.low} to {self.high} ({self.kind})", where="window")

    def limits(self, array: np.ndarray) -> tuple[float, float]:
        """The window's ends in image units for this case; equal where the image is constant."""
        if self.kind == "fixed":
            return self.low, self.high
        low, high = np.percentile(foreground_values(array), (self.low, self.high))
        return float(low), float(high)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Scale a whole case.

        Args:
            array: (C, I, J, K), finite. Give a percentile window the whole volume, not one slice of it.

        Returns:
            float32 of the same shape, in [0, 1]; zeros where a percentile window meets a constant image.
        """
        low, high = self.limits(array)
        width = high - low
        if width <= 1e-6 * max(abs(low), abs(high), 1e-20):  # constant as far as float32 can tell
            return np.zeros(array.shape, dtype=np.float32)
        values = np.asarray(array, dtype=np.float32)
        with np.errstate(over="ignore"):  # what overflows lies outside the window and is clipped
            scaled = (values - np.float32(low)) * np.float32(1.0 / width)
        return np.clip(scaled, 0.0, 1.0, out=scaled)

    def to_dict(self) -> dict[str, Any]:
        """For the model file's header."""
        return {"kind": self.kind, "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Window:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: a missing key or a value that is no number.
        """
        try:
            return cls(str(value["kind"]), float(value["low"]), float(value["high"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a window: {value!r}", where="window", remedy="Give kind, low and high.") from error


GREY_LEVELS = Window("fixed", 0.0, 255.0)
PER_CASE = Window("percentile", *ROBUST_PERCENTILES)


def default_window(volume: Volume) -> Window:
    """The window without training data.

    Colour and 8-bit pictures: 0 to 255. CT: soft tissue, [-160, 240] HU. Everything else: the case's own 0.5 and
    99.5 percentiles, because MR and ultrasound values have no common scale.
    """
    if volume.is_colour or volume.display_ready:
        return GREY_LEVELS
    if volume.modality == "CT":
        return Window("fixed", *SOFT_TISSUE)
    return PER_CASE


def choose_window(volumes: Iterable[Volume], masks: Iterable[np.ndarray]) -> Window:
    """The one window of a model, from its training data.

    If every volume is CT: for each class the 0.5 and 99.5 percentiles of its HU, the widest range over the classes
    (so that a small class counts as much as a large one), widened by a quarter (at least 50 HU) on both sides, at
    least 300 HU wide. Otherwise the default of the volumes where all agree, else percentiles per case.

    Args:
        volumes: read one at a time; none is kept.
        masks: (I, J, K) each, label indices; 0 is background, ``IGNORE`` is not looked at.

    Raises:
        InputError: no volume, or a mask whose shape differs from its volume's.
    """
    defaults: set[Window] = set()
    samples: dict[int, list[np.ndarray]] = {}
    for volume, mask in zip(volumes, masks, strict=True):
        if mask.shape != volume.geometry.shape:
            raise InputError(
                f"the label's shape is {mask.shape}, the image's {volume.geometry.shape}", where=volume.path
            )
        defaults.add(default_window(volume))
        if defaults == {Window("fixed", *SOFT_TISSUE)}:
            _collect(volume.array[0], mask, samples)
    if not defaults:
        raise InputError("no labelled volume to choose a window from", remedy="Label at least one image.")
    if len(defaults) > 1:
        return PER_CASE
    default = defaults.pop()
    return _hu_window(samples) if samples and default == Window("fixed", *SOFT_TISSUE) else default


def foreground_values(array: np.ndarray) -> np.ndarray:
    """The voxels that a case's percentiles are taken over: at most about two million, 1-D.

    A constant background (zero padding, a stripped skull) is left out: the value that most corners of the image
    have, if it fills more than a tenth of it. A constant image gives all its voxels.
    """
    flat = array.reshape(-1)
    # An odd step does not fall into the rhythm of axes whose lengths are powers of two.
    sample = flat[:: (flat.size // _SAMPLE) | 1] if flat.size > _SAMPLE else flat
    corners = array[..., :: max(1, array.shape[-3] - 1), :: max(1, array.shape[-2] - 1), :: max(1, array.shape[-1] - 1)]
    values, counts = np.unique(corners, return_counts=True)
    background = values[counts.argmax()]
    inside = sample[sample != background]
    enough = 0 < inside.size < (1 - _BACKGROUND_PART) * sample.size
    return inside if enough else sample


def _collect(values: np.ndarray, mask: np.ndarray, samples: dict[int, list[np.ndarray]]) -> None:
    """Add up to :data:`_SAMPLE_PER_CLASS` evenly spread voxels of each class of one case."""
    foreground = (mask > 0) & (mask != IGNORE)
    labels, hu = mask[foreground], values[foreground]
    for label in np.unique(labels):
        of_class = hu[labels == label]
        samples.setdefault(int(label), []).append(of_class[:: -(-of_class.size // _SAMPLE_PER_CLASS)])


def _hu_window(samples: dict[int, list[np.ndarray]]) -> Window:
    ends = [np.percentile(np.concatenate(parts), ROBUST_PERCENTILES) for parts in samples.values()]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    margin = max(MARGIN_PART * (high - low), MARGIN_HU)
    margin = max(margin, (MINIMUM_WIDTH_HU - (high - low)) / 2)
    low, high = max(low - margin, HU_RANGE[0]), min(high + margin, HU_RANGE[1])
    return Window("fixed", float(round(low)), float(round(high)))
