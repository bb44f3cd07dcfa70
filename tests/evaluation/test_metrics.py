import math

import numpy as np
import pytest

from samadapt.data.labels import LabelMap
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
