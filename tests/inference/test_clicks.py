"""Clicks and boxes: obeyed, bounded, repeatable; and as good as promised on real images with the real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samadapt import recipes
from samadapt.data.geometry import Geometry
from samadapt.data.slices import take_slice
from samadapt.data.volume import Volume, read_label, read_volume
from samadapt.errors import InputError
from samadapt.evaluation.click_simulation import centre, largest_part, simulate_clicks, widest_slice
from samadapt.inference.clicks import CORRECTION, LADDER, segment_object, segment_slice
from samadapt.inference.prompts import Prompts
from tiny import BACKBONES

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SHAPE = (40, 32, 6)

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the labelled images of {DATA}")


@pytest.fixture(scope="module")
def tiny():
    return recipes.build("lora", ("object",), BACKBONES["per_head"]())


@pytest.fixture(scope="module")
def volume():
    array = np.random.default_rng(0).normal(100, 20, (1, *SHAPE)).astype(np.float32)
    affine = np.diag([1.0, -1.0, 3.0, 1.0])
    return Volume(array, Geometry(SHAPE, affine), "MR", Path("phantom.nii.gz"))


voxels = st.tuples(*(st.integers(0, side - 1) for side in SHAPE))


@settings(max_examples=15, deadline=None)
@given(first=voxels, more=st.lists(voxels, max_size=3), background=st.lists(voxels, max_size=3))
def test_clicks_are_obeyed_whatever_the_model_says(tiny, volume, first, more, background):
    """A random network is the worst case: every click inside is in the mask, every one outside is not."""
    foreground = [first, *((i, j, first[2]) for i, j, _ in more)]
    outside = [(i, j, first[2]) for i, j, _ in background]
    assume(not set(foreground) & set(outside))
    mask = segment_slice(tiny, volume, 2, first[2], Prompts(foreground, outside))
    assert mask.shape == (SHAPE[1], SHAPE[0])
    assert np.array_equal(mask, segment_slice(tiny, volume, 2, first[2], Prompts(foreground, outside)))
    assert all(mask[j, i] for i, j, _ in foreground)
    assert not any(mask[j, i] for i, j, _ in outside)


def test_a_click_outside_the_box_is_refused(tiny, volume):
    with pytest.raises(InputError, match="outside the box"):
        segment_object(tiny, volume, Prompts([(30, 30, 2)], box=(1, 10, 1, 10, 0, 5)))


@settings(max_examples=15, deadline=None)
@given(one=voxels, two=voxels)
def test_a_box_bounds_the_object_in_any_order_of_its_ends(tiny, volume, one, two):
    ends = [value for pair in zip(one, two, strict=True) for value in pair]
    mask = segment_object(tiny, volume, Prompts(box=ends))
    outside = np.ones(SHAPE, dtype=bool)
    outside[tuple(slice(min(a, b), max(a, b) + 1) for a, b in zip(one, two, strict=True))] = False
    assert mask.shape == SHAPE
    assert not mask[outside].any()


@pytest.mark.parametrize(
    ("prompts", "where"),
    [
        (Prompts(), "foreground"),
        (Prompts([(40, 0, 0)]), "foreground"),
        (Prompts([(0, 0, 0)], [(0, -1, 0)]), "background"),
        (Prompts(box=(1, 2, 3)), "roi"),
        (Prompts(box=(50, 60, 0, 1, 0, 1)), "roi"),
    ],
)
def test_prompts_that_cannot_be_used_name_the_field(tiny, volume, prompts, where):
    with pytest.raises(InputError) as caught:
        segment_object(tiny, volume, prompts)
    assert caught.value.where == where


def test_centre_and_largest_part():
    mask = np.zeros((20, 20), bool)
    mask[2:9, 3:10] = True
    mask[15, 15] = True
    assert centre(mask) == (5, 6)
    assert not largest_part(mask)[15, 15]
    assert largest_part(mask).sum() == 49


@pytest.fixture(scope="module")
def plain():
    model = recipes.build("lora", ("object",))
    model.merge()
    return model


def test_a_correction_costs_a_few_boxes_and_no_encoding_however_many_came_before(monkeypatch):
    model = recipes.build("lora", ("object",))
    boxes, encoded = [], []
    prompt_masks, embed = model.prompt_masks, model.embed

    def count_boxes(embeddings, points, labels, asked):
        boxes.append(len(asked))
        return prompt_masks(embeddings, points, labels, asked)

    def count_images(images):
        encoded.append(len(images))
        return embed(images)

    monkeypatch.setattr(model, "prompt_masks", count_boxes)
    monkeypatch.setattr(model, "embed", count_images)
    rows, columns = np.mgrid[:128, :128]
    disc = 80.0 * (np.hypot(rows - 64, columns - 64) < 12)
    square = Volume(disc[None, :, :, None].astype(np.float32), Geometry((128, 128, 1), np.eye(4)), "MR", Path("disc"))
    clicks = [(64, 64, 0), *((i, j, 0) for i in range(4, 128, 20) for j in range(4, 128, 20))]
    for count in range(1, len(clicks) + 1):
        before = sum(boxes)
        segment_slice(model, square, 2, 0, Prompts(clicks[:count]))
        assert sum(boxes) - before <= (2 * len(LADDER) if count == 1 else len(CORRECTION))
    assert len(boxes) > len(LADDER)
    assert sum(encoded) == 1


def test_what_a_mask_shows_where_nobody_has_labelled_is_neither_right_nor_wrong(monkeypatch):
    """The answer runs over into pixels without label on one side, and into the background on the other."""
    truth, left_out = np.zeros((2, 12, 10, 4), bool)
    truth[4:8, 2:8, 1] = True
    left_out[8:, :, 1] = True
    answers = [truth | left_out, truth | left_out | (np.arange(12) == 3)[:, None, None]]
    asked = []

    def answer(model, volume, axis, index, prompts, cache=None):
        asked.append(prompts)
        return take_slice(answers[0], axis, index)

    monkeypatch.setattr("samadapt.evaluation.click_simulation.segment_slice", answer)
    assert simulate_clicks(None, None, truth, 2, 1, clicks=2, left_out=left_out) == [1.0, 1.0]
    assert asked[1].background == []
    answers.pop(0)
    (score,) = simulate_clicks(None, None, truth, 2, 1, clicks=1, left_out=left_out)
    assert score == pytest.approx(2 * 24 / (24 + 24 + 10))


@needs_data
def test_one_click_on_the_spleen(plain):
    image = next((DATA / "spleen_ct_crop" / "images").iterdir())
    volume = read_volume(image)
    truth = read_label(next((DATA / "spleen_ct_crop" / "labels").iterdir()), volume.geometry) == 1
    scores = simulate_clicks(plain, volume, truth, 2, widest_slice(truth, 2), clicks=3)
    assert scores[0] >= 0.9
    assert scores[-1] >= scores[0] - 0.01


@needs_data
def test_one_click_on_the_left_ventricle(plain):
    firsts, lasts = [], []
    for image in sorted((DATA / "acdc_mr" / "images").iterdir())[:3]:
        volume = read_volume(image)
        truth = read_label(DATA / "acdc_mr" / "labels" / image.name, volume.geometry) == 3
        scores = simulate_clicks(plain, volume, truth, 2, widest_slice(truth, 2), clicks=2)
        firsts.append(scores[0])
        lasts.append(scores[-1])
    assert np.median(firsts) >= 0.9
    assert np.median(lasts) >= np.median(firsts) - 0.005


@needs_data
def test_a_click_is_carried_through_the_left_ventricle(plain):
    image = sorted((DATA / "acdc_mr" / "images").iterdir())[0]
    volume = read_volume(image)
    truth = read_label(DATA / "acdc_mr" / "labels" / image.name, volume.geometry) == 3
    k = widest_slice(truth, 2)
    row, column = centre(truth[:, :, k].T)
    found = segment_object(plain, volume, Prompts([(column, row, k)]))
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) >= 0.8
