"""Synthetic slices: what is pasted, where it is from, and what stays as it was."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from samadapt.data.labels import IGNORE
from samadapt.data.synthesis import SMALLEST, LabelledSlice, Synthesis, choose_exemplars, random_exemplars, synthesize

SIZE = 48
LOW, SPAN = 0.2, 0.4
"""Intensities of the ramps: low enough not to be clipped by the gains of the tests."""

STILL = Synthesis((1, 1), 1, 0, 0, 0, flip=0, gamma=(1, 1), gain=(1, 1), offset=(0, 0), brightness=(0, 1))
"""Changes nothing."""

boxes = st.lists(
    st.tuples(st.integers(1, 4), *[st.integers(0, SIZE - 1)] * 2, *[st.integers(1, SIZE)] * 2), min_size=1, max_size=6
)
seeds = st.integers(0, 2**32 - 1)


def label_of(boxes) -> torch.Tensor:
    """(S,S) with boxes of (class, row, column, height, width); later ones lie above."""
    label = torch.zeros(SIZE, SIZE, dtype=torch.long)
    for number, row, column, height, width in boxes:
        label[row : row + height, column : column + width] = number
    return label


def ramps() -> torch.Tensor:
    """(3,S,S): rows, columns, and their mean; so an intensity tells where a pixel is from."""
    ramp = LOW + SPAN * torch.arange(SIZE) / (SIZE - 1)
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([rows, columns, (rows + columns) / 2])


def empty(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return image, torch.zeros(SIZE, SIZE, dtype=torch.long)


def make(exemplar, background, ranges=None, seed=0):
    return synthesize(exemplar, background, ranges or Synthesis(), np.random.default_rng(seed))


def classes(label: torch.Tensor) -> set[int]:
    return set(label.unique().tolist())


@settings(max_examples=60, deadline=None)
@given(boxes, boxes, seeds, st.booleans())
def test_no_class_appears_that_neither_slice_shows(shown, below, seed, onto_empty):
    exemplar = ramps(), label_of(shown)
    background = empty() if onto_empty else (ramps(), label_of(below))
    lively = Synthesis(translation=0.5, relocate=0.5, elastic=0.05, flip=0.5, feather=2)
    image, label = make(exemplar, background, lively, seed)
    assert classes(label) <= classes(exemplar[1]) | classes(background[1]) | {0}
    assert image.shape == (3, SIZE, SIZE)
    assert image.dtype == torch.float32
    assert label.dtype == torch.int64
    assert image.min() >= 0
    assert image.max() <= 1


@settings(max_examples=60, deadline=None)
@given(boxes)
def test_without_a_change_it_is_the_exemplar_cut_out(shown):
    source, classes_of = ramps(), label_of(shown)
    areas = torch.bincount(classes_of.ravel(), minlength=5)
    expected = torch.where(areas[classes_of] >= SMALLEST, classes_of, 0)
    background = empty()
    image, label = make((source, classes_of), background, STILL)
    assert torch.equal(label, expected)
    torch.testing.assert_close(image, torch.where(expected > 0, source, background[0]))


@settings(max_examples=100, deadline=None)
@given(boxes, seeds, st.floats(0.6, 1.4), st.floats(-0.1, 0.1), st.floats(0, 0.3), st.sampled_from([0.0, 1.0]))
def test_what_is_pasted_is_the_recoloured_warped_structure_and_the_rest_the_background(
    shown, seed, gain, offset, translation, flip
):
    """Every pasted pixel tells by its two ramps where it is from: from its own class, by one affine map of the class
    about its centroid; every other pixel is the background, recoloured."""
    classes_of, background = label_of(shown), empty(seed % 1000)
    ranges = Synthesis(
        translation=translation,
        flip=flip,
        gamma=(1, 1),
        gain=(gain, gain),
        offset=(offset, offset),
        brightness=(0, 1),
    )
    image, label = make((ramps(), classes_of), background, ranges, seed)
    torch.testing.assert_close(
        image[:, label == 0], (background[0] * gain + offset).clamp(0, 1)[:, label == 0], atol=1e-6, rtol=0
    )
    assert torch.allclose(image[2, label > 0], image[:2, label > 0].mean(0), atol=1e-5)
    for number in classes(label) - {0}:
        here = np.argwhere(label.numpy() == number)
        values = image[:2, label == number].numpy().T
        origins = ((values - offset) / gain - LOW) / SPAN * (SIZE - 1)
        near = [np.rint(origins + step).astype(int) for step in ([1e-3, 1e-3], [-1e-3, 1e-3], [1e-3, -1e-3], -1e-3)]
        found = np.any([classes_of.numpy()[tuple(np.clip(n, 0, SIZE - 1).T)] == number for n in near], axis=0)
        assert found.all()
        inner = (origins > 1e-3).all(1) & (origins < SIZE - 1 - 1e-3).all(1)
        design = np.column_stack([here[inner], np.ones(inner.sum())])
        if np.linalg.matrix_rank(design) == 3:
            solution = np.linalg.lstsq(design, origins[inner], rcond=None)[0]
            assert np.abs(design @ solution - origins[inner]).max() < 2e-3
            forward = np.linalg.inv(solution[:2].T)
            assert 0.5**2 - 0.01 <= np.linalg.det(forward) * (-1 if flip else 1) <= 1.5**2 + 0.01
            centre = np.array(ndimage.center_of_mass(classes_of.numpy() == number))
            moved = forward @ (centre - solution[2])
            assert np.abs(moved - centre).max() <= translation * SIZE + 0.05


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(6, 24), st.integers(6, 24), st.integers(12, 18))
def test_a_lesion_s_centre_is_in_the_body(seed, row, column, side):
    """Wherever it was: the background shows a body, and something smaller beside it."""
    body = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    body[row : row + side, column : column + side] = True
    image = torch.where(body, 0.8, 0.05).expand(3, -1, -1).clone()
    image[:, 1:3, 1:3] = 0.8
    image[:, row + 3, column + 3] = 0.0  # a dark spot in the body is still the body
    nowhere = torch.zeros(SIZE, SIZE, dtype=torch.long)
    exemplar = ramps(), label_of([(1, 0, 39, 5, 5)])
    _, label = make(exemplar, (image, nowhere), dataclasses.replace(STILL, relocate=1.0), seed)
    centre = np.rint(ndimage.center_of_mass(label.numpy() == 1)).astype(int)
    assert body[tuple(centre)]


def test_elastic_changes_bend_and_stay_within_their_limit():
    square = label_of([(1, 14, 14, 20, 20)])
    bent = dataclasses.replace(STILL, elastic=0.1)
    shapes = [make((ramps(), square), empty(), bent, seed)[1] == 1 for seed in range(10)]
    far = ndimage.distance_transform_edt(square.numpy() == 0)
    assert all(far[shape.numpy()].max(initial=0) <= 0.1 * SIZE + 1 for shape in shapes)
    assert sum(not torch.equal(shape, square == 1) for shape in shapes) >= 8


def test_gamma_changes_contrast_not_its_order():
    image, label = make((ramps(), label_of([(1, 0, 0, SIZE, SIZE)])), empty(), dataclasses.replace(STILL, gamma=(2, 2)))
    assert (label == 1).all()
    torch.testing.assert_close(image, ramps() ** 2)


def test_regions_and_background_have_intensities_of_their_own():
    flat = torch.full((3, SIZE, SIZE), 0.5)
    exemplar = flat, label_of([(1, 4, 4, 12, 12), (2, 28, 28, 12, 12)])
    image, label = make(exemplar, (flat, torch.zeros_like(exemplar[1])))
    values = [image[:, label == n].unique() for n in range(3)]
    assert [len(v) for v in values] == [1, 1, 1]
    assert len(torch.cat(values).unique()) == 3


@settings(max_examples=60, deadline=None)
@given(boxes, seeds, st.floats(0.02, 1), st.floats(0.02, 1))
def test_nothing_becomes_all_black_or_all_white(shown, seed, structure, around):
    """Not even where dark becomes darker, or bright brighter."""
    exemplar = torch.full((3, SIZE, SIZE), structure), label_of(shown)
    image, label = make(exemplar, (torch.full((3, SIZE, SIZE), around), torch.zeros_like(label_of([]))), seed=seed)
    assert all(0.09 < image[:, label == n].mean() < 0.91 for n in classes(label))


@settings(max_examples=60, deadline=None)
@given(boxes, seeds, st.integers(20, SIZE), st.integers(20, SIZE))
def test_padding_stays_black_and_without_label(shown, seed, rows, columns):
    background = empty()
    background[0][:, rows:] = 0
    background[0][:, :, columns:] = 0
    image, label = make((ramps(), label_of(shown)), background, Synthesis(translation=0.5), seed)
    for part in (image, label):
        assert not part[..., rows:, :].any()
        assert not part[..., columns:].any()


def test_a_black_background_is_all_padding():
    black = torch.zeros(3, SIZE, SIZE), torch.zeros(SIZE, SIZE, dtype=torch.long)
    image, label = make((ramps(), label_of([(1, 4, 4, 20, 20)])), black)
    assert not image.any()
    assert not label.any()


@pytest.mark.parametrize("large", [1, 2])
def test_small_structures_lie_above_large_ones(large):
    small = 3 - large
    both = label_of([(large, 0, 0, SIZE, 30), (small, 20, 24, 8, 8)])
    alone = torch.where(both == small, both, 0)
    twice = dataclasses.replace(STILL, scale=(1.5, 1.5))
    label, expected = (make((ramps(), one), empty(), twice)[1] for one in (both, alone))
    assert (expected == small).sum() > 100
    assert torch.equal(label == small, expected == small)
    assert (label == large).any()


def test_structures_that_become_too_small_are_left_out():
    exemplar = ramps(), label_of([(1, 4, 4, 6, 6), (2, 20, 20, 20, 20)])
    image, label = make(exemplar, empty(), dataclasses.replace(STILL, scale=(0.5, 0.5)))
    assert classes(label) == {0, 2}
    assert torch.equal(image[:, label == 0], empty()[0][:, label == 0])


def test_a_structure_that_left_the_frame_changes_nothing():
    exemplar = ramps(), label_of([(1, 20, 20, 6, 6)])
    for seed in range(30):
        image, label = make(exemplar, empty(), dataclasses.replace(STILL, translation=5), seed)
        assert torch.equal(image[:, label == 0], empty()[0][:, label == 0])


def test_labels_of_the_background_stay_where_nothing_is_pasted():
    background = ramps(), label_of([(3, 30, 0, 10, 48)])
    _, label = make((ramps(), label_of([(1, 0, 0, 36, 36)])), background, STILL)
    assert torch.equal(label, label_of([(3, 30, 0, 10, 48), (1, 0, 0, 36, 36)]))


def test_a_feather_changes_two_pixels_inside_the_border_alone():
    exemplar, background = (torch.ones(3, SIZE, SIZE), label_of([(1, 10, 10, 20, 24)])), empty()
    background = background[0] * 0.4, background[1]
    soft = Synthesis(gamma=(1, 1), gain=(1, 1), offset=(0, 0), feather=2)
    hard_image, hard = make(exemplar, background, dataclasses.replace(soft, feather=0), 3)
    image, label = make(exemplar, background, soft, 3)
    assert torch.equal(label, hard)
    depth = torch.from_numpy(ndimage.distance_transform_edt(label.numpy()))
    border = (depth > 0) & (depth < 3)
    assert torch.equal(image[:, ~border], hard_image[:, ~border])
    assert (image[:, border] < hard_image[:, border]).all()
    assert (image[:, border] > background[0][:, border]).all()


@settings(max_examples=20, deadline=None)
@given(boxes, seeds)
def test_the_same_seed_gives_the_same_sample_and_leaves_its_sources(shown, seed):
    exemplar, background = (ramps(), label_of(shown)), empty()
    first, second = (make(exemplar, background, seed=seed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(exemplar[0], ramps())
    assert torch.equal(exemplar[1], label_of(shown))
    assert all(torch.equal(a, b) for a, b in zip(background, empty(), strict=True))
    assert not torch.equal(first[0], make(exemplar, background, seed=seed + 1)[0])


# ---- the choice of exemplars

slices = st.lists(
    st.builds(LabelledSlice, st.integers(0, 3), st.dictionaries(st.integers(1, 12), st.integers(1, 500), min_size=1)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(slices, st.integers(1, 12))
def test_exemplars_show_every_class(given_slices, count):
    chosen = choose_exemplars(given_slices, count)
    assert len(set(chosen)) == len(chosen) >= min(count, len(given_slices))
    most = {n: max(s.areas.get(n, 0) for s in given_slices) for s in given_slices for n in s.areas}
    for number, area in most.items():
        assert max(given_slices[n].areas.get(number, 0) for n in chosen) >= min(SMALLEST, area)

    def shown(one):
        return sum(area >= min(SMALLEST, most[n]) for n, area in one.areas.items())

    assert shown(given_slices[chosen[0]]) == max(map(shown, given_slices))


def test_exemplars_among_equals_are_of_other_cases_then_large():
    given_slices = [
        LabelledSlice("a", {1: 100, 2: 100}),
        LabelledSlice("a", {1: 300, 2: 300}),
        LabelledSlice("a", {1: 200, 2: 200}),
        LabelledSlice("b", {1: 50, 2: 50}),
        LabelledSlice("b", {1: 400}),
    ]
    assert choose_exemplars(given_slices, 3) == [1, 3, 2]
    assert choose_exemplars(given_slices, 1) == [1]


def test_a_sliver_does_not_stand_for_its_class():
    given_slices = [LabelledSlice("a", {1: 900, 2: 3}), LabelledSlice("a", {1: 500}), LabelledSlice("a", {2: 40})]
    assert choose_exemplars(given_slices, 2) == [0, 2]


@given(slices, seeds)
def test_random_exemplars_follow_the_seed(given_slices, seed):
    chosen = random_exemplars(given_slices, seed, count=5)
    assert chosen == random_exemplars(given_slices, seed, count=5)
    assert len(set(chosen)) == len(chosen) == min(5, len(given_slices))
    assert set(chosen) <= set(range(len(given_slices)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_what_nobody_has_labelled_is_neither_cut_nor_lost(seed):
    """An ignored part of the exemplar is pasted nowhere; one of the background stays, unless a structure covers it."""
    label = label_of([(1, 10, 10, 20, 20)])
    ignored = label.clone()
    ignored[30:50, 5:30] = IGNORE
    below = empty()[0], torch.zeros_like(label)
    plain, partly = (make((ramps(), one), below, seed=seed) for one in (label, ignored))
    assert torch.equal(plain[0], partly[0])
    assert torch.equal(plain[1], partly[1])
    onto = below[1].clone()
    onto[40:] = IGNORE
    image, found = make((ramps(), label), (below[0], onto), seed=seed)
    assert torch.equal(image, plain[0])
    assert torch.equal(found, torch.where(plain[1] > 0, plain[1], onto))
