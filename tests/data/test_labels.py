import contextlib
import json
import string
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from samadapt.data.labels import (
    IGNORE,
    IGNORED_NAMES,
    LabelMap,
    class_names,
    draw_the_same,
    remap,
    resize_label,
    same_name,
    values_from_label_info,
)
from samadapt.errors import ConfigError, InputError

names = st.text(string.ascii_letters + "äé 0-9_", min_size=1, max_size=12).filter(
    lambda name: name.strip() and same_name(name) not in ("background", *IGNORED_NAMES)
)
name_lists = st.lists(names, min_size=1, max_size=40, unique_by=same_name)
HEART = LabelMap(("right ventricle", "myocardium", "left ventricle"))


# Label maps


@given(name_lists)
def test_every_form_means_the_same(labels):
    label_map = LabelMap(tuple(labels))
    indices = {name: n for n, name in enumerate(labels, start=1)}
    assert LabelMap.from_config(labels) == label_map
    assert LabelMap.from_config(indices) == label_map
    assert LabelMap.from_config(json.dumps(labels)) == label_map
    assert LabelMap.from_config(json.dumps({"background": 0, **indices})) == label_map
    assert LabelMap.from_config(dict(reversed(indices.items()))) == label_map
    assert LabelMap.from_config(label_map.to_dict()) == label_map
    assert [label_map.index(name) for name in labels] == list(range(1, len(labels) + 1))


def test_text_and_numbers_first():
    assert LabelMap.from_config("spleen, left  kidney ,liver").names == ("spleen", "left kidney", "liver")
    assert LabelMap.from_config({"2": "liver", "1": "spleen"}).names == ("spleen", "liver")
    assert LabelMap.from_config({0: "background", 1: "spleen"}).names == ("spleen",)


def test_a_name_that_is_a_number():
    assert LabelMap.from_config(["3", "1"]).names == ("3", "1")


def test_case_and_white_space_do_not_count():
    assert HEART.index(" Left   VENTRICLE ") == 3
    assert HEART.find("atrium") is None
    with pytest.raises(InputError, match=r"'atrium'.*right ventricle, myocardium"):
        HEART.index("atrium")


def test_thirty_and_more_classes():
    assert len(LabelMap.from_config([f"organ {n}" for n in range(104)])) == 104
    assert len(LabelMap(tuple(map(str, range(254))))) == 254


@pytest.mark.parametrize(
    "value",
    [
        [],
        "",
        " , ",
        ["spleen", ""],
        ["spleen", "Spleen"],
        ["spleen", " spleen "],
        ["background", "spleen"],
        {"Background": 1},
        ["spleen", "Ignore"],
        ["un labelled", "UNLABELLED "],
        {"spleen": 0},
        {"spleen": 2},
        {"spleen": 1, "liver": 1},
        {"spleen": 1, "liver": 3},
        {"spleen": 1.5},
        {"spleen": True},
        {"spleen": None},
        {"spleen": "liver"},
        {},
        [1, 2],
        [None],
        7,
        None,
        '{"spleen": 1',
        b"spleen",
        list(map(str, range(255))),
    ],
)
def test_what_is_no_label_map(value):
    with pytest.raises(ConfigError) as caught:
        LabelMap.from_config(value)
    assert caught.value.remedy


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
@settings(max_examples=60, deadline=None)
def test_anything_is_a_label_map_or_refused(value):
    with contextlib.suppress(ConfigError):
        assert len(LabelMap.from_config(value)) > 0


@pytest.mark.parametrize(
    "content", ['["spleen", "liver"]', '{"labels": {"spleen": 1, "liver": 2}}', '{"1": "spleen", "2": "liver"}']
)
def test_from_a_file(tmp_path, content):
    (tmp_path / "labels.json").write_text(content)
    assert LabelMap.from_json(tmp_path / "labels.json").names == ("spleen", "liver")


@pytest.mark.parametrize("content", ["", "[", "7", '{"labels": 3}', '["a", "a"]', b"\xff\xfe\x00"])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "labels.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        LabelMap.from_json(path)
    assert caught.value.where == str(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json"):
        LabelMap.from_json(tmp_path / "none.json")


def test_names_do_not_need_torch():
    code = "import sys, samadapt.data.labels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


# label_info


def test_label_info_as_slicer_sends_it():
    info = [{"name": "left ventricle", "idx": 1}, {"name": "Segment_1", "idx": 2}]
    assert values_from_label_info(info) == {1: "left ventricle", 2: "Segment_1"}


def test_label_info_with_background_and_text_numbers():
    info = [
        {"name": "background", "idx": 0},
        {"name": " a  b ", "idx": "2", "color": [1, 2, 3]},
        {"name": "c", "idx": 3.0},
    ]
    assert values_from_label_info(info) == {2: "a b", 3: "c"}


def test_two_segments_of_one_class():
    assert values_from_label_info([{"name": "node", "idx": 1}, {"name": "node", "idx": 2}]) == {1: "node", 2: "node"}


@pytest.mark.parametrize(
    "info",
    [
        None,
        {},
        "spleen",
        {"name": "spleen", "idx": 1},
        [None],
        ["spleen"],
        [{}],
        [{"idx": 1}],
        [{"name": "spleen"}],
        [{"name": "", "idx": 1}],
        [{"name": " ", "idx": 1}],
        [{"name": 3, "idx": 1}],
        [{"name": "spleen", "idx": 0}],
        [{"name": "spleen", "idx": -1}],
        [{"name": "spleen", "idx": 1.5}],
        [{"name": "spleen", "idx": "one"}],
        [{"name": "spleen", "idx": True}],
        [{"name": "spleen", "idx": 65536}],
        [{"name": "spleen", "idx": 10**30}],
        [{"name": "spleen", "idx": 1e30}],
        [{"name": "spleen", "idx": "1e30"}],
        [{"name": "spleen", "idx": 10**400}],
        [{"name": "spleen", "idx": None}],
        [{"name": "spleen", "idx": float("nan")}],
        [{"name": "spleen", "idx": float("inf")}],
        [{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 1}],
    ],
)
def test_malformed_label_info(info):
    with pytest.raises(InputError) as caught:
        values_from_label_info(info)
    assert caught.value.where == "label_info"


# Remapping


@given(name_lists, st.data())
@settings(max_examples=100, deadline=None)
def test_any_order_of_values_maps_by_name(labels, data):
    """A permuted label gives the same mask as one in the model's order."""
    label_map = LabelMap(tuple(labels))
    values = data.draw(st.permutations(range(1, len(labels) + 1)))
    truth = data.draw(arrays(np.uint8, (3, 4, 5), elements=st.integers(0, len(labels))))
    table = np.array([0, *values])
    mask, report = remap(table[truth], dict(zip(values, labels, strict=True)), label_map)
    np.testing.assert_array_equal(mask, truth)
    assert mask.dtype == np.uint8
    assert report.clean
    assert sum(report.mapped.values()) == (truth > 0).sum()


@given(
    arrays(np.int32, (4, 5), elements=st.integers(0, 70000)),
    st.dictionaries(st.integers(1, 70000), names, max_size=6),
    name_lists,
)
@settings(max_examples=100, deadline=None)
def test_every_voxel_is_accounted_for(mask, values, labels):
    label_map = LabelMap(tuple(labels))
    result, report = remap(mask, values, label_map)
    dropped = sum(report.extra.values()) + sum(report.unknown_values.values())
    assert (result > 0).sum() == sum(report.mapped.values())
    assert (result > 0).sum() + dropped == (mask > 0).sum()
    for value in np.unique(mask[result > 0]):
        assert same_name(values[int(value)]) in map(same_name, labels)
    assert set(report.absent) | set(report.empty) | set(report.mapped) == set(label_map.names)


MASK = np.array([[0, 1, 2], [3, 9, 1]])


def test_absent_extra_renamed_and_unknown_are_reported():
    values = {1: "LV", 2: "Myocardium", 3: "pericardium", 7: "aorta"}
    mask, report = remap(MASK, values, HEART, renames={"lv": "left ventricle"})
    np.testing.assert_array_equal(mask, [[0, 3, 2], [0, 0, 3]])
    assert report.mapped == {"myocardium": 1, "left ventricle": 2}
    assert report.renamed == {"LV": "left ventricle", "Myocardium": "myocardium"}
    assert report.absent == ("right ventricle",)
    assert report.extra == {"pericardium": 1, "aorta": 0}
    assert report.unknown_values == {9: 1}
    assert not report.clean
    assert str(report) == (
        "myocardium 1 voxels, left ventricle 2 voxels; "
        "renamed: 'LV' to 'left ventricle', 'Myocardium' to 'myocardium'; absent: right ventricle; "
        "not the model's labels, taken as background: 'pericardium' (1 voxels), 'aorta' (0 voxels); "
        "values without a name, taken as background: 9 (1 voxels)"
    )


def test_without_names_the_models_order_holds():
    mask, report = remap(MASK, None, HEART)
    np.testing.assert_array_equal(mask, [[0, 1, 2], [3, 0, 1]])
    assert report.unknown_values == {9: 1}
    assert remap(MASK * 0 + 2, None, HEART)[1].absent == ("right ventricle", "left ventricle")


def test_named_but_not_drawn_is_empty_not_absent():
    _, report = remap(MASK * 0, {1: "right ventricle"}, HEART)
    assert report.empty == ("right ventricle",)
    assert report.absent == ("myocardium", "left ventricle")
    assert str(report).startswith("no labelled voxel")


def test_no_names_given_means_nothing_is_known():
    mask, report = remap(MASK, {}, HEART)
    assert not mask.any()
    assert report.absent == HEART.names


def test_background_by_name_is_background():
    mask, report = remap(
        MASK, {1: "Background", 2: "myocardium", 3: "left ventricle", 9: "junk"}, HEART, {"junk": "background"}
    )
    np.testing.assert_array_equal(mask, [[0, 0, 2], [3, 0, 0]])
    assert report.extra == {}


def test_two_values_of_one_class_are_joined():
    mask, report = remap(MASK, {1: "myocardium", 2: "myocardium"}, HEART)
    np.testing.assert_array_equal(mask, [[0, 2, 2], [0, 0, 2]])
    assert report.mapped == {"myocardium": 3}


# What nobody has labelled


@given(arrays(np.uint8, (4, 5), elements=st.integers(0, 9)), st.sampled_from(["ignore", "UNLABELLED", " Unlabeled"]))
@settings(max_examples=50, deadline=None)
def test_a_segment_to_be_ignored_changes_nothing_else(mask, word):
    """However it is written; its voxels are no class, not dropped, and nothing but ignored."""
    named = {1: "myocardium", 2: "left ventricle", 3: "aorta"}
    plain, before = remap(np.where(mask == 7, 0, mask), named, HEART)
    result, report = remap(mask, {**named, 7: word}, HEART)
    np.testing.assert_array_equal(result, np.where(mask == 7, IGNORE, plain))
    assert report.ignored == (mask == 7).sum()
    assert (report.mapped, report.extra, report.unknown_values, report.absent) == (
        before.mapped,
        before.extra,
        before.unknown_values,
        before.absent,
    )
    assert 7 not in report.unknown_values


def test_without_names_255_is_what_nobody_has_labelled():
    mask, report = remap(np.array([0, 1, 255, 9]), None, HEART)
    np.testing.assert_array_equal(mask, [0, 1, IGNORE, 0])
    assert report.unknown_values == {9: 1}
    assert "1 voxels are left out" in str(report)
    mask, report = remap(np.array([0, 1, 255]), {1: "myocardium"}, HEART)
    np.testing.assert_array_equal(mask, [0, 2, 0])
    assert report.unknown_values == {255: 1}


def test_what_is_left_out_counts_as_nothing_else():
    left_out = np.array([[False, True, False], [False, True, False]])
    mask, report = remap(MASK, {1: "myocardium", 2: "left ventricle", 3: "aorta"}, HEART, left_out=left_out)
    np.testing.assert_array_equal(mask, [[0, IGNORE, 3], [0, IGNORE, 2]])
    assert report.mapped == {"myocardium": 1, "left ventricle": 1}
    assert report.extra == {"aorta": 1}
    assert report.unknown_values == {}
    assert report.ignored == 2


def test_names_of_classes():
    assert class_names(["b", "Background", "ignore", "a", " B "]) == ["b", "a"]
    assert class_names(["unlabelled"]) == []


def test_rename_to_a_class_that_is_not_there():
    with pytest.raises(InputError, match="'atrium', which is not a label of the model"):
        remap(MASK, {1: "x"}, HEART, renames={"x": "atrium"})


@pytest.mark.parametrize("mask", [MASK - 1, MASK.astype(float)])
def test_what_is_no_label(mask):
    with pytest.raises(InputError, match="whole numbers"):
        remap(mask, None, HEART)


def test_large_values():
    mask, report = remap(np.array([0, 100_000, 70_000]), {100_000: "myocardium"}, HEART)
    np.testing.assert_array_equal(mask, [0, 2, 0])
    assert report.unknown_values == {70_000: 1}


def test_the_label_itself_is_not_changed():
    before = MASK.copy()
    remap(MASK, {1: "myocardium"}, HEART)
    np.testing.assert_array_equal(MASK, before)


# Resizing


sides = st.integers(1, 12)


@given(st.data(), st.lists(sides, min_size=2, max_size=3), st.booleans())
@settings(max_examples=200, deadline=None)
def test_resizing_never_invents_a_class(data, shape, as_tensor):
    mask = data.draw(arrays(np.int64, shape, elements=st.sampled_from([0, 3, 8])))
    size = data.draw(st.lists(sides, min_size=len(shape), max_size=len(shape)))
    resized = resize_label(torch.from_numpy(mask) if as_tensor else mask, size)
    assert tuple(resized.shape) == tuple(size)
    assert set(np.unique(np.asarray(resized))) <= set(np.unique(mask))
    assert isinstance(resized, torch.Tensor) is as_tensor


@given(arrays(np.uint8, st.tuples(sides, sides)), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_enlarging_and_back_is_exact(mask, factor):
    large = resize_label(mask, [side * factor for side in mask.shape])
    np.testing.assert_array_equal(large, mask.repeat(factor, 0).repeat(factor, 1))
    np.testing.assert_array_equal(resize_label(large, mask.shape), mask)


@pytest.mark.parametrize("size", [(3,), (3, 3, 3), (0, 3)])
def test_impossible_sizes(size):
    with pytest.raises(InputError, match="cannot be resized"):
        resize_label(np.zeros((4, 4), int), size)


# Two labels of one image


@given(arrays(np.uint8, (3, 4, 2), elements=st.integers(0, 4)), st.permutations([1, 2, 3, 4]), name_lists)
def test_labels_draw_the_same_whatever_their_values(mask, order, called):
    called = [*called, *(f"other {n}" for n in range(4))]
    names = dict(zip([1, 2, 3, 4], called, strict=False))
    other_names = {value: names[n].upper() for n, value in enumerate(order, start=1)}
    other = np.array([0, *order], np.uint16)[mask]
    assert draw_the_same(mask, names, other, other_names)
    assert draw_the_same(mask, {}, mask.astype(np.int64), {})
    changed = other.copy()
    changed[1, 1, 1] = order[0] if changed[1, 1, 1] != order[0] else 0
    assert not draw_the_same(mask, names, changed, other_names)
    if mask.any():
        assert not draw_the_same(mask, names, other, {**other_names, other.max(): "renamed"})
