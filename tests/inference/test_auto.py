"""Whole volumes without a prompt: one plane, or all three with their answers averaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from samadapt import recipes
from samadapt.data.geometry import Geometry
from samadapt.data.slice_cache import SliceCache
from samadapt.data.slices import take_slice
from samadapt.data.volume import Volume
from samadapt.inference import auto
from samadapt.inference.ahead import embed_volume
from samadapt.inference.auto import segment
from tiny import BACKBONES

LABELS = ("bright", "dark")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def volume():
    values = np.random.default_rng(0).normal(100, 20, (1, 20, 18, 16)).astype(np.float32)
    axes = np.array([[0, -1.0, 0, 3], [-1.0, 0, 0, 5], [0, 0, 1.1, -7], [0, 0, 0, 1]])
    return Volume(values, Geometry((20, 18, 16), axes), "MR", Path("noise"))


def model_for(planes):
    torch.manual_seed(0)
    model = recipes.build("autosam_linear", LABELS, BACKBONES["per_head"]())
    model.describe(trained=True, planes=planes)
    return model


def test_one_plane_is_the_acquisition_plane(volume, monkeypatch):
    seen = []
    view = auto.ModelView
    monkeypatch.setattr(auto, "ModelView", lambda *words: seen.append(words[4]) or view(*words))
    assert segment(model_for("acquisition"), volume).shape == (20, 18, 16)
    assert seen == [volume.geometry.acquisition_axis]


def test_three_planes_vote_by_their_mean(volume, monkeypatch):
    """What each plane says of each voxel is put in its own place of the native grid, and the mean decides."""
    rng = np.random.default_rng(1)
    shape = volume.geometry.shape
    said = {axis: torch.from_numpy(rng.normal(0, 2, (3, *shape))).float() for axis in range(3)}

    def logits(model, view, cache):
        native = int(np.flatnonzero(view.turn.steps[:, 0] == view.axis)[0])
        turned = [view.turn.forward(one.numpy()) for one in said[native]]
        for index in range(len(view)):
            yield index, torch.stack([torch.tensor(take_slice(one, view.axis, index)) for one in turned])

    monkeypatch.setattr(auto, "_logits", logits)
    found = segment(model_for("all"), volume)
    mean = sum(said[axis].softmax(dim=0) for axis in range(3)) / 3
    assert (found == mean.argmax(dim=0).numpy()).mean() > 0.999  # votes are kept in half precision


def test_progress_counts_the_slices_of_all_planes(volume):
    seen = []
    segment(model_for("all"), volume, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (54, 54)
    assert [done for done, _ in seen] == list(range(1, 55))


def test_a_volume_too_large_for_votes_is_segmented_in_one_plane(volume, monkeypatch):
    monkeypatch.setattr(auto, "LARGEST_VOTES", 1000)
    assert np.array_equal(segment(model_for("all"), volume), segment(model_for("acquisition"), volume))


def test_encoding_ahead_leaves_nothing_to_encode(volume, tmp_path, monkeypatch):
    model, cache = model_for("all"), SliceCache(tmp_path, 1)
    expected = segment(model, volume)
    assert embed_volume(model, volume, cache) == 54
    monkeypatch.setattr(model, "embed", None)
    assert (segment(model, volume, cache=cache) == expected).mean() > 0.99


def test_classes_that_nobody_asked_for_are_background(volume):
    model = model_for("all")
    everything, one = segment(model, volume), segment(model, volume, ["dark"])
    assert np.array_equal(one, np.where(everything == 2, 2, 0))
