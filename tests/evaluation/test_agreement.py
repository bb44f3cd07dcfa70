"""Estimates against truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.image import imread

from samadapt.evaluation.agreement import agreement, plot


def test_figures_by_hand():
    found = agreement([0.5, 0.6, 0.9, math.nan], [0.4, 0.7, 0.8, 0.2])
    assert found.count == 3
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.error == pytest.approx(0.1)
    assert found.bias == pytest.approx(0.1 / 3)
    assert found.not_found == 1  # there, and without an estimate
    assert agreement([math.nan, math.nan], [math.nan, 0.0]).not_found == 1


def test_the_reverse_order_correlates_negatively():
    assert agreement([0.1, 0.2, 0.3], [0.9, 0.8, 0.7]).rank_correlation == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("estimated", "truth"),
    [([], []), ([math.nan], [0.5]), ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]), ([0.1, 0.2], [0.1, 0.2])],
)
def test_what_has_no_order_has_no_correlation(estimated, truth):
    assert math.isnan(agreement(estimated, truth).rank_correlation)


def test_the_plot_shows_every_class(tmp_path):
    path = tmp_path / "quality.png"
    plot({"a": [0.5, math.nan], "b": [0.2, 0.9]}, {"a": [0.4, 0.1], "b": [0.3, 0.8]}, {"a": 0.1}, path)
    pixels = imread(path)[..., :3].reshape(-1, 3)
    for colour in ((0.122, 0.467, 0.706), (1.0, 0.498, 0.055)):  # matplotlib's first two
        assert (np.abs(pixels - colour).max(axis=1) < 0.2).any()
