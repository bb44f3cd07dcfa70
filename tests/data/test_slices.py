import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samadapt.data.slices import (
    SliceFrame,
    pixel_to_voxel,
    put_slice,
    slice_count,
    slice_stack,
    take_slice,
    voxel_to_pixel,
)
from samadapt.data.volume import Geometry
from samadapt.errors import InputError

SHAPE = (4, 5, 6)
ARRAY = np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32)
AXES = [0, 1, 2]

frames = st.builds(
    SliceFrame,
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    spacing=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    size=st.sampled_from([32, 64, 100, 256]),
)
few = settings(max_examples=100, deadline=None)


# Slices


@pytest.mark.parametrize("axis", AXES)
def test_put_is_the_inverse_of_take(axis):
    result = np.zeros(SHAPE)
    for index in range(slice_count(SHAPE, axis)):
        put_slice(result, axis, index, take_slice(ARRAY[0], axis, index))
    np.testing.assert_array_equal(result, ARRAY[0])


@given(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)), st.sampled_from(AXES))
def test_voxels_and_pixels_agree(voxel, axis):
    index, row, column = voxel_to_pixel(voxel, axis)
    assert take_slice(ARRAY[0], axis, index)[row, column] == ARRAY[0][voxel]
    assert pixel_to_voxel(index, row, column, axis) == voxel


def test_pictures_are_upright():
    """i is the column, j the row."""
    picture = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(take_slice(picture.T[:, :, None], 2, 0), picture)


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_become_channels(axis):
    last = SHAPE[axis] - 1
    for index in range(last + 1):
        stack = slice_stack(ARRAY, axis, index, context=1)
        assert stack.dtype == torch.float32
        for channel, neighbour in enumerate((max(0, index - 1), index, min(last, index + 1))):
            np.testing.assert_array_equal(stack[channel], take_slice(ARRAY[0], axis, neighbour))


def test_without_context_the_slice_is_repeated():
    stack = slice_stack(ARRAY, 2, 3, context=0)
    for channel in range(3):
        np.testing.assert_array_equal(stack[channel], ARRAY[0, :, :, 3].T)


def test_colour_keeps_its_channels():
    rgb = np.random.default_rng(1).random((3, *SHAPE), dtype=np.float32)
    stack = slice_stack(rgb, 1, 2, context=1)
    for channel in range(3):
        np.testing.assert_array_equal(stack[channel], take_slice(rgb[channel], 1, 2))


def test_a_view_that_runs_backwards():
    np.testing.assert_array_equal(slice_stack(ARRAY[:, ::-1], 2, 0, 0)[0], ARRAY[0, ::-1, :, 0].T)


@pytest.mark.parametrize("index", [-1, 6])
def test_slice_outside(index):
    with pytest.raises(InputError, match="0 to 5"):
        slice_stack(ARRAY, 2, index, 1)


def test_two_channels():
    with pytest.raises(InputError, match="1 or 3 channels"):
        slice_stack(np.zeros((2, *SHAPE)), 2, 0, 1)


# Frame


def test_longest_side_in_millimetres_fills_the_frame():
    assert SliceFrame(100, 100, (3.0, 1.0), 256).content == (256, 85)
    assert SliceFrame(50, 100, (1.0, 1.0), 256).content == (128, 256)
    assert SliceFrame(1, 4000, (0.1, 1.0), 64).content == (1, 64)


@pytest.mark.parametrize(("axis", "size"), [(2, (5, 4)), (1, (6, 4)), (0, (6, 5))])
def test_frame_of_a_geometry(axis, size):
    frame = SliceFrame.of(Geometry(SHAPE, np.diag([1.0, 2.0, 4.0, 1.0])), axis, 64)
    assert (frame.height, frame.width) == size == take_slice(ARRAY[0], axis, 0).shape
    rows, columns = {2: (2, 1), 1: (4, 1), 0: (4, 2)}[axis]
    assert frame.spacing == (rows, columns)


@given(frames)
@few
def test_the_content_is_what_it_says(frame):
    h, w = frame.content
    image = frame.to_model(torch.ones(3, frame.height, frame.width))
    assert image.shape == (3, frame.size, frame.size)
    torch.testing.assert_close(image[:, :h, :w], torch.ones(3, h, w))
    assert image.sum() == pytest.approx(3 * h * w, rel=1e-4)
    mask = frame.mask_to_model(np.ones((frame.height, frame.width), np.uint8), padding=255)
    assert (mask[:h, :w] == 1).all()
    assert (mask == 255).sum() == frame.size**2 - h * w
    assert max(h, w) == frame.size


@given(frames)
@few
def test_corners_go_to_corners(frame):
    """Pixel (0, 0) begins at the frame's corner, the last pixel ends where the content ends."""
    h, w = frame.content
    corners = [(-0.5, -0.5), (frame.height - 0.5, frame.width - 0.5)]
    expected = torch.tensor([[-0.5, -0.5], [w - 0.5, h - 0.5]])
    torch.testing.assert_close(frame.points_to_model(corners), expected, atol=1e-3, rtol=0)


@given(frames, st.lists(st.tuples(st.floats(0, 89), st.floats(0, 89)), max_size=5))
@few
def test_points_there_and_back(frame, points):
    native = torch.tensor(points, dtype=torch.float32).reshape(-1, 2)
    torch.testing.assert_close(frame.points_to_native(frame.points_to_model(points)), native, atol=1e-2, rtol=1e-4)


def test_boxes_are_two_points():
    frame = SliceFrame(40, 20, (1.0, 1.0), 80)
    boxes = torch.tensor([[2.0, 3.0, 10.0, 15.0], [0, 0, 39, 19]])
    mapped = frame.boxes_to_model(boxes)
    np.testing.assert_allclose(mapped[0], [6.5, 4.5, 30.5, 20.5])
    np.testing.assert_allclose(mapped[1], [0.5, 0.5, 38.5, 78.5])
    assert frame.boxes_to_model([]).shape == (0, 4)


@given(frames, st.data())
@few
def test_a_click_on_a_pixel_lies_on_that_pixel_in_the_frame(frame, data):
    row = data.draw(st.integers(0, frame.height - 1))
    column = data.draw(st.integers(0, frame.width - 1))
    h, w = frame.content
    if h < frame.height or w < frame.width:
        return  # several native pixels share one of the frame
    ids = np.arange(frame.height * frame.width).reshape(frame.height, frame.width)
    x, y = frame.points_to_model([(row, column)])[0].tolist()
    mapped = frame.mask_to_model(ids)
    # The centre of a native pixel lies in it; on the border of two frame pixels either is right.
    near = {mapped[round(y + dy), round(x + dx)] for dy in (-0.01, 0.01) for dx in (-0.01, 0.01)}
    assert ids[row, column] in near


@given(frames, st.sampled_from([16, 64, 256]))
@few
def test_logits_of_the_padding_do_not_reach_the_slice(frame, cells):
    h, w = frame.content
    logits = torch.full((2, cells, cells), 100.0)
    rows, columns = max(1, int(h * cells / frame.size)), max(1, int(w * cells / frame.size))
    logits[:, :rows, :columns] = -1.0
    native = frame.logits_to_native(logits)
    assert native.shape == (2, frame.height, frame.width)
    torch.testing.assert_close(native, torch.full_like(native, -1.0))


@given(frames)
@few
def test_a_ramp_comes_back_as_itself(frame):
    """Image -> frame -> native is the identity where nothing is shrunk, up to the outermost pixels."""
    h, w = frame.content
    if h < frame.height or w < frame.width or min(frame.height, frame.width) < 3:
        return
    ramp = torch.arange(frame.height)[:, None] * 3.0 + torch.arange(frame.width)[None]
    back = frame.logits_to_native(frame.to_model(ramp[None]))[0]
    torch.testing.assert_close(back[1:-1, 1:-1], ramp[1:-1, 1:-1], atol=0.02, rtol=1e-3)


@given(frames, st.integers(0, 2**32 - 1))
@few
def test_masks_there_and_back_are_exact(frame, seed):
    h, w = frame.content
    if h < frame.height or w < frame.width:
        return
    mask = np.random.default_rng(seed).integers(0, 5, (frame.height, frame.width), dtype=np.uint8)
    logits = torch.nn.functional.one_hot(torch.from_numpy(frame.mask_to_model(mask)).long(), 5)
    shown = frame.mask_to_model(mask)
    rows = np.floor((np.arange(frame.height) + 0.5) * h / frame.height).astype(int)
    columns = np.floor((np.arange(frame.width) + 0.5) * w / frame.width).astype(int)
    np.testing.assert_array_equal(shown[np.ix_(rows, columns)], mask)
    assert logits.shape == (frame.size, frame.size, 5)


def test_class_mask_through_logits_at_double_size():
    """Borders included: every native pixel gets its own class back."""
    mask = np.random.default_rng(0).integers(0, 4, (32, 24), dtype=np.uint8)
    frame = SliceFrame(32, 24, (1.0, 1.0), 128)
    shown = torch.from_numpy(frame.mask_to_model(mask)).long()
    logits = torch.nn.functional.one_hot(shown, 4).permute(2, 0, 1).float()
    np.testing.assert_array_equal(frame.logits_to_native(logits).argmax(0), mask)


def test_numpy_and_torch_masks_agree():
    frame = SliceFrame(7, 9, (1.0, 1.5), 32)
    mask = np.random.default_rng(0).integers(0, 9, (7, 9))
    as_tensor = frame.mask_to_model(torch.from_numpy(mask), padding=-1)
    assert isinstance(as_tensor, torch.Tensor)
    np.testing.assert_array_equal(as_tensor, frame.mask_to_model(mask, padding=-1))


def test_half_precision_logits():
    frame = SliceFrame(7, 9, (1.0, 1.5), 32)
    assert frame.logits_to_native(torch.zeros(2, 8, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("arguments", [(0, 5, (1, 1), 64), (5, 0, (1, 1), 64), (5, 5, (0, 1), 64), (5, 5, (1, 1), 0)])
def test_impossible_frames(arguments):
    with pytest.raises(InputError, match="no frame"):
        SliceFrame(*arguments)
