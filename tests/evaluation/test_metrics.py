import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from samadapt.data.labels import IGNORE, LabelMap
from samadapt.evaluation.metrics import dice, hd95, mean, mean_by_class

ONE = LabelMap(("organ",))


def mask(*boxes, shape=(8, 8, 8)):
    result = np.zeros(shape, dtype=np.uint8)
    for box in boxes:
        result[tuple(slice(*ends) for ends in box)] = 1
    return result


CUBE = ((2, 6), (2, 6), (2, 6))


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (mask(CUBE), mask(CUBE), 1.0),
        (mask(CUBE), mask(), 0.0),
        (mask(), mask(CUBE), 0.0),
        (mask(), mask(), math.nan),
        (mask(((2, 4), (2, 6), (2, 6))), mask(CUBE), 2 * 32 / (32 + 64)),
    ],
    ids=["equal", "truth empty", "prediction empty", "both empty", "half"],
)
def test_dice_never_rewards_an_empty_prediction(predicted, truth, expected):
    assert dice(predicted, truth, ONE) == pytest.approx({"organ": expected}, nan_ok=True)


def test_dice_keeps_classes_apart():
    labels = LabelMap(("a", "b"))
    truth = mask(CUBE)
    truth[truth == 1] = np.repeat([1, 2], 32)
    assert dice(np.where(truth > 0, 1, 0), truth, labels) == pytest.approx({"a": 2 * 32 / (64 + 32), "b": 0.0})


@pytest.mark.parametrize(("predicted", "truth"), [(mask(CUBE), mask()), (mask(), mask(CUBE)), (mask(), mask())])
def test_hd95_of_an_empty_mask_is_undefined(predicted, truth):
    assert math.isnan(hd95(predicted, truth, ONE, (1, 1, 1))["organ"])


@pytest.mark.parametrize(("axis", "millimetres"), [(0, 2 * 0.5), (1, 2 * 1.0), (2, 2 * 3.0)])
def test_hd95_counts_millimetres_along_each_axis(axis, millimetres):
    """Plates one voxel thick, two voxels apart: every surface distance is two spacings of that axis."""
    plates = [np.zeros((9, 9, 9), dtype=np.uint8) for _ in range(2)]
    for plate, place in zip(plates, (3, 5), strict=True):
        np.moveaxis(plate, axis, 0)[place] = 1
    assert hd95(plates[0], plates[1], ONE, (0.5, 1.0, 3.0))["organ"] == pytest.approx(millimetres)


def test_hd95_is_the_larger_direction_and_forgives_a_twentieth():
    """A line of 41 voxels of 2 mm against its first 21: from the far half, distances are 2, 4, ... 40 mm."""
    long, short = mask(((1, 42), (1, 2), (1, 2)), shape=(44, 3, 3)), mask(((1, 22), (1, 2), (1, 2)), shape=(44, 3, 3))
    distances = [0.0] * 21 + [2.0 * n for n in range(1, 21)]
    assert hd95(long, short, ONE, (2, 1, 1))["organ"] == pytest.approx(np.percentile(distances, 95))


def test_means_leave_out_what_is_undefined():
    assert mean([0.5, math.nan, 1.0]) == pytest.approx(0.75)
    assert math.isnan(mean([math.nan]))
    by_class = mean_by_class([{"a": 0.2, "b": math.nan}, {"a": 0.4, "b": math.nan}])
    assert by_class == pytest.approx({"a": 0.3, "b": math.nan}, nan_ok=True)
    assert mean_by_class([]) == {}


# What nobody has labelled

small_masks = arrays(np.uint8, (4, 5, 6), elements=st.integers(0, 2))
TWO = LabelMap(("a", "b"))


@given(small_masks, small_masks, small_masks, arrays(bool, (4, 5, 6)))
@settings(max_examples=50, deadline=None)
def test_what_a_model_says_where_nobody_has_labelled_does_not_matter(predicted, other, truth, ignored):
    cut = np.where(ignored, IGNORE, truth)
    changed = np.where(ignored, other, predicted)
    here = [dice(found, cut, TWO) for found in (predicted, changed)]
    there = [hd95(found, cut, TWO, (1, 2, 3)) for found in (predicted, changed)]
    assert here[0] == pytest.approx(here[1], nan_ok=True)
    assert there[0] == pytest.approx(there[1], nan_ok=True)
    counted = dice(np.where(ignored, 0, predicted), np.where(ignored, 0, truth), TWO)
    assert here[0] == pytest.approx(counted, nan_ok=True)


def test_a_class_that_nobody_has_looked_for_has_no_score():
    truth = mask(CUBE)
    predicted = truth.copy()
    predicted[0, 0, 0] = 2
    assert dice(predicted, truth, TWO)["b"] == 0.0
    assert dice(predicted, truth, TWO, ["b"]) == pytest.approx({"a": 1.0, "b": math.nan}, nan_ok=True)
    assert math.isnan(hd95(truth * 2, truth * 2, TWO, (1, 1, 1), ["b"])["b"])
    assert hd95(truth * 2, truth * 2, TWO, (1, 1, 1))["b"] == 0.0


@given(arrays(bool, (6, 7, 5)), arrays(bool, (6, 7, 5)))
@settings(max_examples=50, deadline=None)
def test_hd95_beside_a_far_ignored_voxel_is_that_without_it(predicted, truth):
    """Of two definitions, MONAI's serves where everything is labelled; the other one must say the same."""
    padded = [np.pad(one, ((0, 0), (0, 0), (0, 3))).astype(np.uint8) for one in (predicted, truth)]
    beside = padded[1].copy()
    beside[0, 0, -1] = IGNORE
    whole, cut = hd95(*padded, ONE, (1.0, 2.0, 0.5)), hd95(padded[0], beside, ONE, (1.0, 2.0, 0.5))
    assert cut == pytest.approx(whole, nan_ok=True, rel=1e-5)


def test_hd95_of_single_labelled_slices_is_that_of_their_outlines():
    """A disc with a radius 2 px larger on one labelled slice: its flat sides, next to unlabelled slices, are no
    surface, or most of the distances would be 0."""
    rows, columns = np.mgrid[:40, :40] - 20
    found, truth = (np.repeat((np.hypot(rows, columns) <= radius)[..., None], 9, 2) for radius in (12, 10))
    cut = np.where(np.arange(9) == 4, truth, IGNORE).astype(np.uint8)
    assert hd95(found.astype(np.uint8), cut, ONE, (1, 1, 1))["organ"] == pytest.approx(2, abs=0.5)
    assert math.isnan(hd95(found.astype(np.uint8), np.full_like(cut, IGNORE), ONE, (1, 1, 1))["organ"])
