"""The label that an image has: who drew what, its voxels as viewers show them, its versions, and who replaces whose."""

from __future__ import annotations

import gzip
import json

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
import requests
from pydicom.uid import generate_uid

from pacs import make
from phantoms import KINDS, octants, write_phantom
from samadapt.data.dicom import dicom_files, read_series, series_grid
from samadapt.data.dicom_seg import write_seg
from samadapt.data.geometry import turn_to_series
from samadapt.data.volume import read_volume
from samadapt.dicomweb.converted import convert_all, folder_in, records
from serving import Server

pytestmark = pytest.mark.e2e

INFO = [{"name": "liver", "idx": 2}, {"name": "our own", "idx": 5}, {"name": "not there", "idx": 7}]


class Studies:
    """A server; what is asked of it is the same over a folder and over a PACS.

    Attributes:
        image: by which viewers call the image.
        shape: of the volume that they show.
        folder: with the series' files; ``pacs``: which holds it; None over a folder of volumes.
    """

    def __init__(self, server, image, shape):
        self.server, self.image, self.shape = server, image, shape
        self.folder = self.pacs = None

    def mask(self, seed=0):
        return np.roll(octants(self.shape), seed, axis=0)

    def submit(self, mask, image=None, **params):
        return requests.put(
            f"{self.server.url}/samadapt/label",
            params={"image": image or self.image},
            data={"params": json.dumps({"label_info": INFO, **params})},
            files={"label": ("label.bin.gz", gzip.compress(mask.tobytes(order="F")))},
            timeout=120,
        )

    def get(self, path="", **query):
        return requests.get(
            f"{self.server.url}/samadapt/label{path}", params={"image": self.image, **query}, timeout=120
        )

    def label(self):
        answer = self.get()
        answer.raise_for_status()
        return answer.json()["label"]

    def versions(self):
        return self.get("/versions").json()["versions"]

    def shown(self, folder, **query):
        """A label's voxels as a viewer reads them (raw bytes, i fastest), and its names."""
        answer = self.get("/mask", **query)
        answer.raise_for_status()
        path = folder / "shown.nrrd"
        path.write_bytes(answer.content)
        header = nrrd.read_header(str(path))
        assert header["encoding"] == "raw"
        data = answer.content[-int(np.prod(header["sizes"])) :]
        return np.frombuffer(data, np.uint8).reshape(header["sizes"], order="F"), json.loads(header["label_names"])

    def restore(self, version, **body):
        return requests.post(
            f"{self.server.url}/samadapt/label/restore",
            params={"image": self.image, "version": version},
            json=body,
            timeout=120,
        )


def over_folder(folder):
    """A sagittal file, whose series has its slices elsewhere."""
    studies = folder / "studies"
    studies.mkdir()
    affine = np.diag([3.0, 0.5, -0.75, 1.0])
    values = np.random.default_rng(3).normal(100, 10, (9, 12, 10)).astype(np.float32)
    for name in ("case", "other"):
        nibabel.save(nibabel.Nifti1Image(values, affine), studies / f"{name}.nii.gz")
    convert_all(studies, lambda files: None)
    series = {record.case: record.series for record in records(folder_in(studies))}
    shape = turn_to_series(read_volume(studies / "case.nii.gz").geometry).turned.shape
    return Studies(Server(studies).start(), series["case"], shape), lambda: None


def over_pacs(folder):
    pacs = make("embedded").start()
    uid = generate_uid()
    pacs.upload(write_phantom(folder / "ct", KINDS["oblique"], SeriesInstanceUID=uid))
    cache = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache")}
    server = Server(pacs.url, log=folder / "server.log", **cache).start()
    made = Studies(server, uid, read_series(folder / "ct").array.shape)
    made.folder, made.pacs = folder / "ct", pacs
    return made, pacs.stop


@pytest.fixture(scope="module", params=[over_folder, over_pacs])
def studies(request, tmp_path_factory):
    made, end = request.param(tmp_path_factory.mktemp("stored"))
    yield made
    made.server.stop()
    end()


def test_first_there_is_no_label(studies):
    assert studies.label() is None
    assert studies.versions() == []
    answer = studies.get("/mask")
    assert answer.status_code == 404
    assert answer.json()["remedy"]


def test_a_label_is_described_and_comes_back_as_it_was_sent(studies, tmp_path):
    mask = studies.mask()
    mask[:, :, 1] = 0
    said = {"client_id": "c-1", "author": "Anna", "labelled_slices": [0, 2, 3]}
    assert studies.submit(mask, **said).status_code == 200
    label = studies.label()
    assert label["slices"] == np.flatnonzero(mask.any(axis=(0, 1))).tolist()
    assert label["labelled_slices"] == [0, 2, 3]
    assert label["structures"] == ["liver", "our own"]
    assert (label["author"], label["client_id"], label["served"]) == ("Anna", "c-1", True)
    assert studies.versions()[0]["name"] == label["name"]
    shown, names = studies.shown(tmp_path)
    assert np.array_equal(shown, mask)
    assert names == {"2": "liver", "5": "our own"}


def test_earlier_labels_can_be_seen_and_count_again(studies, tmp_path):
    first, second = studies.mask(1), studies.mask(2)
    studies.submit(first, author="Anna", labelled_slices=[0, 1])
    kept = studies.label()["name"]
    studies.submit(second, author="Ben")
    before = studies.versions()
    assert (kept, "Anna", False) in [(one["name"], one["author"], one["served"]) for one in before]  # the name stays
    assert np.array_equal(studies.shown(tmp_path, version=kept)[0], first)
    answer = studies.restore(kept, author="Cleo")
    assert answer.status_code == 200
    assert any("Ben" in warning for warning in answer.json()["warnings"])
    label = studies.label()
    assert (label["author"], label["restored"], label["labelled_slices"]) == ("Cleo", kept, [0, 1])
    assert np.array_equal(studies.shown(tmp_path)[0], first)
    after = studies.versions()
    assert len(after) == len(before) + 1
    assert {version["name"] for version in after} > {version["name"] for version in before}
    assert studies.restore(after[0]["name"]).status_code == 400  # it counts already


@pytest.mark.parametrize("version", ["nothing", "../../labels/final/case", "..", ""])
def test_unknown_versions_are_told(studies, version):
    studies.submit(studies.mask())
    for answer in (studies.get("/mask", version=version), studies.restore(version)):
        assert answer.status_code == 404
        assert answer.json()["where"] == "version"
        assert answer.json()["remedy"]


@pytest.mark.parametrize("image", ["1.2.3", "../../etc/passwd", "x", ""])
def test_unknown_images_are_told(studies, image):
    for path in ("", "/mask"):
        answer = studies.get(path, image=image)
        assert answer.status_code in (400, 404)
        assert answer.json()["where"] == "image"
        assert answer.json()["remedy"]


def test_nobody_replaces_a_label_that_they_do_not_know_of(studies, tmp_path):
    studies.submit(studies.mask(1), author="Anna")
    opened = studies.label()["name"]
    assert studies.submit(studies.mask(2), author="Ben", based_on=opened).status_code == 200
    before = studies.versions()
    for base in (opened, None, "another"):
        answer = studies.submit(studies.mask(3), author="Cleo", based_on=base)
        assert answer.status_code == 409
        assert answer.json()["where"] == "based_on"
        assert "Ben" in answer.json()["what"]
    assert studies.restore(opened, based_on=opened).status_code == 409
    assert studies.versions() == before
    assert np.array_equal(studies.shown(tmp_path)[0], studies.mask(2))
    assert studies.submit(studies.mask(3), author="Cleo", based_on=before[0]["name"]).status_code == 200
    kept = [one["name"] for one in studies.versions()]
    assert kept[0] not in [one["name"] for one in before]
    assert set(kept) == {kept[0], *(one["name"] for one in before)}
    assert studies.submit(studies.mask(3), based_on=3).status_code == 400


def test_who_says_nothing_is_taken_and_told_whose_label_it_was(studies):
    studies.submit(studies.mask(1), author="Anna")
    answer = studies.submit(studies.mask(2))
    assert answer.status_code == 200
    assert any("Anna" in warning and "kept" in warning for warning in answer.json()["warnings"])


@pytest.mark.parametrize("author", [3, "x" * 65, ["Anna"]])
def test_an_author_is_a_short_text(studies, author):
    answer = studies.submit(studies.mask(), author=author)
    assert answer.status_code == 400
    assert answer.json()["where"] == "author"


def test_a_label_that_no_viewer_can_show_says_so(studies):
    mask = studies.mask().astype("<u2") * 100
    assert studies.submit(mask, label_info=[{"name": "liver", "idx": 200}, {"name": "our own", "idx": 500}]).ok
    answer = studies.get("/mask")
    assert answer.status_code == 400
    assert "above 255" in answer.json()["what"]
    assert studies.label()["structures"] == ["liver", "our own"]


def test_names_that_are_not_drawn_anywhere_leave_the_list(studies):
    mask = studies.mask()
    renamed = [{"name": "lever", "idx": 2}, {"name": "our own", "idx": 5}]
    assert "lever" in studies.submit(mask, label_info=renamed).json()["labels"]
    labels = studies.submit(mask).json()["labels"]
    assert "lever" not in labels
    assert "not there" not in labels  # listed, and not drawn
    assert {"liver", "our own"} <= labels.keys()


def test_a_label_that_another_program_stored_is_told_and_shown(studies, tmp_path):
    if studies.pacs is None:
        pytest.skip("over a PACS")
    studies.submit(studies.mask())
    mask = studies.mask(4)
    images = [pydicom.dcmread(path) for path in dicom_files(studies.folder)]
    seg = write_seg(mask, {2: "liver", 5: "our own"}, series_grid(images, "ct"), images)
    seg.Manufacturer = "another program"
    seg.ContentDate = seg.InstanceCreationDate = seg.SeriesDate = "20400101"
    (tmp_path / "seg").mkdir()
    seg.save_as(tmp_path / "seg" / "seg.dcm", write_like_original=False)
    studies.pacs.upload(tmp_path / "seg")
    opened = studies.versions()[0]["name"]
    studies.server.stop()
    studies.server.start()  # it asks the PACS anew
    label = studies.label()
    assert label["source"] == "SEG in the PACS"
    assert sorted(label["structures"]) == ["liver", "our own"]
    shown, names = studies.shown(tmp_path)
    for value, name in names.items():
        assert np.array_equal(shown == int(value), mask == {"liver": 2, "our own": 5}[name])
    assert studies.submit(mask, based_on=opened).status_code == 409
