"""Volumes that OHIF sees as DICOM series: what is drawn on a series is its case's label, and clicks fall in place."""

from __future__ import annotations

import gzip
import json
import time

import nibabel
import numpy as np
import pytest
import requests
from dicomweb_client.api import DICOMwebClient

from phantoms import octants
from samadapt.data.cases import find_cases
from samadapt.data.dicom import series_grid
from samadapt.data.geometry import turn_to_series
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.data.volume import read_label, read_volume
from samadapt.dicomweb.converted import convert_all, folder_in, records
from samadapt.errors import InputError
from samadapt.server.offered import OfferedDatastore
from samadapt.training.slices import read_case
from serving import ServeCommand

TURNED = np.array([[0.8, -0.6, 0], [0.48, 0.64, -0.6], [0.36, 0.48, 0.8]])
GRIDS = {
    "right": np.diag([-0.75, -0.5, 2.0]),
    "left": np.diag([0.75, -0.5, 2.0]),
    "oblique": TURNED @ np.diag([0.75, 0.5, -2.0]),
    "sagittal": np.diag([3.0, 0.5, -0.75]),
}
SHAPE = (14, 22, 18)
NAMES = LabelMap(("first", "second"))
INFO = [{"name": "second", "idx": 2}, {"name": "first", "idx": 5}]


def write_cases(folder):
    folder.mkdir()
    for name, directions in GRIDS.items():
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = directions, (-20.25, 13.5, 40.125)
        values = np.random.default_rng(3).normal(100, 10, SHAPE)
        values[2:7, 4:12, 5:11] += 300  # nowhere near the middle
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), folder / f"{name}.nii.gz")
    return folder


def drawn(turn):
    return octants(turn.turned.shape)


def check_trained_label(folder, case, mask, turn):
    """What training reads equals ``mask`` (on the series' grid), name for name."""
    found = next(one for one in find_cases(folder) if one.id == case)
    label = read_case(found, NAMES)[1]
    expected = turn.back(np.select([mask == 5, mask == 2], [1, 2], 0))
    assert expected.any()
    assert (label == expected).all()


@pytest.fixture
def store(tmp_path):
    folder = write_cases(tmp_path / "studies")
    convert_all(folder, lambda files: None)
    return OfferedDatastore(str(folder))


def raw(tmp_path, mask):
    path = tmp_path / "label.bin.gz"
    path.write_bytes(gzip.compress(mask.tobytes(order="F")))
    return str(path)


@pytest.mark.parametrize("case", GRIDS)
def test_raw_voxels_of_a_series_are_the_label_of_its_case(store, case, tmp_path):
    series, turn = store.series_of(case).series, turn_to_series(read_volume(store.image_path(case)).geometry)
    mask = drawn(turn)
    assert store.save_label(series, raw(tmp_path, mask), "final", {"label_info": INFO}) == case
    check_trained_label(store.folder, case, mask, turn)

    frames = list(store.series_of(case).instances)
    shuffled = np.random.default_rng(1).permutation(len(frames))
    other = mask[:, :, ::-1].copy()
    named = {"label_info": INFO, "slices": [frames[n] for n in shuffled]}
    store.save_label(series, raw(tmp_path, other[:, :, shuffled]), "final", named)
    check_trained_label(store.folder, case, other, turn)
    with pytest.raises(InputError, match="images of the series"):
        store.save_label(series, raw(tmp_path, other), "final", {**named, "slices": ["1.2"] * len(frames)})


@pytest.mark.parametrize("case", GRIDS)
def test_labelled_slices_are_those_that_the_viewer_shows(store, case, tmp_path):
    series, turn = store.series_of(case).series, turn_to_series(read_volume(store.image_path(case)).geometry)
    mask = np.zeros(turn.turned.shape, np.uint8)
    mask[2:4, 3:6, 0], mask[1, 1, 2] = 5, 2
    info = {"label_info": INFO, "labelled_slices": [0, 2]}
    store.save_label(series, raw(tmp_path, mask), "final", info)
    found = next(one for one in find_cases(store.folder) if one.id == case)
    label = turn.forward(read_case(found, NAMES)[1])
    assert (label[2:4, 3:6, 0] == 1).all()
    assert label[1, 1, 2] == 2
    others = [k for k in range(mask.shape[2]) if k not in (0, 2)]
    assert (label[..., others] == IGNORE).all()
    assert (label[..., [0, 2]] <= 2).all()
    assert store.in_series(case, store.in_series(case, [0, 2, 99])) == [0, 2, 99]


def test_unknown_names_stay_unknown_and_files_win_over_series(store, tmp_path):
    with pytest.raises(InputError, match="there is no image"):
        store.image_path("1.2.3.4")
    assert store.get_image_info("left")["SeriesInstanceUID"] == store.series_of("left").series
    assert store.case_of("left") == "left"


def wait_for_series(server, count, seconds=60):
    client = DICOMwebClient(f"{server.url}/proxy/dicom", qido_url_prefix="qido", wado_url_prefix="wado")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = client.search_for_series()
        if len(found) == count:
            return client, found
        time.sleep(0.3)
    raise AssertionError(f"{len(found)} series after {seconds} s")


def segment(server, image, params):
    """The mask as OHIF reads it: raw bytes, i fastest, and nothing of the header but the size."""
    words = {"params": {"image": image, "output": "image"}, "data": {"params": json.dumps(params)}}
    answer = requests.post(f"{server.url}/infer/samadapt_click_3d", **words, timeout=120)
    answer.raise_for_status()
    header, _, data = answer.content.partition(b"\n\n")
    (sizes,) = [line for line in header.decode().splitlines() if line.startswith("sizes")]
    shape = [int(n) for n in sizes.split(":")[1].split()]
    return np.frombuffer(data, np.uint8).reshape(shape, order="F")


@pytest.mark.e2e
def test_a_folder_of_volumes_is_labelled_in_ohif(tmp_path):
    folder = write_cases(tmp_path / "studies")
    server = ServeCommand(folder, ("labels", "first,second"), ("image_size", "64")).start()
    try:
        client, found = wait_for_series(server, len(GRIDS))
        assert {one["00100020"]["Value"][0] for one in found} == set(GRIDS)  # PatientID
        shows = {one["0008103E"]["Value"][0]: one["0020000E"]["Value"][0] for one in found}
        for case, series in shows.items():
            volume = read_volume(folder / f"{case}.nii.gz")
            turn = turn_to_series(volume.geometry)
            study = next(one["0020000D"]["Value"][0] for one in found if one["0020000E"]["Value"][0] == series)
            images = client.retrieve_series(study, series)
            assert series_grid(images, series).geometry.matches(turn.turned)
            with_raw = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
            click = [[4, 8, 8]]
            there = turn.voxels_forward(click).astype(int).tolist()
            by_case, by_series = (
                segment(server, image, {**with_raw, "foreground": at}) for image, at in ((case, click), (series, there))
            )
            assert by_case.any()
            assert (by_series == turn.forward(by_case)).all()
            mask = drawn(turn)
            sent = requests.put(
                f"{server.url}/samadapt/label",
                params={"image": series},
                data={"params": json.dumps({"label_info": INFO, "slices": [str(one) for one in slices_of(images)]})},
                files={"label": ("label.bin", mask.tobytes(order="F"))},
                timeout=60,
            )
            assert sent.status_code == 200, sent.text
            assert sent.json()["label"] == case
            check_trained_label(folder, case, mask, turn)
            assert requests.get(f"{server.url}/samadapt/series/{series}", timeout=30).json()["state"] == "ready"
            label = requests.get(f"{server.url}/datastore/label", params={"label": series, "tag": "final"}, timeout=30)
            (tmp_path / "label.nii.gz").write_bytes(label.content)
            assert (turn.forward(read_label(tmp_path / "label.nii.gz", volume.geometry)) == mask).all()
        wrong = requests.post(f"{server.url}/infer/samadapt", params={"image": "1.2.3"}, timeout=30)
        assert 400 <= wrong.status_code < 500
    finally:
        server.stop()


def slices_of(images):
    return [uid for uid, _ in series_grid(images, "series").frames]


@pytest.mark.e2e
def test_the_next_sample_can_be_opened_in_ohif(tmp_path):
    folder = write_cases(tmp_path / "studies")
    server = ServeCommand(folder, ("labels", "first,second"), ("image_size", "64")).start()
    try:
        wait_for_series(server, len(GRIDS))
        known = {record.case: record for record in records(folder_in(folder))}
        for strategy in ("random", "first"):
            sample = requests.post(f"{server.url}/activelearning/{strategy}", json={}, timeout=60).json()
            record = known[sample["id"]]
            assert (sample["StudyInstanceUID"], sample["SeriesInstanceUID"]) == (record.study, record.series)
            assert sample["PatientID"] == sample["id"]
            assert len(sample["series_slices"]) == len(sample["slices"])
        listed = requests.get(f"{server.url}/datastore/?output=all", timeout=30).json()["objects"]
        assert set(listed) == set(GRIDS)
    finally:
        server.stop()
