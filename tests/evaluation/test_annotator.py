"""The simulated annotator: clicks by what the model has right, and where they fall."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from samadapt.data.geometry import Geometry
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import Volume
from samadapt.evaluation import annotator
from samadapt.evaluation.annotator import Costs, FullAnnotator, RobotAnnotator, inner_pixel

LABELS = LabelMap(("bright", "dark"))
SHAPE = (20, 16, 8)


@pytest.fixture
def volume():
    return Volume(np.zeros((1, *SHAPE), np.float32), Geometry(SHAPE, np.diag([-1.0, -1, 3, 1])), "MR", Path("zeros"))


@pytest.fixture
def truth():
    label = np.zeros(SHAPE, np.uint8)
    label[2:10, 3:12, 1:7] = 1
    label[12:18, 3:12, 1:7] = 2
    return label


class Clicked:
    """Answers clicks with the object from the click ``good_from`` on, before with a part of it; notes them."""

    def __init__(self, truth, good_from):
        self.truth, self.good_from, self.clicks = truth, good_from, []

    def __call__(self, model, volume, axis, index, prompts, cache):
        self.clicks.append((index, list(prompts.foreground), list(prompts.background)))
        value = self.truth[prompts.foreground[0]]
        wanted = (self.truth[:, :, index] == value).T
        if len(prompts.foreground) + len(prompts.background) >= self.good_from:
            return wanted
        part = wanted.copy()
        part[:6] = False
        return part


def robot(monkeypatch, truth, good_from):
    clicked = Clicked(truth, good_from)
    monkeypatch.setattr(annotator, "segment_slice", clicked)
    return RobotAnnotator(LABELS, None, None), clicked


def test_what_the_model_has_right_takes_no_click(monkeypatch, volume, truth):
    annotates, clicked = robot(monkeypatch, truth, 1)
    assert annotates.label(volume, truth, truth, range(8), seed=0) == annotator.Effort(0.0, 0.0)
    assert clicked.clicks == []


def test_clicks_of_a_few_slices_are_scaled_to_all_that_show_something(monkeypatch, volume, truth):
    annotates, clicked = robot(monkeypatch, truth, 2)
    effort = annotates.label(volume, truth, np.zeros_like(truth), range(8), seed=0)
    assert {index for index, _, _ in clicked.clicks} == {1, 3, 6}  # three of the slices 1 to 6
    assert effort == annotator.Effort(6 * 2 * 2.0, 0.0)  # six slices, two structures, two clicks


def test_only_the_slices_that_are_labelled_count(monkeypatch, volume, truth):
    annotates, clicked = robot(monkeypatch, truth, 1)
    effort = annotates.label(volume, truth, np.zeros_like(truth), [0, 4], seed=0)
    assert {index for index, _, _ in clicked.clicks} == {4}
    assert effort == annotator.Effort(2.0, 0.0)


def test_what_is_false_takes_one_click_to_remove(monkeypatch, volume, truth):
    annotates, clicked = robot(monkeypatch, truth, 1)
    effort = annotates.label(volume, np.zeros_like(truth), truth, [2], seed=0)
    assert effort == annotator.Effort(2.0, 0.0)
    assert clicked.clicks == []


def test_what_stays_wrong_is_drawn_by_hand(monkeypatch, volume, truth):
    annotates, clicked = robot(monkeypatch, truth, 99)
    effort = annotates.label(volume, truth, np.zeros_like(truth), [2], seed=0)
    assert effort == annotator.Effort(2 * annotator.MOST_CLICKS, 2.0)
    assert len(clicked.clicks) == 2 * annotator.MOST_CLICKS


def test_corrections_fall_into_the_error(monkeypatch, volume, truth):
    annotates, clicked = robot(monkeypatch, truth, 99)
    annotates.label(volume, truth, np.zeros_like(truth), [2], seed=0)
    for _, foreground, background in clicked.clicks:
        assert background == []
        value = truth[foreground[0]]
        assert all(truth[voxel] == value for voxel in foreground)
        assert all(voxel[1] < 6 for voxel in foreground[1:])  # the rows that the answers lack


def test_clicks_are_not_exact_and_the_seed_decides_them(monkeypatch, volume, truth):
    annotates, clicked = robot(monkeypatch, truth, 1)
    for seed in (0, 0, 1, 2, 3):
        annotates.label(volume, truth, np.zeros_like(truth), [2], seed)
    firsts = [clicks[0] for _, clicks, _ in clicked.clicks[::2]]
    assert firsts[0] == firsts[1]
    assert len(set(firsts)) > 1


def test_the_same_object_is_clicked_once_for_all_runs(monkeypatch, volume, truth, tmp_path):
    """However much of it the model has by then: what it lacks is begun anew."""
    _, clicked = robot(monkeypatch, truth, 2)
    half = np.where(np.arange(SHAPE[0])[:, None, None] % 3 == 0, truth, 0).astype(np.uint8)
    plain = SimpleNamespace(frozen_key="weights")
    efforts = []
    for found in (np.zeros_like(truth), half):
        annotates = RobotAnnotator(LABELS, plain, SliceCache(tmp_path / "cache", gib=1))
        efforts.append(annotates.label(volume, truth, found, range(8), seed=3))
    once = len(clicked.clicks)
    assert efforts[0] == efforts[1] == annotator.Effort(6 * 2 * 2.0, 0.0)
    assert once == 3 * 2 * 2  # slices, structures, clicks
    annotates.label(volume, truth, half, range(8), seed=4)
    another = replace(volume, array=volume.array + 1)
    annotates.label(another, truth, half, range(8), seed=3)
    assert len(clicked.clicks) == 3 * once


def test_drawing_everything_counts_structures_by_slice(volume, truth):
    assert FullAnnotator(LABELS).label(volume, truth, truth, [0, 1, 2], seed=0) == annotator.Effort(0.0, 4.0)


def test_seconds_add_up():
    assert Costs(case=20, look=1, click=2, outline=30).seconds(slices=8, clicks=5.5, outlines=2) == 20 + 8 + 11 + 60


@given(arrays(bool, (7, 9), elements=st.booleans()).filter(np.any), st.integers(0, 100))
def test_a_click_lies_inside_its_object(mask, seed):
    assert mask[inner_pixel(mask, np.random.default_rng(seed))]


def test_a_click_keeps_off_the_border():
    mask = np.zeros((30, 30), bool)
    mask[5:26, 5:26] = True  # its centre is 11 deep
    pixels = np.array([inner_pixel(mask, np.random.default_rng(seed)) for seed in range(50)])
    assert pixels.min() >= 10
    assert pixels.max() <= 20
