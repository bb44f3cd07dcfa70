"""What a label covers: read from a submission, and brought to voxels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from samadapt.data.coverage import ALL, NAMED, NONEMPTY, UNSAID, Coverage, remap_covered
from samadapt.data.labels import IGNORE, LabelMap, remap
from samadapt.errors import InputError

LABELS = LabelMap(("spleen", "liver", "kidney"))
NAMES = {4: "liver", 2: "spleen", 9: "aorta"}
SHAPE = (4, 5, 6)
labels_as_submitted = arrays(np.uint16, SHAPE, elements=st.sampled_from([0, 0, 0, 2, 4, 9]))


@pytest.mark.parametrize(
    ("info", "coverage"),
    [
        ({}, UNSAID),
        ({"labelled_slices": None, "labelled_classes": None}, UNSAID),
        ({"labelled_slices": [3, 1, 1]}, Coverage(slices=(1, 3))),
        ({"labelled_slices": ["2", 1.0]}, Coverage(slices=(1, 2))),
        ({"labelled_slices": "nonempty"}, Coverage(slices=NONEMPTY)),
        ({"labelled_slices": "all", "labelled_classes": "all"}, Coverage(ALL, ALL)),
        ({"labelled_classes": ["liver", " left  kidney "]}, Coverage(classes=("liver", "left kidney"))),
        ({"labelled_classes": "named"}, Coverage(classes=NAMED)),
    ],
)
def test_what_a_submission_says(info, coverage):
    assert Coverage.from_info(info) == coverage


@pytest.mark.parametrize("value", [[], {}, "some", "1,2", 3, True, [True], [-1], [1.5], [None], ["x"], [[1]], {"a": 1}])
def test_what_names_no_slices(value):
    with pytest.raises(InputError) as caught:
        Coverage.from_info({"labelled_slices": value})
    assert caught.value.where == "labelled_slices"
    assert caught.value.http_status in range(400, 500)


@pytest.mark.parametrize("value", [[], {}, "liver", 3, [3], [""], [" "], [None], [["liver"]], {"liver": 1}])
def test_what_names_no_classes(value):
    with pytest.raises(InputError) as caught:
        Coverage.from_info({"labelled_classes": value})
    assert caught.value.where == "labelled_classes"


def test_what_a_label_says_itself_counts_more_than_what_is_assumed():
    assumed = Coverage(NONEMPTY, NAMED)
    assert UNSAID.or_else(assumed) == assumed
    assert Coverage(slices=(1,)).or_else(assumed) == Coverage((1,), NAMED)
    assert Coverage(ALL, ALL).or_else(assumed) == Coverage(ALL, ALL)


def test_a_mask_of_0_and_255_without_names_is_no_label():
    """As drawing programs write masks. Taken for "not labelled", it would teach nothing, and nobody would know."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 1:3] = IGNORE
    with pytest.raises(InputError, match="255") as caught:
        remap_covered(mask, None, LABELS, UNSAID, 2)
    assert "1" in caught.value.remedy
    assert remap_covered(mask, {IGNORE: "liver"}, LABELS, UNSAID, 2)[1].mapped == {"liver": 24}
    mask[0] = 1
    _, report = remap_covered(mask, None, LABELS, UNSAID, 2)
    assert (report.mapped, report.ignored) == ({"spleen": 30}, 24)
    assert not remap_covered(0 * mask, None, LABELS, UNSAID, 2)[0].any()


@given(labels_as_submitted, st.sets(st.integers(0, 3), min_size=1), st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_other_slices_are_ignored_whatever_they_show(label, numbers, axis):
    """And what they show changes nothing: neither the mask nor what is reported."""
    whole, _ = remap(label, NAMES, LABELS)
    numbers = sorted(numbers)
    others = np.ones(SHAPE[axis], bool)
    others[numbers] = False
    expected = whole.copy()
    np.moveaxis(expected, axis, 0)[others] = IGNORE
    coverage = Coverage(slices=tuple(numbers))
    mask, report = remap_covered(label, NAMES, LABELS, coverage, axis)
    np.testing.assert_array_equal(mask, expected)
    assert report.slices == ((len(numbers), SHAPE[axis]) if others.any() else None)
    scribbled = label.copy()
    np.moveaxis(scribbled, axis, 0)[others] = 4
    again, same = remap_covered(scribbled, NAMES, LABELS, coverage, axis)
    np.testing.assert_array_equal(again, mask)
    assert same == report


@given(labels_as_submitted, st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_nonempty_slices_are_those_in_which_anything_is_drawn(label, axis):
    """Also what the model does not know: somebody has looked at that slice."""
    drawn = np.flatnonzero(label.any(axis=tuple({0, 1, 2} - {axis})))
    nonempty = remap_covered(label, NAMES, LABELS, Coverage(slices=NONEMPTY), axis)
    if len(drawn):
        told = remap_covered(label, NAMES, LABELS, Coverage(slices=tuple(drawn.tolist())), axis)
        np.testing.assert_array_equal(nonempty[0], told[0])
        assert nonempty[1] == told[1]
    else:
        assert (nonempty[0] == IGNORE).all()


def test_an_ignored_segment_does_not_make_a_slice_labelled():
    label = np.zeros(SHAPE, int)
    label[:, :, 1], label[:, :, 2] = 7, 2
    mask, report = remap_covered(label, {7: "ignore", 2: "spleen"}, LABELS, Coverage(slices=NONEMPTY), axis=2)
    assert [int(value) for value in mask[0, 0]] == [IGNORE, IGNORE, 1, IGNORE, IGNORE, IGNORE]
    assert report.partly == "1 of 6 slices are labelled"


def test_a_slice_that_the_image_does_not_have():
    with pytest.raises(InputError, match=r"no slice 4.*0 to 3") as caught:
        remap_covered(np.zeros(SHAPE, int), NAMES, LABELS, Coverage(slices=(1, 4)), axis=0)
    assert caught.value.where == "labelled_slices"


@pytest.mark.parametrize(
    ("classes", "unknown"),
    [
        (None, ()),
        (ALL, ()),
        (NAMED, ("kidney",)),
        (("LIVER", "kidney"), ("spleen",)),
        (("aorta",), ("spleen", "liver", "kidney")),
    ],
)
def test_classes_that_nobody_has_looked_for(classes, unknown):
    label = np.zeros(SHAPE, int)
    label[0], label[1] = 2, 4
    mask, report = remap_covered(label, NAMES, LABELS, Coverage(classes=classes), axis=2)
    assert report.unknown == unknown
    assert set(report.mapped) == {"spleen", "liver"} - set(unknown)
    whole, _ = remap(label, NAMES, LABELS)
    forgotten = [LABELS.index(name) for name in unknown]
    np.testing.assert_array_equal(mask, np.where(np.isin(whole, forgotten), 0, whole))
    assert all(name in report.partly for name in unknown)


def test_named_classes_of_a_label_without_names_are_those_that_it_shows():
    label = np.zeros(SHAPE, int)
    label[0] = 2
    _, report = remap_covered(label, None, LABELS, Coverage(classes=NAMED), axis=2)
    assert report.unknown == ("spleen", "kidney")
    assert report.clean


@given(labels_as_submitted)
@settings(max_examples=20, deadline=None)
def test_a_label_that_says_nothing_is_whole(label):
    mask, report = remap_covered(label, NAMES, LABELS, UNSAID, axis=1)
    expected, before = remap(label, NAMES, LABELS)
    np.testing.assert_array_equal(mask, expected)
    assert report == before
    assert report.partly == ""
