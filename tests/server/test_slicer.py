"""3D Slicer's extension against the real server: its requests, in its order, and what it does with the replies."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import requests
import SimpleITK
from requests_toolbelt import MultipartDecoder

from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap
from samadapt.training.slices import read_case
from serving import Server, make_volumes
from waiting import wait_until

pytestmark = pytest.mark.e2e

NAMES = ("anterior", "posterior")
SCENE = ("posterior", "tumour", "anterior")
"""Segments in the order of the scene, which is not the models'; nobody has drawn a tumour."""

BLOCKS = {"posterior": np.s_[5:15, 5:15, 5:12], "anterior": np.s_[16:25, 5:15, 5:12]}


class Slicer:
    """One person's extension. Before every action it asks whether to log in; 404 means no."""

    def __init__(self, server, folder, client_id="user-xyz"):
        self.server = server
        self.folder = Path(folder)
        self.client_id = client_id

    def ask(self, method, path, **request):
        assert requests.get(f"{self.server.url}/auth/", timeout=30).status_code == 404
        return requests.request(method, f"{self.server.url}{path}", timeout=120, **request)

    def answer(self, method, path, **request):
        reply = self.ask(method, path, **request)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def form(self, params):
        return {"params": json.dumps({**params, "client_id": self.client_id})}

    def connect(self):
        info = self.answer("GET", "/info/")
        assert not info.get("config"), "the extension takes this for an old server and stops"
        return info

    def options(self, section, name):
        """What it sends with a request: the options that ``/info/`` lists, of a choice the first."""
        config = self.connect()[section][name].get("config", {})
        return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}

    def next_sample(self, strategy, **options):
        body = {**self.options("strategies", strategy), **options, "client_id": self.client_id}
        return self.answer("POST", f"/activelearning/{strategy}", json=body)

    def load(self, sample):
        """The sample's image as a file: where the server has it, else a download under the sample's own name."""
        if Path(sample["path"]).exists():
            return Path(sample["path"])
        reply = self.ask("GET", "/datastore/image", params={"image": sample["id"]})
        assert reply.status_code == 200
        file = self.folder / sample["name"]
        file.write_bytes(reply.content)
        return file

    def original_label(self, image):
        """Names and file of the label that came with the image; None where the extension finds none."""
        stored = self.answer("GET", "/datastore/?output=all")["objects"][image]["labels"]
        try:
            names = list(stored["original"]["info"]["params"]["label_names"])
        except KeyError:
            return None
        reply = self.ask("GET", "/datastore/label", params={"label": image, "tag": "original"})
        name = reply.headers["content-disposition"].split("filename=")[1].strip('"')
        file = self.folder / f"original-{name}"
        file.write_bytes(reply.content)
        return names, SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))

    def infer(self, model, image, params, shape=None, **files):
        """Segments by name, bool (I,J,K). Without a mask in the reply the extension would crash."""
        sent = {**self.options("models", model), **params}
        reply = self.ask("POST", f"/infer/{model}", params={"image": image}, data=self.form(sent), files=files or None)
        assert reply.status_code == 200, reply.text
        parts = {name_of(part): part for part in MultipartDecoder.from_response(reply).parts}
        assert set(parts) == {"params", "image"}
        file = self.folder / name_of(parts["image"], "filename")
        file.write_bytes(parts["image"].content)
        mask = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file))).transpose(2, 1, 0)
        if shape is not None:
            assert mask.shape == shape
        params = json.loads(parts["params"].text)
        names = params.get("label_names") or self.connect()["models"][model]["labels"]
        assert sorted(names.values()) == list(range(1, len(names) + 1))  # value n becomes the n-th segment
        assert mask.max() <= len(names)
        return {name: mask == value for name, value in names.items()}, params

    def submit(self, image, path, segments=SCENE, extension=".nii.gz", blocks=BLOCKS, **params):
        """Export the scene's segments as values 1, 2, ... in their order, as the extension does."""
        reference = SimpleITK.ReadImage(str(path))
        array = np.zeros(reference.GetSize()[::-1], np.int16)
        for value, name in enumerate(segments, start=1):
            if name in blocks:
                array.transpose(2, 1, 0)[blocks[name]] = value
        labelmap = SimpleITK.GetImageFromArray(array)
        labelmap.CopyInformation(reference)
        file = self.folder / f"tmp8x_{image}{extension}"
        SimpleITK.WriteImage(labelmap, str(file), useCompression=True)
        info = [{"name": name, "idx": value} for value, name in enumerate(segments, start=1)]
        return self.ask(
            "PUT",
            "/datastore/label",
            params={"image": image},
            data=self.form({"label_info": info, **params}),
            files={"label": (str(file), file.read_bytes())},
        )

    def training_bar(self):
        """Percent, or None when its timer finds that no training runs any more."""
        status = self.ask("GET", "/train/")
        if status.status_code != 200 or status.json()["status"] != "RUNNING":
            return None
        stats = next(iter(self.connect()["train_stats"].values()))
        assert 0 <= stats.get("best_metric", 0) <= 1
        if stats.get("total_time"):  # only where the training has ended between the two requests
            assert self.ask("GET", "/train/").json()["status"] != "RUNNING"
            return None
        return max(1.0, 100 * stats.get("epoch", 1) / stats.get("total_epochs", 1))


def name_of(part, key="name"):
    disposition = part.headers[b"Content-Disposition"].decode()
    return disposition.split(f' {key}="')[1].split('"')[0]


def refused(reply):
    """What the extension shows in its box of errors."""
    assert 400 <= reply.status_code < 500, reply.text
    body = reply.json()
    assert body["what"], body
    assert body["where"], body
    assert body["remedy"], body
    return body


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose trainings take seconds."""
    studies = make_volumes(tmp_path_factory.mktemp("slicer") / "studies", 6)
    running = Server(studies, ("image_size", "64"), ("max_steps", "2"), ("max_train_minutes", "0.5")).start()
    yield running
    running.stop()


@pytest.fixture
def slicer(server, tmp_path):
    return Slicer(server, tmp_path)


@pytest.fixture
def images(server):
    return sorted(requests.get(f"{server.url}/datastore/?output=all", timeout=30).json()["objects"])


@pytest.fixture
def shape(server, images):
    return nibabel.load(server.studies / f"{images[0]}.nii.gz").shape


# ---- before any label


def test_connect_fills_the_selectors(slicer):
    info = slicer.connect()
    by_type = {}
    for name, model in info["models"].items():
        assert model["description"]
        by_type.setdefault(model["type"], []).append(name)
    assert by_type == {"segmentation": ["samadapt"], "deepgrow": ["samadapt_click", "samadapt_click_3d"]}
    assert "auto" in info["strategies"]
    assert info["datastore"]["total"] == 6


def test_the_next_sample_is_loaded_from_its_path_or_downloaded(slicer, server):
    sample = slicer.next_sample("first")
    assert slicer.load(sample) == server.studies / sample["name"]
    assert slicer.original_label(sample["id"]) is None
    downloaded = slicer.load({**sample, "path": "/not/on/this/machine.nii.gz"})
    assert downloaded.read_bytes() == (server.studies / sample["name"]).read_bytes()


def test_the_label_that_was_made_beforehand_comes_with_the_sample(slicer, images, shape):
    """``save_label`` keeps what the model made as the label ``original``."""
    slicer.infer("samadapt_click_3d", images[0], {"roi": [8, 20, 8, 20, 5, 15], "label": "lesion", "save_label": True})
    names, mask = slicer.original_label(images[0])
    assert names == ["lesion"]
    assert mask.transpose(2, 1, 0).shape == shape
    assert mask.any()
    assert slicer.connect()["datastore"]["completed"] == 0  # nobody has submitted it


# ---- models


def test_auto_segmentation_before_training_brings_an_empty_mask(slicer, images, shape):
    segments, params = slicer.infer(
        "samadapt", images[0], {"result_extension": ".nrrd", "result_dtype": "uint8"}, shape
    )
    assert "no label has been learned yet" in params["message"]
    assert not any(mask.any() for mask in segments.values())


@pytest.mark.parametrize("reset", [True, False])
def test_a_click_in_2d_segments_its_slice_alone(slicer, images, shape, reset):
    i, j, k = (side // 2 for side in shape)
    segments, _ = slicer.infer(
        "samadapt_click",
        images[0],
        {
            "label": "spleen",
            "foreground": [[i, j, k]],
            "background": [[2, 2, k], [2, 2, k - 3]],
            "slice": k,
            "reset_state": reset,
        },
        shape,
    )
    assert list(segments) == ["spleen"]
    assert segments["spleen"][i, j, k]
    assert set(np.nonzero(segments["spleen"])[2]) == {k}


def test_on_the_first_slice_all_points_come_and_those_elsewhere_are_left_out(slicer, images, shape):
    """Slice 0 counts as none in the extension, which then sends the points of all slices."""
    i, j = shape[0] // 2, shape[1] // 2
    params = {"label": "spleen", "foreground": [[i, j, 9], [i, j, 0]], "background": [], "slice": 0}
    segments, _ = slicer.infer("samadapt_click", images[0], params, shape)
    assert set(np.nonzero(segments["spleen"])[2]) == {0}


def test_a_box_in_3d_may_come_in_any_order(slicer, images, shape):
    middle = [side // 2 for side in shape]
    ordered = [v for m in middle for v in (m - 6, m + 6)]
    swapped = [v for m in middle for v in (m + 6, m - 6)]
    base = {"label": "spleen", "foreground": [middle], "background": [], "reset_state": True}
    one, _ = slicer.infer("samadapt_click_3d", images[0], {**base, "roi": ordered}, shape)
    other, _ = slicer.infer("samadapt_click_3d", images[0], {**base, "roi": swapped}, shape)
    np.testing.assert_array_equal(one["spleen"], other["spleen"])
    inside = np.zeros(shape, bool)
    inside[tuple(slice(m - 6, m + 7) for m in middle)] = True
    assert one["spleen"].any()
    assert not one["spleen"][~inside].any()


def test_a_click_in_3d_without_a_box(slicer, images, shape):
    middle = [side // 2 for side in shape]
    params = {"label": "spleen", "foreground": [middle], "background": [], "roi": []}
    segments, _ = slicer.infer("samadapt_click_3d", images[0], params, shape)
    assert segments["spleen"][tuple(middle)]


def test_scribbles_are_refused_with_what_to_use_instead(slicer, server, images):
    """The extension hides them, as no model is of that kind; other clients may send them all the same."""
    file = server.studies / f"{images[0]}.nii.gz"
    for model in ("samadapt", "samadapt_click", "samadapt_click_3d"):
        reply = slicer.ask(
            "POST",
            f"/infer/{model}",
            params={"image": images[0]},
            data=slicer.form({"roi": [], "label_info": [{"name": "a", "id": 1}], "selected_label_name": "a"}),
            files={"label": (str(file), file.read_bytes())},
        )
        body = refused(reply)
        assert "scribbles" in body["what"]
        assert "samadapt_click" in body["remedy"]
    assert "samadapt_click" in refused(server.infer("Histogram+GraphCut", images[0], {}))["remedy"]


def test_a_volume_of_one_s_own_is_sent_with_a_session_and_uploaded_with_its_label(slicer, server, images, tmp_path):
    volume = tmp_path / "MRHead.nii.gz"
    volume.write_bytes((server.studies / f"{images[0]}.nii.gz").read_bytes())
    shape = nibabel.load(volume).shape
    made = slicer.answer(
        "PUT", "/session/", data=slicer.form({}), files=[("files", (str(volume), volume.read_bytes()))]
    )
    session = made["session_id"]
    assert slicer.ask("GET", f"/session/{session}").status_code == 200
    params = {"image": "MRHead", "session_id": session}
    click = {"label": "a", "foreground": [[side // 2 for side in shape]], "background": []}
    reply = slicer.ask("POST", "/infer/samadapt_click_3d", params=params, data=slicer.form(click))
    assert {name_of(part) for part in MultipartDecoder.from_response(reply).parts} == {"params", "image"}
    slicer.answer(
        "PUT",
        "/datastore/",
        params={"image": "MRHead"},
        data=slicer.form({}),
        files={"file": (str(volume), volume.read_bytes())},
    )
    assert slicer.submit("MRHead", volume).status_code == 200
    assert slicer.ask("DELETE", "/datastore/", params={"id": "MRHead"}).status_code == 200


# ---- labels


@pytest.mark.parametrize("extension", [".nii.gz", ".nii", ".nrrd"])
def test_a_submitted_scene_is_what_training_reads(slicer, server, images, extension):
    """Values follow the order of the scene; names say what they are."""
    path = server.studies / f"{images[1]}.nii.gz"
    reply = slicer.submit(images[1], path, extension=extension)
    assert reply.status_code == 200, reply.text
    case = next(case for case in find_cases(server.studies) if case.id == images[1])
    assert case.label.name.endswith(extension)
    volume, label, report = read_case(case, LabelMap(NAMES))
    wanted = np.zeros(volume.geometry.shape, np.uint8)
    for value, name in enumerate(NAMES, start=1):
        wanted[BLOCKS[name]] = value
    np.testing.assert_array_equal(label, wanted)
    assert set(report.mapped) == set(NAMES)
    assert slicer.connect()["datastore"]["completed"] == 1


def test_a_scene_of_other_size_is_refused(slicer, server, images, tmp_path):
    other = tmp_path / "other.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((30, 31, 32), np.float32), np.eye(4)), other)
    body = refused(slicer.submit(images[2], other))
    assert images[2] in body["where"]
    assert slicer.answer("GET", "/datastore/?output=all")["objects"][images[2]]["labels"].get("final") is None


# ---- training


def test_train_progress_stop_and_the_model_that_comes_of_it(slicer, server, images):
    for image in images[1:3]:
        assert slicer.submit(image, server.studies / f"{image}.nii.gz", NAMES[::-1]).status_code == 200
    options = {**slicer.options("trainers", "samadapt"), "client_id": slicer.client_id}
    started = slicer.answer("POST", "/train/samadapt", json=options)
    assert {"id", "status", "start_ts"} <= started.keys()
    wait_until(lambda: slicer.ask("GET", "/train/", params={"check_if_running": "true"}).status_code == 200, 120)
    stopped = slicer.answer("DELETE", "/train/")
    assert stopped["status"] == "STOPPED"
    assert isinstance(stopped["details"][-1], str)  # the extension reads the last line without a look
    assert slicer.ask("GET", "/train/", params={"check_if_running": "true"}).status_code == 404

    slicer.answer("POST", "/train/", json={"client_id": slicer.client_id})  # trainer "ALL"
    wait_until(lambda: slicer.ask("GET", "/train/", params={"check_if_running": "true"}).status_code == 200, 120)
    bars = []

    def over():
        bars.append(slicer.training_bar())
        return bars[-1] is None

    wait_until(over, 120)
    seen = [bar for bar in bars if bar is not None]
    assert seen == sorted(seen), seen
    assert 1 <= seen[0] <= seen[-1] <= 100
    assert slicer.answer("GET", "/train/")["status"] == "DONE"

    # the pre-label of the next sample: the first model that has the first label
    info = slicer.connect()
    first = next(name for name, model in info["models"].items() if info["labels"][0] in model["labels"])
    assert first == "samadapt"
    sample = slicer.next_sample("auto")
    segments, params = slicer.infer(first, sample["id"], {"result_extension": ".nrrd", "result_dtype": "uint8"})
    assert list(segments) == info["labels"]
    assert params["model_version"] == "v0001"
