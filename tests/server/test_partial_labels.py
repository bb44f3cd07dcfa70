"""Partial labels, submitted to a real server: what the annotator is told, and what training makes of them."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import requests

from samadapt.data.cases import find_cases
from samadapt.data.coverage import Coverage
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.training.slices import read_case
from serving import Server, label_file, make_volumes

pytestmark = pytest.mark.e2e

LABELS = LabelMap(("anterior", "posterior", "tumour"))
INFO = [{"name": "posterior", "idx": 1}, {"name": "anterior", "idx": 2}]
BLOCKS = {1: ((5, 5, 5), (15, 15, 12)), 2: ((16, 5, 5), (25, 15, 12))}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    studies = make_volumes(tmp_path_factory.mktemp("partial") / "studies", 3)
    running = Server(studies, ("labels", ", ".join(LABELS.names))).start()
    yield running
    running.stop()


@pytest.fixture
def image(server):
    """An image without label."""
    first = sorted(requests.get(f"{server.url}/datastore/?output=all", timeout=30).json()["objects"])[0]
    requests.delete(f"{server.url}/datastore/label", params={"id": first, "tag": "final"}, timeout=30)
    return first


def submit(server, image, path, **params):
    return requests.put(
        f"{server.url}/datastore/label",
        params={"image": image},
        data={"params": json.dumps({"label_info": INFO, **params})},
        files={"label": ("label.nii.gz", path.read_bytes())},
        timeout=60,
    )


@pytest.fixture
def drawn(server, image, tmp_path):
    return label_file(tmp_path / "label.nii.gz", server.studies / f"{image}.nii.gz", BLOCKS)


def as_training_reads(server, image):
    case = next(case for case in find_cases(server.studies) if case.id == image)
    return case, *read_case(case, LABELS)


def test_slices_that_were_not_labelled_are_counted_and_left_out(server, image, drawn):
    reply = submit(server, image, drawn, labelled_slices=[7, 5, 6]).json()
    case, volume, label, _ = as_training_reads(server, image)
    axis = volume.geometry.acquisition_axis
    count = label.shape[axis]
    assert f"3 of {count} slices are labelled; nothing is learned from the others" in reply["warnings"]
    assert case.coverage == Coverage(slices=(5, 6, 7))
    known = (np.moveaxis(label, axis, 0) != IGNORE).any(axis=(1, 2))
    assert np.flatnonzero(known).tolist() == [5, 6, 7]
    assert {1, 2} <= set(np.unique(np.moveaxis(label, axis, 0)[[5, 6, 7]]))


def test_slices_with_a_drawing_are_the_labelled_ones_if_so_said(server, image, drawn):
    reply = submit(server, image, drawn, labelled_slices="nonempty").json()
    _, volume, label, _ = as_training_reads(server, image)
    axis = volume.geometry.acquisition_axis
    mask = np.moveaxis(np.asarray(nibabel.load(drawn).dataobj), axis, 0)
    labelled = np.flatnonzero(mask.any(axis=(1, 2)))
    assert any(text.startswith(f"{len(labelled)} of {len(mask)} slices") for text in reply["warnings"])
    known = np.flatnonzero((np.moveaxis(label, axis, 0) != IGNORE).any(axis=(1, 2)))
    np.testing.assert_array_equal(known, labelled)


def test_a_class_that_nobody_looked_for_is_named_and_unknown(server, image, drawn):
    reply = submit(server, image, drawn, labelled_classes=["anterior", "posterior"]).json()
    assert reply["warnings"] == ["the label does not speak of tumour: its background may be any of them"]
    case, _, label, report = as_training_reads(server, image)
    assert case.coverage == Coverage(classes=("anterior", "posterior"))
    assert report.unknown == ("tumour",)
    assert set(np.unique(label)) == {0, 1, 2}


def test_a_class_that_is_drawn_but_not_among_the_labelled_ones_is_reported(server, image, drawn):
    reply = submit(server, image, drawn, labelled_classes=["anterior"]).json()
    assert any("'posterior' is drawn but not among the labelled classes" in text for text in reply["warnings"])
    *_, label, report = as_training_reads(server, image)
    assert set(report.unknown) == {"posterior", "tumour"}
    assert set(np.unique(label)) == {0, LABELS.index("anterior")}


@pytest.mark.parametrize("name", ["ignore", "unlabelled"])
def test_the_ignore_segment_is_left_out_voxel_by_voxel(server, image, drawn, name):
    info = [INFO[0], {"name": name, "idx": 2}]
    reply = submit(server, image, drawn, label_info=info, labelled_classes="all")
    assert reply.status_code == 200
    assert reply.json()["warnings"] == []
    *_, label, _ = as_training_reads(server, image)
    submitted = np.asarray(nibabel.load(drawn).dataobj)
    np.testing.assert_array_equal(label == IGNORE, submitted == 2)
    np.testing.assert_array_equal(label == LABELS.index("posterior"), submitted == 1)


def test_a_complete_label_afterwards_is_complete(server, image, drawn):
    submit(server, image, drawn, labelled_slices=[5], labelled_classes=["anterior"])
    warnings = submit(server, image, drawn).json()["warnings"]
    assert [warning for warning in warnings if "is kept as a version" not in warning] == []
    case, _, label, report = as_training_reads(server, image)
    assert case.coverage == Coverage()
    assert report.unknown == ()
    assert not (label == IGNORE).any()


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ({"labelled_slices": [10_000]}, "labelled_slices"),
        ({"labelled_slices": [-1]}, "labelled_slices"),
        ({"labelled_slices": "some"}, "labelled_slices"),
        ({"labelled_slices": []}, "labelled_slices"),
        ({"labelled_slices": {"1": True}}, "labelled_slices"),
        ({"labelled_classes": "anterior"}, "labelled_classes"),
        ({"labelled_classes": [3]}, "labelled_classes"),
        ({"labelled_classes": []}, "labelled_classes"),
    ],
)
def test_what_cannot_be_understood_is_refused_and_nothing_stored(server, image, drawn, said, where):
    reply = submit(server, image, drawn, **said)
    assert reply.status_code in range(400, 500), reply.text
    body = reply.json()
    assert body["where"] == where
    assert body["what"]
    assert body["remedy"]
    assert not list((server.studies / "labels" / "final").glob("*"))
    assert not list((server.studies / "labels" / "final").glob(".*"))
    stored = requests.get(f"{server.url}/datastore/?output=all", timeout=30).json()["objects"][image]["labels"]
    assert "final" not in stored


def test_a_refused_correction_leaves_the_label_before_it(server, image, drawn, tmp_path):
    submit(server, image, drawn, labelled_slices=[5, 6])
    other = label_file(tmp_path / "other.nii.gz", server.studies / f"{image}.nii.gz", {1: BLOCKS[2]})
    assert submit(server, image, other, labelled_slices=[10_000]).status_code in range(400, 500)
    case, *_ = as_training_reads(server, image)
    assert case.coverage == Coverage(slices=(5, 6))
    np.testing.assert_array_equal(nibabel.load(case.label).get_fdata(), nibabel.load(drawn).get_fdata())


def test_settings_say_it_for_labels_that_do_not(tmp_path):
    studies = make_volumes(tmp_path / "studies", 1)
    server = Server(studies, ("unlabelled_slices", "ignore"), ("labels", ", ".join(LABELS.names))).start()
    try:
        path = next(studies.glob("*.nii.gz"))
        image = path.name.removesuffix(".nii.gz")
        label = label_file(tmp_path / "label.nii.gz", path, BLOCKS)
        assert any("slices are labelled" in text for text in submit(server, image, label).json()["warnings"])
    finally:
        server.stop()
