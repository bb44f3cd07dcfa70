"""How sure a model is, told on the volume's own grid."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from samadapt import recipes
from samadapt.data.geometry import Geometry
from samadapt.data.slices import take_slice
from samadapt.data.volume import Volume
from samadapt.inference import auto
from samadapt.inference.auto import segment
from samadapt.inference.examine import Examination, examine
from tiny import BACKBONES

LABELS = ("bright", "dark")
SHAPE = (10, 9, 8)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[np.diag([1.0, 1, 1, 1]), np.diag([-1.0, 1, -3, 1]), np.eye(4)[[2, 0, 1, 3]]])
def volume(request):
    values = np.random.default_rng(0).normal(100, 20, (1, *SHAPE)).astype(np.float32)
    return Volume(values, Geometry(SHAPE, request.param), "MR", Path("noise"))


def model_that_says(monkeypatch, shares, planes="acquisition", labels=LABELS):
    """A model whose class probabilities are ``shares``, (K+1,I,J,K) on the native grid."""

    def logits(model, view, cache):
        turned = [view.turn.forward(one) for one in shares]
        for index in range(len(view)):
            yield index, torch.from_numpy(np.log([take_slice(one, view.axis, index) for one in turned]))

    monkeypatch.setattr(auto, "_logits", logits)
    model = recipes.build("autosam_linear", labels, BACKBONES["per_head"]())
    model.describe(trained=True, planes=planes)
    return model


def random_shares(seed=1):
    raw = np.random.default_rng(seed).gamma(0.4, 1, (3, *SHAPE)).astype(np.float32) + 1e-3
    return raw / raw.sum(axis=0)


@pytest.mark.parametrize("planes", ["acquisition", "all"])
def test_the_mask_is_that_of_segment(volume, monkeypatch, planes):
    model = model_that_says(monkeypatch, random_shares(), planes)
    assert np.array_equal(examine(model, volume)[0], segment(model, volume))


def test_areas_and_doubt_lie_on_the_slices_of_the_stored_volume(volume, monkeypatch):
    shares = random_shares()
    mask, found = examine(model_that_says(monkeypatch, shares), volume)
    axis = found.axis
    assert axis == volume.geometry.acquisition_axis
    for index in range(SHAPE[axis]):
        one = np.take(mask, index, axis)
        assert found.areas[index].tolist() == [(one == 1).sum(), (one == 2).sum()]
        here = np.take(shares, index, axis + 1).reshape(3, -1)
        here = here[:, here[0] <= 0.9]
        assert found.doubt[index] == pytest.approx(-(here * np.log(here)).sum(0).mean() / math.log(3), abs=1e-4)


def test_overlap_is_the_dice_to_expect(volume, monkeypatch):
    """Truths drawn from the probabilities themselves have on average about the Dice that is foretold."""
    shares = random_shares()
    mask, found = examine(model_that_says(monkeypatch, shares), volume)
    rng = np.random.default_rng(2)
    draws = (rng.random((200, 1, *SHAPE)) > np.cumsum(shares, axis=0)[None]).sum(axis=1)
    for n in (1, 2):
        dice = [2 * ((mask == n) & (t == n)).sum() / ((mask == n).sum() + (t == n).sum()) for t in draws]
        assert found.overlap[n - 1] == pytest.approx(np.mean(dice), abs=0.02)


def test_what_is_nowhere_has_no_overlap_and_no_doubt(volume, monkeypatch):
    shares = np.zeros((3, *SHAPE), np.float32)
    shares[0], shares[1:] = 1 - 2e-6, 1e-6
    mask, found = examine(model_that_says(monkeypatch, shares), volume)
    assert not mask.any()
    assert np.isnan(found.overlap).all()
    assert not found.doubt.any()


@pytest.mark.parametrize("most", [0.005, 0.099])
def test_a_class_that_is_found_and_suspected_nowhere_has_no_overlap_whatever_softmax_leaves(volume, monkeypatch, most):
    """A little probability in every voxel adds up to many voxels; that is no sign of the structure."""
    shares = np.full((3, *SHAPE), 0.005, np.float32)
    shares[1, 2:6, 2:6, 2:6] = 0.85
    shares[2, 0, 0, 0] = most
    shares[0] = 1 - shares[1:].sum(axis=0)
    mask, found = examine(model_that_says(monkeypatch, shares), volume)
    assert 2 not in mask
    assert math.isnan(found.overlap[1])
    assert found.overlap[0] == pytest.approx(2 * 64 * 0.85 / (64 * 1.85 + (720 - 64) * 0.005), rel=1e-3)


def test_a_class_that_is_suspected_but_not_found_has_an_overlap_of_nothing(volume, monkeypatch):
    shares = np.full((3, *SHAPE), 0.005, np.float32)
    shares[2, 2:6, 2:6, 2:6] = 0.3
    shares[0] = 1 - shares[1:].sum(axis=0)
    assert examine(model_that_says(monkeypatch, shares), volume)[1].overlap[1] == 0


def test_what_is_found_with_a_small_share_among_many_classes_has_an_overlap(volume, monkeypatch):
    labels = tuple(f"class {n}" for n in range(12))
    shares = np.full((13, *SHAPE), 0.91 / 12, np.float32)
    shares[3] = 0.09
    mask, found = examine(model_that_says(monkeypatch, shares, labels=labels), volume)
    assert (mask == 3).all()
    assert found.overlap[2] == pytest.approx(2 * 0.09 / 1.09, rel=1e-3)


def test_json_and_back(volume, monkeypatch):
    _, found = examine(model_that_says(monkeypatch, random_shares()), volume)
    again = Examination.from_dict(found.to_dict())
    assert np.array_equal(again.areas, found.areas)
    assert np.allclose(again.doubt, found.doubt, atol=1e-5)
    assert np.allclose(again.class_doubt, found.class_doubt, atol=1e-5)
    assert np.allclose(again.overlap, found.overlap, atol=1e-5, equal_nan=True)
