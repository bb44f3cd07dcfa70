import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from samadapt.data.prompts import LOOSE_SCALE, NEGATIVE, TIGHT_JITTER, mask_boxes, sample_prompts
from samadapt.errors import InputError

SIZE = 24
MASKS = arrays(bool, st.tuples(st.integers(1, 4), st.just(SIZE), st.just(SIZE))).filter(
    lambda masks: masks.any(axis=(1, 2)).all()
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square_masks(count: int = 200) -> torch.Tensor:
    masks = torch.zeros(count, 64, 64, dtype=torch.bool)
    masks[:, 20:40, 24:34] = True
    return masks


@given(MASKS, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_clicks_lie_on_the_side_their_label_says(masks, seed):
    batch = sample_prompts(torch.from_numpy(masks), seeded(seed))
    for mask, points, labels in zip(masks, batch.points.long().numpy(), batch.point_labels.numpy(), strict=True):
        for (x, y), label in zip(points, labels, strict=True):
            assert label in (-1, 0, 1)
            if label >= 0:
                assert mask[y, x] == bool(label)


@given(MASKS, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_boxes_stay_in_the_frame_and_touch_the_object(masks, seed):
    boxes = sample_prompts(torch.from_numpy(masks), seeded(seed)).boxes.numpy()
    assert (boxes >= 0).all()
    assert (boxes <= SIZE - 1).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        rows, columns = np.nonzero(mask)
        assert columns.max() >= x0 - 1
        assert columns.min() <= x1 + 1
        assert rows.max() >= y0 - 1
        assert rows.min() <= y1 + 1


def test_a_pixel_in_the_last_corner_has_a_box():
    masks = torch.zeros(200, SIZE, SIZE, dtype=torch.bool)
    masks[:, -1, -1] = True
    boxes = sample_prompts(masks, seeded(0)).boxes
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert (boxes <= SIZE - 1).all()


def test_same_seed_same_prompts():
    first, second = (sample_prompts(square_masks(), seeded(7)) for _ in range(2))
    assert torch.equal(first.points, second.points)
    assert torch.equal(first.point_labels, second.point_labels)
    assert torch.equal(first.boxes, second.boxes)


def test_tight_boxes_are_off_by_a_fraction_of_the_size():
    off = sample_prompts(square_masks(), seeded(1), loose_boxes=0.0).boxes - torch.tensor([24.0, 20.0, 33.0, 39.0])
    limit = TIGHT_JITTER * torch.tensor([10.0, 20.0, 10.0, 20.0])
    assert (off.abs() <= limit + 1e-4).all()
    assert off.std(dim=0).min() > 0.3


def test_loose_boxes_are_square_and_hold_the_object_off_centre():
    boxes = sample_prompts(square_masks(), seeded(2), loose_boxes=1.0).boxes
    size = boxes[:, 2:] - boxes[:, :2]
    uncut = ((boxes > 0) & (boxes < 63)).all(dim=1)
    assert torch.allclose(size[uncut, 0], size[uncut, 1], atol=1e-3)
    assert (size.amax(dim=1) >= LOOSE_SCALE[0] * 20).all()
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - torch.tensor([28.5, 29.5])
    assert centre.abs().mean() > 1


def test_shares_of_box_only_and_loose_samples():
    batch = sample_prompts(square_masks(400), seeded(3))
    without_clicks = (batch.point_labels == -1).all(dim=1).float().mean()
    assert 0.4 < without_clicks < 0.6
    with_clicks = batch.point_labels[(batch.point_labels != -1).any(dim=1)]
    assert (with_clicks[:, 0] == 1).all()
    assert (with_clicks == 0).any()


def test_a_mask_that_fills_the_frame_has_no_negative_click():
    batch = sample_prompts(torch.ones(3, 16, 16, dtype=torch.bool), seeded(4), box_only=0.0)
    assert (batch.point_labels != 0).all()


def test_mask_boxes_include_the_last_pixel():
    assert mask_boxes(square_masks(1)).tolist() == [[24.0, 20.0, 33.0, 39.0]]


def test_refuses_an_empty_mask():
    with pytest.raises(InputError, match="without a pixel"):
        sample_prompts(torch.zeros(1, 8, 8, dtype=torch.bool))


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_clicks_outside_the_object_are_where_somebody_has_labelled(seed):
    masks = torch.zeros(2, 24, 24, dtype=torch.bool)
    masks[:, 8:14, 8:14] = True
    labelled = torch.zeros_like(masks)
    labelled[0, :12], labelled[1] = True, masks[1]
    random = torch.Generator().manual_seed(seed)
    prompts = sample_prompts(masks, random, labelled=labelled, negative_clicks=3, box_only=0.0)
    outside = prompts.point_labels == NEGATIVE
    assert not outside[1].any()
    assert all(y < 12 for _, y in prompts.points[0][outside[0]].tolist())
    free = [
        sample_prompts(masks, torch.Generator().manual_seed(seed), labelled=part) for part in (None, ~masks | masks)
    ]
    assert torch.equal(free[0].points, free[1].points)
    assert torch.equal(free[0].point_labels, free[1].point_labels)
