import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samadapt.data.geometry import Geometry, turn_to, turn_to_lps
from samadapt.errors import InputError

SHAPE = (4, 5, 6)
CODES = [
    "".join(code)
    for axes in itertools.permutations(("LR", "PA", "SI"))
    for code in itertools.product(*axes)
]  # fmt: skip


def oriented(code: str, shape=SHAPE, spacing=(0.7, 1.3, 4.0), tilt=0.0) -> Geometry:
    affine = np.eye(4)
    ornt = nib.orientations.axcodes2ornt(code)
    for axis, (target, sign) in enumerate(ornt):
        affine[:3, axis] = 0
        affine[int(target), axis] = sign * spacing[axis]
    c, s = np.cos(tilt), np.sin(tilt)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ affine[:3, :3]
    affine[:3, 3] = (12.5, -30.0, 7.25)
    return Geometry(shape, affine)


def every_voxel(shape):
    return np.argwhere(np.ones(shape, dtype=bool))


def test_there_are_48_orientations():
    assert len(set(CODES)) == 48


@given(st.sampled_from(CODES), st.floats(-0.6, 0.6), st.tuples(*[st.integers(1, 6)] * 3))
@settings(max_examples=100, deadline=None)
def test_turning_moves_no_voxel_in_space(code, tilt, shape):
    native = oriented(code, shape, tilt=tilt)
    turn = turn_to_lps(native)
    array = np.arange(np.prod(shape)).reshape(shape)
    turned = turn.forward(array)
    assert turned.shape == turn.turned.shape
    voxels = every_voxel(shape)
    there = turn.voxels_forward(voxels)
    np.testing.assert_array_equal(turned[tuple(there.astype(int).T)], array[tuple(voxels.T)])
    np.testing.assert_allclose(turn.turned.to_world(there), native.to_world(voxels), atol=1e-9)
    np.testing.assert_array_equal(turn.back(turned), array)


@given(st.sampled_from(CODES))
@settings(max_examples=48, deadline=None)
def test_turned_axes_point_left_posterior_superior(code):
    native = oriented(code)
    assert native.orientation == code
    assert turn_to_lps(native).turned.orientation == "LPS"


def test_channels_are_kept_in_front():
    turn = turn_to_lps(oriented("SAR"))
    array = np.random.default_rng(0).random((3, *SHAPE))
    turned = turn.forward(array)
    for channel in range(3):
        np.testing.assert_array_equal(turned[channel], turn.forward(array[channel]))
    np.testing.assert_array_equal(turn.back(turned), array)


@given(st.sampled_from(CODES), st.sampled_from(CODES))
@settings(max_examples=50, deadline=None)
def test_turn_to_another_grid(code, other):
    assert turn_to(oriented(code), oriented(other)).turned.orientation == other


def test_matches_by_place_not_by_rounding():
    grid = oriented("RAS")
    near, far = grid.affine.copy(), grid.affine.copy()
    near[0, 3] += 0.05
    far[0, 3] += 0.5
    assert grid.matches(Geometry(SHAPE, near))
    assert not grid.matches(Geometry(SHAPE, far))
    assert not grid.matches(Geometry((4, 5, 7), grid.affine))
    assert not grid.matches(oriented("LAS"))


def test_small_angles_add_up_over_the_volume():
    grid = Geometry((400, 400, 4), np.eye(4))
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(0.002), -np.sin(0.002)], [np.sin(0.002), np.cos(0.002)]]
    assert not grid.matches(Geometry((400, 400, 4), turned))


def test_pictures_match_by_shape_alone():
    picture = Geometry((4, 5, 1), np.eye(4), in_space=False)
    assert picture.matches(Geometry((4, 5, 1), np.diag([2.0, 2, 2, 1])))
    assert not picture.matches(Geometry((5, 4, 1), np.eye(4)))


@pytest.mark.parametrize(
    ("spacing", "shape", "axis"),
    [
        ((1, 1, 5), SHAPE, 2),
        ((5, 1, 1), SHAPE, 0),
        ((1, 5, 1), SHAPE, 1),
        ((1, 1, 1), SHAPE, 2),
        ((1, 1.15, 1), SHAPE, 2),
        ((3, 3, 1), SHAPE, 2),
        ((1, 1, 5), (4, 1, 6), 1),
        ((5, 1, 1), (9, 8, 1), 2),
        ((1, 1, 1), (1, 1, 1), 2),
    ],
)
def test_acquisition_axis(spacing, shape, axis):
    assert Geometry(shape, np.diag([*spacing, 1.0])).acquisition_axis == axis


@pytest.mark.parametrize(
    ("spacing", "shape", "axes"),
    [
        ((1, 1, 1), (20, 20, 20), (2, 1, 0)),
        ((1.1, 1, 1), (20, 20, 20), (2, 1, 0)),
        ((1, 1, 3), (20, 20, 20), (2,)),
        ((3, 1, 1), (20, 20, 20), (0,)),
        ((1, 1, 1), (20, 20, 1), (2,)),
        ((1, 1, 1), (20, 6, 20), (2,)),
    ],
)
def test_all_planes_only_of_volumes_with_nearly_cubic_voxels(spacing, shape, axes):
    geometry = Geometry(shape, np.diag([*spacing, 1.0]))
    assert geometry.slice_axes("all") == axes
    assert geometry.slice_axes("acquisition") == (geometry.acquisition_axis,)


def test_pictures_have_one_plane():
    assert Geometry((20, 20, 20), np.eye(4), in_space=False).slice_axes("all") == (2,)


@pytest.mark.parametrize(
    "affine",
    [np.zeros((4, 4)), np.diag([1.0, 1, 0, 1]), np.full((4, 4), np.nan), np.ones((4, 4)), np.eye(3)],
)
def test_unusable_affines(affine):
    with pytest.raises(InputError, match="affine"):
        Geometry(SHAPE, affine)


@pytest.mark.parametrize("shape", [(0, 3, 3), (3, 3), (3, 3, 3, 3)])
def test_empty_or_other_grids(shape):
    with pytest.raises(InputError, match="empty"):
        Geometry(shape, np.eye(4))


def test_affine_cannot_be_changed_afterwards():
    grid = oriented("RAS")
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 5


def test_text_tells_shape_spacing_and_axes():
    assert str(oriented("LPS")).startswith("4x5x6 voxels of 0.7 x 1.3 x 4 mm, axes LPS")
    assert str(Geometry((4, 5, 1), np.eye(4), in_space=False)) == "4x5x1 pixels"
