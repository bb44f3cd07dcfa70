"""Options of a request as viewers send them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samadapt.data.labels import LabelMap
from samadapt.errors import InputError
from samadapt.server import options

SHAPE = (10, 20, 30)
LABELS = LabelMap(("anterior", "posterior"))


def test_points_as_lists_or_text():
    assert options.points({"foreground": [[1, 2, 3], [4.0, 5.4, 6.6]]}, "foreground", SHAPE) == [(1, 2, 3), (4, 5, 7)]
    assert options.points({"foreground": "[[1,2,3]]"}, "foreground", SHAPE) == [(1, 2, 3)]
    assert options.points({}, "foreground", SHAPE) == []
    assert options.points({"foreground": ""}, "foreground", SHAPE) == []


def test_a_flat_image_may_leave_out_k():
    assert options.points({"foreground": [[1, 2]]}, "foreground", (5, 5, 1)) == [(1, 2, 0)]
    with pytest.raises(InputError):
        options.points({"foreground": [[1, 2]]}, "foreground", SHAPE)


@pytest.mark.parametrize(
    "value", [[1, 2, 3], [[1, 2]], "[[1,2", {"a": 1}, 5, [["x", 1, 2]], [[float("nan"), 1, 2]], [None], "null!"]
)
def test_malformed_points(value):
    with pytest.raises(InputError) as caught:
        options.points({"foreground": value}, "foreground", SHAPE)
    assert caught.value.where == "foreground"
    assert caught.value.remedy


@pytest.mark.parametrize("voxel", [[-1, 0, 0], [10, 0, 0], [0, 20, 0], [0, 0, 30], [1e300, 0, 0]])
def test_points_outside(voxel):
    with pytest.raises(InputError, match="outside the image of \\[10, 20, 30\\]"):
        options.points({"background": [voxel]}, "background", SHAPE)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=2), st.booleans())
def test_a_box_may_be_unordered(corners, as_text):
    roi = [*corners, 3, 1, 0, 29]
    found = options.box({"roi": json.dumps(roi) if as_text else roi}, SHAPE)
    assert found == (min(corners), max(corners), 1, 3, 0, 29)


def test_a_box_is_cut_to_the_image():
    assert options.box({"roi": [-5, 99, 3.4, 2.6, 40, 28]}, SHAPE) == (0, 9, 3, 3, 28, 29)
    assert options.box({"roi": []}, SHAPE) is None
    assert options.box({}, SHAPE) is None


@pytest.mark.parametrize("roi", [[1, 2, 3], [1, 2, 3, 4, 5, "x"], "1,2,3,4,5,6", [20, 30, 0, 1, 0, 1], 7])
def test_bad_boxes(roi):
    with pytest.raises(InputError) as caught:
        options.box({"roi": roi}, SHAPE)
    assert caught.value.where == "roi"


@pytest.mark.parametrize("prompt", [[2], ["posterior"], "[2]", "2", "posterior", 2])
def test_label_prompt_by_index_name_or_text(prompt):
    assert options.label_names({"label_prompt": prompt}, LABELS) == ["posterior"]


@pytest.mark.parametrize("prompt", [None, [], "", "[]"])
def test_no_label_prompt_means_all(prompt):
    assert options.label_names({"label_prompt": prompt}, LABELS) is None


@pytest.mark.parametrize("prompt", [[0], [3], ["posteriour"], "anterior,tail", [[1]], [True]])
def test_unknown_label_prompts_name_the_known_ones(prompt):
    with pytest.raises(InputError) as caught:
        options.label_names({"label_prompt": prompt}, LABELS)
    assert "anterior, posterior" in caught.value.remedy


def test_slice():
    assert options.slice_index({"slice": "3"}, 10) == 3
    assert options.slice_index({"slice": 0}, 10) == 0
    assert options.slice_index({"slice": None}, 10) is None
    for bad in (10, -1, "x"):
        with pytest.raises(InputError):
            options.slice_index({"slice": bad}, 10)


def test_mask_format():
    wanted = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": "false"}
    assert options.mask_format(wanted, default_extension=".png") == options.MaskFormat(".nrrd", "uint8", False)
    assert options.mask_format({}, default_extension=".png") == options.MaskFormat(".png", "uint8", True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("result_extension", ".stl"),
        ("result_extension", "/../x.nrrd"),
        ("result_dtype", "f4"),
        ("result_compress", "?"),
    ],
)
def test_bad_mask_formats(key, value):
    with pytest.raises(InputError) as caught:
        options.mask_format({key: value}, default_extension=".nii.gz")
    assert caught.value.where == key
