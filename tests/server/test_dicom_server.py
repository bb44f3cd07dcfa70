"""The server over a PACS: what viewers see of series, labels and waiting."""

import gzip
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pydicom.uid import generate_uid

from pacs import BACK_ENDS, MARKS, make
from phantoms import KINDS, Kind, octants, write_phantom
from samadapt.data.dicom import dicom_files, read_series, series_grid
from samadapt.data.dicom_seg import write_seg
from serving import Server

pytestmark = pytest.mark.e2e

LABEL_INFO = [{"name": "liver", "idx": 2}, {"name": "our own", "idx": 5}]


class Hospital:
    """A PACS with a CT, an MR, a series with a hole, and a server over it."""

    def __init__(self, back_end, folder):
        self.pacs = make(back_end).start()
        self.uids = {name: generate_uid() for name in ("ct", "mr", "holed", "long")}
        study = generate_uid()
        kinds = {"ct": KINDS["axial"], "mr": KINDS["oblique"], "holed": KINDS["axial"], "long": Kind(slices=150)}
        for name, kind in kinds.items():
            shape = (256, 256) if name == "long" else (8, 10)
            write_phantom(folder / name, kind, shape, SeriesInstanceUID=self.uids[name], StudyInstanceUID=study)
        (folder / "holed" / "slice_002.dcm").unlink()
        for name in kinds:
            self.pacs.upload(folder / name)
        self.folder = folder
        cache = {"MONAI_LABEL_DATASTORE_CACHE_PATH": str(folder / "cache")}
        cache["MONAI_LABEL_DICOMWEB_CACHE_PATH"] = str(folder / "cache")
        self.server = Server(self.pacs.url, ("embed_ahead", "false"), log=folder / "server.log", **cache)
        self.url = self.server.start().url

    def stop(self):
        self.server.stop()
        self.pacs.stop()

    def submit(self, name, mask, where="/samadapt/label", file="label.bin", **params):
        content = mask.ravel(order="F").tobytes()
        content = gzip.compress(content) if file.endswith(".gz") else content
        return requests.put(
            f"{self.url}{where}",
            params={"image": self.uids[name]},
            data={"params": json.dumps({"label_info": LABEL_INFO, **params})},
            files={"label": (file, content)},
            timeout=120,
        )


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, [])) for name in BACK_ENDS])
def hospital(request, tmp_path_factory):
    made = Hospital(request.param, tmp_path_factory.mktemp("hospital"))
    yield made
    made.stop()


def get(hospital, path, **options):
    return requests.get(f"{hospital.url}{path}", timeout=120, **options)


def test_ct_and_mr_are_offered_and_nothing_else(hospital):
    assert get(hospital, "/datastore/").json()["total"] == 4


def test_the_first_touch_of_a_series_holds_up_nobody(hospital):
    uid, slowest, answers = hospital.uids["long"], 0.0, []
    assert get(hospital, f"/samadapt/series/{uid}").json()["state"] == "absent"

    def infer():
        answers.append(
            requests.post(f"{hospital.url}/infer/samadapt", params={"image": uid, "output": "json"}, timeout=120)
        )

    thread = threading.Thread(target=infer)
    thread.start()
    while thread.is_alive():
        started = time.monotonic()
        get(hospital, "/samadapt/auto_train")
        slowest = max(slowest, time.monotonic() - started)
        time.sleep(0.02)
    assert answers[0].status_code == 200
    assert slowest < 1.0
    assert get(hospital, f"/samadapt/series/{uid}").json()["state"] == "ready"


def test_a_series_with_a_hole_is_refused_with_the_reason(hospital):
    uid = hospital.uids["holed"]
    answer = requests.post(f"{hospital.url}/infer/samadapt", params={"image": uid}, timeout=120)
    assert answer.status_code == 400
    assert "slices are missing" in answer.json()["what"]
    assert get(hospital, f"/samadapt/series/{uid}").json()["state"] == "refused"
    assert get(hospital, "/datastore/image", params={"image": uid}).status_code == 400


@pytest.mark.parametrize("image", ["1.2.3", "../../etc/passwd", "x", "1.2/../3"])
def test_unknown_series_are_told(hospital, image):
    assert get(hospital, "/datastore/image", params={"image": image}).status_code in (400, 404)
    answer = requests.post(f"{hospital.url}/infer/samadapt", params={"image": image}, timeout=60)
    assert answer.status_code in (400, 404)
    assert answer.json()["remedy"]


def test_submitting_moves_on_to_the_next_sample_and_ends_with_nothing_left(hospital):
    """Both endpoints, packed and not; the label comes back as it was sent, and the PACS has a SEG of it."""
    before = get(hospital, "/datastore/").json()["completed"]
    ways = [("/samadapt/label", "label.bin"), ("/datastore/label", "label.bin"), ("/samadapt/label", "label.bin.gz")]
    for n, (name, (where, file)) in enumerate(zip(("ct", "mr", "long"), ways, strict=True), start=1):
        mask = octants(read_series(hospital.folder / name).array.shape)
        answer = hospital.submit(name, mask, where, file, client_id="ann")
        assert answer.status_code == 200, answer.text
        assert set(answer.json()["labels"]) == {"liver", "our own"}
        assert get(hospital, "/datastore/").json()["completed"] == before + n
        sample = requests.post(f"{hospital.url}/activelearning/first", json={"client_id": f"c{n}"}, timeout=120).json()
        assert sample.get("id") != hospital.uids[name]
        assert sample.get("id") != hospital.uids["holed"]
    assert "slices are missing" in json.dumps(sample) or "message" in sample
    found = get(hospital, "/datastore/label", params={"label": hospital.uids["mr"], "tag": "final"})
    assert found.status_code == 200
    segs = DICOMwebClient(hospital.pacs.url).search_for_series(search_filters={"Modality": "SEG"})
    assert len(segs) == 3


def test_two_annotators_on_one_case(hospital):
    mask = octants(read_series(hospital.folder / "ct").array.shape)
    hospital.submit("ct", mask, client_id="ann")
    warnings = hospital.submit("ct", mask[::-1], client_id="bob").json()["warnings"]
    assert any("ann" in warning and "kept" in warning for warning in warnings)
    versions = get(hospital, "/samadapt/label/versions", params={"image": hospital.uids["ct"]}).json()["versions"]
    assert versions[0]["served"]
    assert [version["client_id"] for version in versions[:2]] == ["bob", "ann"]
    warnings = hospital.submit("ct", np.zeros_like(mask)).json()["warnings"]
    assert any("empty" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("mask", "params"),
    [
        (np.zeros((3, 3, 3), np.uint8), {}),
        (np.zeros((8, 10, 6), np.uint8), {"slices": ["1.2.3"]}),
        (np.zeros((8, 10, 6), np.uint8), {"label_info": "liver"}),
        (np.zeros((8, 10, 6), np.uint8), {"labelled_slices": [99]}),
    ],
)
def test_what_cannot_be_a_label_is_refused(hospital, mask, params):
    before = get(hospital, "/samadapt/label/versions", params={"image": hospital.uids["ct"]}).json()
    answer = hospital.submit("ct", mask, **params)
    assert answer.status_code == 400
    assert answer.json()["what"]
    assert get(hospital, "/samadapt/label/versions", params={"image": hospital.uids["ct"]}).json() == before


def test_an_empty_answer_is_no_dicom_seg_and_is_told_so(hospital):
    answer = requests.post(
        f"{hospital.url}/infer/samadapt",
        params={"image": hospital.uids["ct"], "output": "dicom_seg"},
        data={"params": json.dumps({"label_info": LABEL_INFO})},
        timeout=120,
    )
    assert answer.status_code == 400
    assert "empty" in answer.json()["what"]


def test_an_answer_as_dicom_seg(hospital):
    answer = requests.post(
        f"{hospital.url}/infer/samadapt_click",
        params={"image": hospital.uids["long"], "output": "dicom_seg"},
        data={"params": json.dumps({"label_info": [{"name": "liver", "idx": 1}], "foreground": [[100, 100, 70]]})},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    seg = pydicom.dcmread(io.BytesIO(answer.content))
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["liver"]
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == hospital.uids["long"]


def test_of_several_people_at_once_the_last_label_counts_and_none_is_lost(hospital):
    shape = read_series(hospital.folder / "mr").array.shape
    uid = hospital.uids["mr"]
    before = len(get(hospital, "/samadapt/label/versions", params={"image": uid}).json()["versions"])
    masks = {f"person {n}": np.roll(octants(shape), n, axis=0) for n in range(4)}
    with ThreadPoolExecutor(4) as people:
        answers = list(people.map(lambda who: hospital.submit("mr", masks[who], client_id=who), masks))
    assert [answer.status_code for answer in answers] == [200] * 4
    served = get(hospital, "/datastore/label", params={"label": uid, "tag": "final"})
    versions = get(hospital, "/samadapt/label/versions", params={"image": uid}).json()["versions"]
    assert len(versions) == before + 4
    assert {version["client_id"] for version in versions} >= masks.keys()
    (latest,) = [version for version in versions if version["served"]]
    path = hospital.folder / "served.nii.gz"
    path.write_bytes(served.content)
    mask = masks[latest["client_id"]]
    assert np.array_equal(nibabel.load(path).get_fdata(), mask)


@pytest.mark.parametrize(("params", "part"), [({"client_id": {"a": 1}}, "client_id"), ({"shape": [10, 8, 6]}, "shape")])
def test_a_label_that_contradicts_itself_is_refused_before_anything_is_stored(hospital, params, part):
    uid = hospital.uids["ct"]
    before = get(hospital, "/samadapt/label/versions", params={"image": uid}).json()
    mask = octants(read_series(hospital.folder / "ct").array.shape)
    answer = hospital.submit("ct", mask, **params)
    assert answer.status_code == 400
    assert answer.json()["where"] == part
    assert get(hospital, "/samadapt/label/versions", params={"image": uid}).json() == before


def _blank(seg):
    seg.PixelData = bytes(len(seg.PixelData))


def _without_places(seg):
    del seg.PerFrameFunctionalGroupsSequence


@pytest.mark.parametrize("spoil", [_blank, _without_places])
def test_an_empty_or_broken_seg_of_others_takes_no_labels_place(hospital, spoil, tmp_path):
    uid = hospital.uids["ct"]
    mask = octants(read_series(hospital.folder / "ct").array.shape)
    assert hospital.submit("ct", mask, client_id="ann").status_code == 200
    before = get(hospital, "/datastore/label", params={"label": uid, "tag": "final"}).content
    images = [pydicom.dcmread(path) for path in dicom_files(hospital.folder / "ct")]
    seg = write_seg(mask, {2: "theirs"}, series_grid(images, "ct"), images)
    spoil(seg)
    seg.save_as(tmp_path / "seg.dcm", write_like_original=False)
    hospital.pacs.upload(tmp_path)
    hospital.submit("mr", octants(read_series(hospital.folder / "mr").array.shape))  # makes the server look again
    after = get(hospital, "/datastore/label", params={"label": uid, "tag": "final"})
    assert after.status_code == 200
    assert after.content == before
