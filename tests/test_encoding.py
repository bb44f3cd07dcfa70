"""Embeddings by way of the cache: those of the live encoder, shared by all that look at the same slices."""

from __future__ import annotations

import diskcache
import nibabel as nib
import numpy as np
import pytest
import torch

from samadapt import recipes
from samadapt.data.slice_cache import SliceCache
from samadapt.data.view import ModelView
from samadapt.data.volume import read_volume
from samadapt.data.window import Window
from samadapt.encoding import SliceEncoder
from samadapt.inference.ahead import embed_volume
from tiny import BACKBONES, SIZE, write_phantom

WINDOW = Window("percentile", 0.5, 99.5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path):
    return SliceCache(tmp_path / "cache", gib=1)


@pytest.fixture
def image(tmp_path):
    write_phantom(tmp_path / "image.nii.gz", seed=0)
    return tmp_path / "image.nii.gz"


@pytest.fixture
def view(image):
    return ModelView(read_volume(image), WINDOW, 1, SIZE)


@pytest.fixture(params=BACKBONES)
def layout(request):
    return request.param


RECIPES = ["lora", "lora_late", "sam_lst", "autosam_cnn", "s_sam", "unet", "ft/mobile_sam/encoder+decoder/vanilla"]
"""One for each place where what may be cached enters: a block, the neck, beside it, and the images themselves."""


@pytest.fixture(params=RECIPES)
def model(request, layout):
    return recipes.build(request.param, ("a", "b"), BACKBONES[layout]())


def encoded_slices(model, monkeypatch) -> list[int]:
    """Sizes of the batches that run through the frozen part from now on."""
    calls, tokens = [], model.tokens
    monkeypatch.setattr(model, "tokens", lambda images: calls.append(len(images)) or tokens(images))
    return calls


def change(model):
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.05


def test_cached_equals_live_within_half_precision(model, view, cache):
    change(model)
    live = SliceEncoder(model).embeddings(view, [0, 2, 5])
    for _ in ("computed", "read"):
        torch.testing.assert_close(SliceEncoder(model, cache).embeddings(view, [0, 2, 5]), live, atol=1e-2, rtol=1e-3)


def test_each_slice_is_encoded_once_whatever_it_is_asked_with(model, view, cache, monkeypatch):
    calls = encoded_slices(model, monkeypatch)
    encoder = SliceEncoder(model, cache)
    single = [encoder.embeddings(view, [index])[0] for index in (3, 1, 3)]
    assert torch.equal(encoder.embeddings(view, [1, 2, 3])[[2, 0, 2]], torch.stack(single))
    assert sum(calls) == 3
    assert [encoder.has(view, index) for index in range(5)] == [False, True, True, True, False]


def test_another_version_runs_the_trainable_part_alone(layout, view, cache, monkeypatch):
    first, second = (recipes.build("lora_late", ("a",), BACKBONES[layout]()) for _ in range(2))
    change(second)
    before = SliceEncoder(first, cache).embeddings(view, [1])
    calls = encoded_slices(second, monkeypatch)
    after = SliceEncoder(second, cache).embeddings(view, [1])
    assert calls == []
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, SliceEncoder(second).embeddings(view, [1]), atol=1e-2, rtol=0)


def test_a_merged_model_finds_what_it_made_before(model, view, cache):
    change(model)
    before = SliceEncoder(model, cache).embeddings(view, [1])
    model.merge()
    assert torch.equal(SliceEncoder(model, cache).embeddings(view, [1]), before)


def test_an_untrained_model_is_the_same_in_every_process(layout):
    keys = {recipes.build("lora_late", ("a",), BACKBONES[layout]()).encoder_key() for _ in range(2)}
    assert len(keys) == 1


def test_slices_are_known_by_their_content(image, tmp_path, view):
    def key(path, window=WINDOW, context=1, size=SIZE):
        return ModelView(read_volume(path), window, context, size).key

    copied = tmp_path / "other name.nii"
    nib.save(nib.load(image), copied)
    assert key(copied) == view.key
    stored = nib.load(image)
    voxels = np.asarray(stored.dataobj).copy()
    voxels[3, 3, 3] += 1
    nib.save(nib.Nifti1Image(voxels, stored.affine), tmp_path / "one voxel.nii")
    nib.save(
        nib.Nifti1Image(np.asarray(stored.dataobj), stored.affine * [[2], [1], [1], [1]]), tmp_path / "spacing.nii"
    )
    others = [
        key(tmp_path / "one voxel.nii"),
        key(tmp_path / "spacing.nii"),
        key(image, Window("fixed", 0, 100)),
        key(image, context=0),
        key(image, size=2 * SIZE),
    ]
    assert len({view.key, *others}) == 6


def test_slices_have_the_levels_of_training(view):
    levels = view.image(2) * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


def test_encoding_ahead_makes_damaged_and_lost_entries_again(image, cache, tmp_path):
    model, volume = recipes.build("autosam_linear", ("a",), BACKBONES["fused"]()), read_volume(image)
    assert embed_volume(model, volume, cache) == 6
    assert embed_volume(model, volume, cache) == 0
    with diskcache.Cache(str(tmp_path / "cache")) as store:
        lost, damaged, *_ = list(store)
        store.delete(lost)
        store.set(damaged, b"neither a tensor nor its checksum", tag=0)
    assert embed_volume(model, volume, cache) == 2
    assert embed_volume(model, volume, cache) == 0
