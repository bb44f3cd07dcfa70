"""The app behind a real ``monailabel start_server``, through the real client, before anything was trained."""

import http.client
import itertools
import json
import random
import threading
import time

import nibabel
import numpy as np
import pytest
import requests
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from samadapt.activelearning.registry import NAMES
from serving import Server, label_file, make_volumes

pytestmark = pytest.mark.e2e

PERMUTED = [{"name": "posterior", "idx": 1}, {"name": "anterior", "idx": 2}]
BLOCKS = {1: ((5, 5, 5), (15, 15, 12)), 2: ((16, 5, 5), (25, 15, 12))}


@pytest.fixture
def client(server, tmp_path):
    return MONAILabelClient(server.url, tmpdir=str(tmp_path))


def image_of(server, name):
    return nibabel.load(server.studies / f"{name}.nii.gz")


def assert_explains(reply, status=400):
    """A refusal says what is wrong, where, and what to do."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert body["what"], body
    assert body["where"], body
    assert body["remedy"], body
    return body


# ---- what viewers ask first


def test_info_has_the_three_models_one_trainer_and_all_strategies(client):
    info = client.info()
    assert info["name"] == "samadapt"
    assert {name: (m["type"], m["dimension"]) for name, m in info["models"].items()} == {
        "samadapt": ("segmentation", 3),
        "samadapt_click": ("deepgrow", 2),
        "samadapt_click_3d": ("deepgrow", 3),
    }
    assert all(isinstance(model["labels"], dict) for model in info["models"].values())
    assert list(info["trainers"]) == ["samadapt"]
    assert set(info["strategies"]) == set(NAMES)
    assert info["datastore"]["total"] == 6


def bar(info):
    """What OHIF's training bar shows, 0 to 1; Slicer's formula agrees as long as a training runs."""
    (stats,) = info["train_stats"].values()
    epoch = 0 if stats.get("total_time") else stats.get("epoch") or 1
    return epoch / (stats.get("total_epochs") or 1)


def test_the_training_bar_is_empty_before_any_training(client):
    assert bar(client.info()) == 0


def test_a_sample_is_unlabelled_says_why_and_is_nobody_else_s(tmp_path):
    server = Server(make_volumes(tmp_path / "studies", 3)).start()
    try:
        ann, bob = (MONAILabelClient(server.url, tmpdir=str(tmp_path), client_id=name) for name in ("ann", "bob"))
        samples = [ann.next_sample("random", {}), bob.next_sample("random", {}), ann.next_sample("first", {})]
        assert len({sample["id"] for sample in samples}) == 3
        for sample in samples:
            assert sample["path"] == str(server.studies / f"{sample['id']}.nii.gz")
            assert sample["reason"]
        assert bob.next_sample("random", {})["id"] == samples[1]["id"]  # one's own, as nothing else is left
        anonymous = requests.post(f"{server.url}/activelearning/random", json={}, timeout=30)
        assert anonymous.status_code == 200
        assert "all with annotators" in anonymous.json()["message"]
    finally:
        server.stop()


def test_who_clicks_on_an_image_keeps_it(tmp_path):
    studies = make_volumes(tmp_path / "studies", 2)
    image, other = sorted(path.name.removesuffix(".nii.gz") for path in studies.glob("*.nii.gz"))
    file = studies / ".samadapt" / "leases.json"
    file.parent.mkdir()
    given = time.time() - 600
    file.write_text(json.dumps({name: {"client": "ann", "since": given} for name in (image, other)}))
    server = Server(studies).start()
    try:
        MONAILabelClient(server.url, tmpdir=str(tmp_path), client_id="ann").infer(
            "samadapt_click", image, {"foreground": [[10, 10, 5]]}
        )
        since = {name: lease["since"] for name, lease in json.loads(file.read_text()).items()}
        assert since[image] > given
        assert since[other] == given
    finally:
        server.stop()


def test_who_asks_on_without_a_name_goes_round_and_blocks_nobody(tmp_path):
    """OHIF's panel sends an empty body."""
    server = Server(make_volumes(tmp_path / "studies", 3)).start()

    def ask(**body):
        return requests.post(f"{server.url}/activelearning/random", json=body, timeout=30).json()["id"]

    try:
        alone = [ask() for _ in range(6)]
        assert len(set(alone[:3])) == 3
        assert alone[3:] == alone[:3]
        assert ask(client_id="ann") != alone[-1]
    finally:
        server.stop()


@pytest.mark.parametrize("body", [{}, {"paused": "yes"}, [1]])
def test_a_pause_that_is_none_is_refused(server, body):
    answer = requests.post(f"{server.url}/samadapt/auto_train", json=body, timeout=30)
    assert answer.status_code == 422
    assert set(answer.json()) == {"error", "what", "where", "remedy"}
    assert answer.json()["where"] in ("paused", "body")


def test_who_starts_the_host_s_own_command_is_told_how_ohif_would_show_the_folder(server):
    assert f"samadapt serve --studies {server.studies}" in server.log.read_text()


def test_a_request_that_lacks_something_is_told_what_as_every_other_error_is(server):
    answer = requests.put(f"{server.url}/samadapt/label", timeout=30)
    assert answer.status_code == 422
    assert "image" in answer.json()["where"]
    assert "label" in answer.json()["where"]
    assert answer.json()["remedy"]
    answer = requests.get(f"{server.url}/info/", timeout=30).json()
    assert answer["not_in_pacs"] == []


def test_the_worklist_names_every_unlabelled_image_before_any_model(server, images):
    listed = requests.get(f"{server.url}/samadapt/worklist", timeout=30).json()
    assert listed["model_version"] is None
    assert set(listed["not_examined_yet"]) <= set(images)
    assert listed["cases"] == []


# ---- inference before the first training


@pytest.mark.parametrize("extension", [".nrrd", ".nii.gz", ".nii"])
def test_auto_segmentation_before_training_is_an_empty_full_mask_with_a_message(client, server, images, extension):
    file, params = client.infer("samadapt", images[0], {"result_extension": extension, "result_dtype": "uint8"})
    assert file.endswith(extension)
    assert "no label has been learned yet" in params["message"]
    assert params["latencies"]["total"] >= 0
    if extension != ".nrrd":
        mask = nibabel.load(file)
        image = image_of(server, images[0])
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
        assert not np.asarray(mask.dataobj).any()


def test_ohif_gets_raw_nrrd_of_the_full_volume(server, images):
    """OHIF asks for the mask alone and reads it as uint8, i fastest."""
    params = {
        "result_extension": ".nrrd",
        "result_dtype": "uint8",
        "result_compress": False,
        "restore_label_idx": False,
    }
    reply = requests.post(
        f"{server.url}/infer/samadapt",
        params={"image": images[0], "output": "image"},
        files={"params": (None, json.dumps(params))},
        timeout=60,
    )
    assert reply.status_code == 200
    header, data = reply.content.split(b"\n\n", 1)
    shape = image_of(server, images[0]).shape
    assert reply.content.startswith(b"NRRD")
    assert b"encoding: raw" in header
    assert f"sizes: {shape[0]} {shape[1]} {shape[2]}".encode() in header
    assert len(data) == np.prod(shape)


def test_a_click_fills_only_its_own_slice(client, server, images):
    shape = image_of(server, images[0]).shape
    i, j, k = (size // 2 for size in shape)
    file, params = client.infer("samadapt_click", images[0], {"foreground": [[i, j, k]], "result_extension": ".nii.gz"})
    mask = np.asarray(nibabel.load(file).dataobj)
    assert mask.shape == shape
    assert mask[i, j, k] == 1
    assert set(np.unique(mask)) == {0, 1}
    assert set(np.nonzero(mask)[2]) == {k}
    assert params["model_version"]


def test_a_box_in_3d_fills_an_object_inside_the_volume(client, server, images):
    shape = image_of(server, images[0]).shape
    middle = [size // 2 for size in shape]
    roi = [v for m in middle for v in (m + 6, m - 6)]  # unordered, as Slicer may send it
    file, params = client.infer(
        "samadapt_click_3d", images[0], {"roi": roi, "label": "new", "result_extension": ".nii.gz"}
    )
    mask = np.asarray(nibabel.load(file).dataobj)
    assert mask.shape == shape
    assert mask.any()
    assert params["label_names"] == {"new": 1}


def test_options_may_be_text(client, images):
    file, _ = client.infer(
        "samadapt_click",
        images[0],
        {"foreground": "[[10, 10, 5]]", "background": "", "slice": "5", "result_compress": "true"},
    )
    assert file.endswith(".nii.gz")


def test_training_without_labels_is_refused_with_a_remedy(server):
    reply = requests.post(f"{server.url}/train/samadapt", json={}, timeout=30)
    assert "Submit at least one label" in assert_explains(reply, 409)["remedy"]


# ---- labels


def test_a_submitted_label_keeps_its_names_and_teaches_the_app(client, server, images, tmp_path):
    label = label_file(tmp_path / "label.nii.gz", server.studies / f"{images[1]}.nii.gz", BLOCKS)
    reply = client.save_label(images[1], str(label), params={"label_info": PERMUTED, "model": "samadapt"})
    assert reply["labels"] == {"posterior": 1, "anterior": 2}
    assert reply["warnings"] == []
    stored = client.datastore()["objects"][images[1]]["labels"]["final"]
    assert stored["info"]["label_info"] == PERMUTED
    kept = nibabel.load(server.studies / "labels" / "final" / f"{images[1]}.nii.gz")
    np.testing.assert_array_equal(np.asarray(kept.dataobj), np.asarray(nibabel.load(label).dataobj))
    info = client.info()
    assert info["labels"] == ["posterior", "anterior"]
    assert info["models"]["samadapt_click"]["labels"] == {"posterior": 1, "anterior": 2}
    assert info["datastore"]["completed"] >= 1
    assert client.next_sample("first", {})["id"] != images[1]


def test_a_value_without_a_name_is_stored_and_reported(client, server, images, tmp_path):
    label = label_file(tmp_path / "label.nii.gz", server.studies / f"{images[2]}.nii.gz", BLOCKS)
    reply = client.save_label(images[2], str(label), tag="draft", params={"label_info": PERMUTED[:1]})
    assert reply["warnings"] == ["value 2 has no name in label_info and is not learned"]


@pytest.mark.parametrize("tag", ["draft", "final"])
def test_only_a_final_label_takes_a_case_from_whoever_has_it(client, server, images, tmp_path, tag):
    """Leases of others end with the case's label; one under another tag leaves it unlabelled, and theirs."""
    mine = client.next_sample("last", {"client_id": f"{tag} ann"})["id"]
    label = label_file(tmp_path / "label.nii.gz", server.studies / f"{mine}.nii.gz", BLOCKS)
    client.save_label(mine, str(label), tag=tag, params={"label_info": PERMUTED})
    leases = json.loads((server.studies / ".samadapt" / "leases.json").read_text())
    assert (mine in leases) == (tag == "draft")
    if tag == "draft":
        assert client.next_sample("last", {"client_id": "bob"})["id"] != mine
    removed = requests.delete(f"{server.url}/datastore/label", params={"id": mine, "tag": tag}, timeout=60)
    assert removed.status_code == 200  # other tests want the image without a label


@pytest.mark.parametrize(
    ("what", "make"),
    [
        (
            "another grid",
            lambda path, image: nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4)), path),
        ),
        (
            "another place",
            lambda path, image: nibabel.save(
                nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine + np.eye(4)[:, [3, 0, 1, 2]] * 9),
                path,
            ),
        ),
        ("no image at all", lambda path, image: path.write_bytes(b"this is no image")),
        ("nothing", lambda path, image: path.write_bytes(b"")),
    ],
)
def test_a_label_that_does_not_fit_is_refused_and_not_stored(client, server, images, tmp_path, what, make):
    path = tmp_path / "label.nii.gz"
    make(path, image_of(server, images[3]))
    with pytest.raises(MONAILabelClientException) as caught:
        client.save_label(images[3], str(path), params={"label_info": PERMUTED})
    assert "Status: 400" in caught.value.msg, what
    assert "remedy" in caught.value.msg
    assert "final" not in client.datastore()["objects"][images[3]]["labels"]
    assert not list((server.studies / "labels" / "final").glob(f"*{images[3]}*"))


@pytest.mark.parametrize(
    "label_info",
    ["anterior", [{"name": "a"}], [{"idx": 1}], [{"name": "a", "idx": "x"}], {"a": 1}, [{"name": "a", "idx": 10**30}]],
)
def test_malformed_label_info_is_refused(server, images, tmp_path, label_info):
    label = label_file(tmp_path / "label.nii.gz", server.studies / f"{images[3]}.nii.gz", BLOCKS)
    reply = requests.put(
        f"{server.url}/datastore/label",
        params={"image": images[3]},
        data={"params": json.dumps({"label_info": label_info})},
        files={"label": ("label.nii.gz", label.read_bytes())},
        timeout=60,
    )
    assert 400 <= reply.status_code < 500
    assert reply.json()["what"]


# ---- training


def test_a_training_shows_progress_at_once_and_is_over_once_it_is_stopped(client, server, images, tmp_path):
    label = label_file(tmp_path / "label.nii.gz", server.studies / f"{images[1]}.nii.gz", BLOCKS)
    client.save_label(images[1], str(label), params={"label_info": PERMUTED})
    assert not client.train_status(check_if_running=True)
    assert requests.post(f"{server.url}/train/", json={}, timeout=30).status_code == 200  # as OHIF starts it
    assert 0 < bar(client.info()) < 0.2
    assert client.info()["train_stats"]["samadapt"]["state"] == "running"
    with pytest.raises(MONAILabelClientException, match="429") as caught:
        client.train_start("samadapt", {})
    assert caught.value
    deadline = time.monotonic() + 60
    while not client.train_status(check_if_running=True) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.train_stop()["status"] == "STOPPED"
    assert client.info()["train_stats"]["samadapt"]["state"] != "running"
    assert bar(client.info()) == 0
    assert not client.train_status(check_if_running=True)


# ---- refusals


@pytest.mark.parametrize(
    ("model", "params", "where"),
    [
        ("samadapt_click", {}, "foreground"),
        ("samadapt_click_3d", {"background": [[1, 1, 1]]}, "foreground"),
        ("samadapt_click", {"foreground": [[999, 1, 1]]}, "foreground"),
        ("samadapt_click", {"foreground": [[1, 1, 1]], "slice": 2}, "slice"),
        ("samadapt_click_3d", {"roi": [1, 2, 3]}, "roi"),
        ("samadapt", {"label_prompt": [77]}, "label_prompt"),
        ("samadapt", {"label_prompt": ["spleen"]}, "label_prompt"),
        ("samadapt", {"result_extension": ".obj"}, "result_extension"),
        ("samadapt", {"result_dtype": "float99"}, "result_dtype"),
        ("samadapt", "{", "params"),
        ("samadapt", "[1, 2]", "params"),
        ("samadaptt", {}, "model"),
    ],
)
def test_bad_requests_are_explained(server, images, model, params, where):
    assert assert_explains(server.infer(model, images[0], params))["where"] == where


def test_an_unreadable_image_is_named(server):
    broken = server.studies / "broken.nii.gz"
    broken.write_bytes(b"no gzip")
    try:
        reply = server.infer("samadapt", "broken", {})
        assert 400 <= reply.status_code < 500
        assert "broken" in reply.text
    finally:
        broken.unlink()


@pytest.mark.parametrize(
    "image",
    ["nobody", "/etc/hostname", "../server.log", "studies", "studies/labels", "", "/tmp", "a/../../etc/hostname"],
)
def test_no_path_from_outside_is_opened(server, image):
    """The server runs in the studies' parent, so ``studies`` is a path that exists for it."""
    reply = server.infer("samadapt", image, {})
    if image:
        assert_explains(reply)
    assert reply.status_code >= 400


@pytest.mark.parametrize("key", ["image", "image_path"])
def test_the_params_cannot_open_a_path_either(server, images, tmp_path, key):
    other = make_volumes(tmp_path, 1)
    path = next(other.glob("*.nii.gz"))
    reply = server.infer("samadapt", images[0], {key: str(path)})
    if key == "image":
        assert_explains(reply)
    else:
        assert reply.status_code == 200


@pytest.mark.parametrize("tag", ["../../escaped", "..", "a/b", "/tmp/escaped", "."])
def test_a_tag_cannot_leave_the_folder(server, images, tmp_path, tag):
    label = label_file(tmp_path / "label.nii.gz", server.studies / f"{images[3]}.nii.gz", BLOCKS)
    reply = requests.put(
        f"{server.url}/datastore/label",
        params={"image": images[3], "tag": tag},
        files={"label": ("label.nii.gz", label.read_bytes())},
        timeout=60,
    )
    assert assert_explains(reply)["where"] == "tag"
    assert not list(server.studies.parent.rglob("*escaped*"))


@pytest.mark.parametrize("name", ["../escaped", "a/b", "..", ".hidden", "/abs"])
def test_an_image_id_cannot_leave_the_folder(server, images, name):
    before = sorted(server.studies.parent.rglob("*.nii.gz"))
    reply = requests.put(
        f"{server.url}/datastore/",
        params={"image": name},
        files={"file": ("x.nii.gz", (server.studies / f"{images[0]}.nii.gz").read_bytes())},
        timeout=60,
    )
    assert_explains(reply)
    assert sorted(server.studies.parent.rglob("*.nii.gz")) == before


@pytest.mark.parametrize("query", ["label=../x&tag=final", "label=x&tag=..", "label=/etc/hostname&tag=final"])
def test_reading_labels_stays_inside(server, query):
    assert requests.get(f"{server.url}/datastore/label?{query}", timeout=30).status_code == 404


def test_an_upload_adds_an_image_and_unreadable_ones_are_refused(client, server, images, tmp_path):
    client.upload_image(str(server.studies / f"{images[0]}.nii.gz"), "uploaded")
    assert "uploaded" in client.datastore()["objects"]
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"x")
    with pytest.raises(MONAILabelClientException) as caught:
        client.upload_image(str(bad), "bad")
    assert "Status: 400" in caught.value.msg
    with pytest.raises(MONAILabelClientException) as caught:
        client.upload_image(str(server.studies / f"{images[0]}.nii.gz"), "uploaded")
    assert "already" in caught.value.msg
    assert requests.delete(f"{server.url}/datastore/", params={"id": "uploaded"}, timeout=30).status_code == 200
    assert "uploaded" not in client.datastore()["objects"]


def test_inference_on_an_uploaded_file_and_on_a_session(client, server, images):
    path = str(server.studies / f"{images[0]}.nii.gz")
    file, _ = client.infer("samadapt_click", images[0], {"foreground": [[10, 10, 5]]}, file=path)
    assert np.asarray(nibabel.load(file).dataobj).any()
    session = client.create_session(path)["session_id"]
    file, _ = client.infer("samadapt", "", {}, session_id=session)
    assert nibabel.load(file).shape == nibabel.load(path).shape


def test_an_unknown_strategy_and_trainer_are_explained(server):
    assert "random" in assert_explains(requests.post(f"{server.url}/activelearning/rnd", timeout=30))["remedy"]
    assert "samadapt" in assert_explains(requests.post(f"{server.url}/train/samadap", json={}, timeout=30))["remedy"]


@pytest.mark.parametrize(
    "params",
    [
        {"max_steps": "many"},
        {"max_train_minutes": -1},
        {"epochs": 3},
        {"recipe": "lorra"},
        {"recipe": "ft/sam_vit_b/decoder/lora"},
    ],
)
def test_training_settings_are_checked_before_anything_starts(server, params):
    assert_explains(requests.post(f"{server.url}/train/samadapt", json=params, timeout=30))


def test_inference_without_an_image_is_explained(server):
    assert_explains(requests.post(f"{server.url}/infer/samadapt", data={"params": "{}"}, timeout=30))


def test_a_setting_beside_the_trainers_is_not_passed_over(server):
    reply = requests.post(f"{server.url}/train/", json={"recipe": "samed"}, timeout=30)
    assert "/train/samadapt" in assert_explains(reply)["remedy"]


def test_files_dropped_into_the_folder_are_found(client, server, images):
    copy = server.studies / "dropped.nii.gz"
    copy.write_bytes((server.studies / f"{images[0]}.nii.gz").read_bytes())
    try:
        assert "dropped" in client.datastore()["objects"]
        assert client.info()["datastore"]["total"] == len(images) + 1
    finally:
        copy.unlink()
    assert "dropped" not in client.datastore()["objects"]


# ---- other ways to start


def test_everything_labelled_is_said(tmp_path):
    studies = make_volumes(tmp_path / "studies", 1)
    name = next(studies.glob("*.nii.gz"))
    (studies / "labels" / "final").mkdir(parents=True)
    label_file(studies / "labels" / "final" / name.name, name, BLOCKS)
    server = Server(studies, ("labels", "anterior, posterior")).start()
    try:
        reply = requests.post(f"{server.url}/activelearning/random", json={}, timeout=30)
        assert reply.status_code == 200
        assert "id" not in reply.json()
        assert "every image has a final label" in reply.json()["message"]
        assert requests.get(f"{server.url}/info/", timeout=30).json()["labels"] == ["anterior", "posterior"]
    finally:
        server.stop()


def test_an_unknown_setting_stops_the_server_and_lists_the_valid_ones(tmp_path):
    with pytest.raises(RuntimeError, match="Did you mean 'backbone'") as caught:
        Server(make_volumes(tmp_path / "studies", 1), ("bakbone", "lite_medsam")).start()
    assert "max_train_minutes" in str(caught.value)


def test_kill_9_of_the_server_during_uploads_loses_no_label(tmp_path):
    """Three kills at random moments; every label that was acknowledged is there after the restart, with its names."""
    studies = make_volumes(tmp_path / "studies", 4)
    names = sorted(path.name.removesuffix(".nii.gz") for path in studies.glob("*.nii.gz"))
    generator = random.Random(1)
    server = Server(studies)
    acknowledged, attempted = {}, {}

    def submit_without_end(turns):
        client = MONAILabelClient(server.url, tmpdir=str(tmp_path))
        for turn in turns:
            image, value = names[turn % len(names)], turn % 200 + 1
            path = label_file(tmp_path / "upload.nii.gz", studies / f"{image}.nii.gz", {value: BLOCKS[1]})
            attempted[image] = value
            try:
                client.save_label(image, str(path), params={"label_info": [{"name": f"n{value}", "idx": value}]})
            except (OSError, http.client.HTTPException):
                return
            acknowledged[image] = value

    def check_all():
        objects = requests.get(f"{server.url}/datastore/?output=all", timeout=60).json()["objects"]
        for image, value in acknowledged.items():
            (entry,) = objects[image]["labels"]["final"]["info"]["label_info"]
            mask = np.asarray(nibabel.load(studies / "labels" / "final" / f"{image}.nii.gz").dataobj)
            assert entry == {"name": f"n{mask.max()}", "idx": mask.max()}
            assert entry["idx"] in (value, attempted[image])

    turns = itertools.count()
    server.start()
    for _ in range(3):
        annotator = threading.Thread(target=submit_without_end, args=(turns,))
        annotator.start()
        time.sleep(generator.uniform(0.3, 1.0))
        server.kill()
        annotator.join()
        server.start()
        check_all()
    server.stop()
    assert len(acknowledged) == len(names)
