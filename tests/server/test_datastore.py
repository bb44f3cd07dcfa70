"""The datastore keeps labels and their names together, whatever happens."""

import json
import multiprocessing
import os
import random
import shutil
import threading
import time

import nibabel
import numpy as np
import pytest

from samadapt.data.cases import assume, find_cases
from samadapt.data.coverage import Coverage
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.errors import InputError, StateError
from samadapt.server.datastore import SafeDatastore, check_tag
from samadapt.training.slices import read_case

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
SHAPE = (6, 7, 8)


def save(path, mask):
    nibabel.save(nibabel.Nifti1Image(mask, AFFINE), path)
    return str(path)


def label_of(path, value):
    return save(path, np.full(SHAPE, value, np.uint8))


def info_of(value):
    return {"label_info": [{"name": f"structure {value}", "idx": value}]}


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("a", "b", "c.d"):
        save(folder / f"{name}.nii.gz", np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))
    return folder


def stored(studies, image="a", tag="final"):
    """(value in the mask, value in label_info) as a fresh process finds them; None where there is no label."""
    datastore = SafeDatastore(str(studies))
    uri = datastore.get_label_uri(image, tag)
    if not uri:
        return None
    mask = np.asarray(nibabel.load(uri).dataobj)
    names = datastore.get_label_info(image, tag)["label_info"]
    return int(mask.flat[0]), names[0]["idx"]


def test_masks_that_lie_beside_the_final_ones_are_taken_in_once(studies, tmp_path, caplog):
    """The terminal reads them; a server that did not would ask for their images again."""
    (studies / "labels").mkdir()
    for name, value in (("a", 1), ("b", 2), ("c.d", 7)):
        shutil.copy(label_of(tmp_path / "l.nii.gz", value), studies / "labels" / f"{name}.nii.gz")
    datastore = SafeDatastore(str(studies))
    assert datastore.take_in_plain_labels() == []
    assert "--conf labels" in caplog.text  # nobody knows what 1 is
    datastore.save_label("a", label_of(tmp_path / "l.nii.gz", 3), "final", info_of(3))
    datastore.known_labels = lambda: LabelMap(("liver", "spleen"))
    assert datastore.take_in_plain_labels() == ["b"]  # what a person submitted stays
    assert "c.d.nii.gz" in caplog.text
    assert [
        sorted(path.name for path in folder.glob("*.nii.gz"))
        for folder in (studies / "labels", studies / "labels" / "final")
    ] == [
        ["a.nii.gz", "b.nii.gz", "c.d.nii.gz"],
        ["a.nii.gz", "b.nii.gz"],
    ]
    assert {case.id: case.label.parent.name for case in find_cases(studies) if case.label} == {
        "a": "final",
        "b": "final",
    }
    datastore.remove_label("b", "final")
    assert datastore.take_in_plain_labels() == []  # somebody has removed it


@pytest.mark.parametrize(("image", "tag"), [("b", "final"), ("../../a", "final"), ("a", "original"), ("a", "../x")])
def test_removing_a_label_that_is_not_there_is_an_error_and_removes_nothing(studies, tmp_path, image, tag):
    datastore = SafeDatastore(str(studies))
    datastore.save_label("a", label_of(tmp_path / "l.nii.gz", 3), "final", info_of(3))
    with pytest.raises(InputError):
        datastore.remove_label(image, tag)
    assert stored(studies) == (3, 3)
    datastore.remove_label("a", "final")
    assert stored(studies) is None


def test_a_removed_label_is_kept_and_can_be_restored(studies, tmp_path):
    datastore = SafeDatastore(str(studies))
    datastore.save_label("a", label_of(tmp_path / "l.nii.gz", 3), "final", {**info_of(3), "author": "Ann"})
    datastore.remove_label("a", "final")
    assert datastore.latest_label("a") is None
    (kept,) = datastore.label_versions("a")
    assert (kept.served, kept.info["author"]) == (False, "Ann")
    datastore.restore_label("a", kept.name, {})
    assert stored(studies) == (3, 3)


def test_a_refused_label_is_named_by_its_image(studies, tmp_path):
    path = save(tmp_path / "tmp12345.nii.gz", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(InputError) as caught:
        SafeDatastore(str(studies)).save_label("a", path, "final", {})
    assert caught.value.where == "label of a"


@pytest.mark.parametrize("info", [{}, {"client_id": None}, {"client_id": "ann"}])
def test_who_labelled_may_be_said_or_not(studies, tmp_path, info):
    """MONAI Label's own client sends null where it has no id."""
    SafeDatastore(str(studies)).save_label("a", label_of(tmp_path / "l.nii.gz", 3), "final", {**info_of(3), **info})
    assert stored(studies) == (3, 3)


def test_who_labelled_is_a_text(studies, tmp_path):
    with pytest.raises(InputError):
        SafeDatastore(str(studies)).save_label(
            "a", label_of(tmp_path / "l.nii.gz", 3), "final", {"client_id": {"a": 1}}
        )
    assert stored(studies) is None


@pytest.mark.parametrize(("value", "taken"), [(2, True), (3, False), (0, True)])
def test_a_mask_without_names_is_refused_where_its_values_are_none_of_the_known_labels(studies, tmp_path, value, taken):
    datastore = SafeDatastore(str(studies))
    datastore.known_labels = lambda: LabelMap(("liver", "spleen"))
    file = label_of(tmp_path / "l.nii.gz", value)
    if taken:
        datastore.save_label("a", file, "final", {})
    else:
        with pytest.raises(InputError, match="3") as caught:
            datastore.save_label("a", file, "final", {})
        assert caught.value.where == "label_info"
        assert "1 = liver, 2 = spleen" in caught.value.remedy
    assert (datastore.local_label("a") is not None) == taken


@pytest.mark.parametrize("labels", [None, LabelMap(("liver",))])
def test_the_255_of_drawing_programs_is_refused_without_a_name(studies, tmp_path, labels):
    """Without a name 255 is "not labelled": all of it would be left out while the reply says that it is safe."""
    datastore = SafeDatastore(str(studies))
    datastore.known_labels = lambda: labels
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 1:3] = IGNORE
    file = save(tmp_path / "l.nii.gz", mask)
    with pytest.raises(InputError, match="255") as caught:
        datastore.save_label("a", file, "final", {})
    assert caught.value.where == "label_info"
    assert "label_info" in caught.value.remedy
    assert "1" in caught.value.remedy
    assert datastore.local_label("a") is None
    datastore.save_label("a", file, "final", info_of(IGNORE))
    mask[0] = 1
    datastore.save_label("b", save(tmp_path / "m.nii.gz", mask), "final", {})
    assert {"a", "b"} <= set(datastore.get_labeled_images())


def test_images_are_listed_and_labels_found_again(studies, tmp_path):
    datastore = SafeDatastore(str(studies))
    assert sorted(datastore.list_images()) == ["a", "b", "c.d"]
    datastore.save_label("a", label_of(tmp_path / "l.nii.gz", 3), "final", info_of(3))
    assert stored(studies) == (3, 3)
    assert sorted(datastore.get_unlabeled_images()) == ["b", "c.d"]
    assert not [p for p in (studies / "labels" / "final").iterdir() if p.name.startswith(".")]


def test_what_has_gone_from_the_folder_is_forgotten(studies, tmp_path):
    datastore = SafeDatastore(str(studies))
    for image in ("a", "b"):
        datastore.save_label(image, label_of(tmp_path / "l.nii.gz", 3), "final", info_of(3))
    (studies / "labels" / "final" / "a.nii.gz").unlink()
    (studies / "c.d.nii.gz").rename(tmp_path / "elsewhere.nii.gz")
    (studies / "c.d.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    assert sorted(datastore.get_unlabeled_images()) == ["a", "c.d"]
    (tmp_path / "elsewhere.nii.gz").unlink()
    (studies / "b.nii.gz").unlink()
    assert datastore.list_images() == ["a"]
    assert datastore.json()["objects"]["a"]["labels"] == {}


def test_a_new_label_replaces_the_old_one_in_another_format(studies, tmp_path):
    datastore = SafeDatastore(str(studies))
    datastore.save_label("a", label_of(tmp_path / "l.nii.gz", 1), "final", info_of(1))
    datastore.save_label("a", label_of(tmp_path / "l.nii", 2), "final", info_of(2))
    assert stored(studies) == (2, 2)
    assert [p.name for p in (studies / "labels" / "final").iterdir()] == ["a.nii"]


def test_two_datastores_on_one_folder_do_not_overwrite_each_other(studies, tmp_path):
    """The server and its training process, which reconciles while the server saves."""
    one, two = SafeDatastore(str(studies)), SafeDatastore(str(studies))
    one.save_label("a", label_of(tmp_path / "l.nii.gz", 1), "final", info_of(1))
    two.save_label("b", label_of(tmp_path / "m.nii.gz", 2), "final", info_of(2))
    one.update_image_info("c.d", {"seen": 1})
    save(studies / "late.nii.gz", np.zeros(SHAPE, np.float32))
    two.refresh()
    assert stored(studies, "a") == (1, 1)
    assert stored(studies, "b") == (2, 2)
    final = SafeDatastore(str(studies))
    assert final.get_image_info("c.d")["seen"] == 1
    assert "late" in one.list_images()


def test_threads_see_every_image_while_the_folder_changes(studies, tmp_path):
    datastore = SafeDatastore(str(studies))
    label = label_of(tmp_path / "l.nii.gz", 1)
    failures = []

    def work(image):
        try:
            for _ in range(5):
                datastore.save_label(image, label, "final", info_of(1))
                assert image in datastore.list_images()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(image,)) for image in ("a", "b", "c.d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(stored(studies, image) == (1, 1) for image in ("a", "b", "c.d"))


@pytest.mark.parametrize("step", range(8))
def test_a_crash_between_any_two_renames_keeps_mask_and_names_together(studies, tmp_path, monkeypatch, step):
    datastore = SafeDatastore(str(studies))
    datastore.save_label("a", label_of(tmp_path / "l.nii.gz", 1), "final", info_of(1))
    renames = 0
    real = os.replace

    def crash(source, target):
        nonlocal renames
        renames += 1
        if renames > step:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    finished = True
    try:
        datastore.save_label("a", label_of(tmp_path / "m.nii", 2), "final", info_of(2))
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    assert stored(studies) in ([(2, 2)] if finished else [(1, 1), (2, 2)])
    assert not [p for p in studies.rglob(".*") if ".tmp." in p.name or p.suffix in (".incoming", ".journal")]


def _save_without_end(studies, labels, started):
    datastore = SafeDatastore(str(studies))
    for turn in range(1_000_000):
        value = turn % len(labels) + 1
        datastore.save_label("a", labels[value - 1], "final", info_of(value))
        started.set()


def test_kill_9_at_random_moments(studies, tmp_path):
    labels = [label_of(tmp_path / name, n) for n, name in enumerate(("one.nii.gz", "two.nii", "three.nii.gz"), start=1)]
    generator = random.Random(0)
    fork = multiprocessing.get_context("fork")
    for _ in range(8):
        started = fork.Event()
        child = fork.Process(target=_save_without_end, args=(studies, labels, started))
        child.start()
        assert started.wait(30)
        time.sleep(generator.uniform(0.0, 0.1))
        child.kill()
        child.join()
        value, named = stored(studies)
        assert value == named
        json.loads((studies / "datastore_v2.json").read_text())


@pytest.mark.parametrize("tag", ["..", "../x", "a/b", "", ".", "a\n", "/x"])
def test_tags_are_plain_words(tag):
    with pytest.raises(InputError):
        check_tag(tag)


def test_refusals_leave_everything_as_it_was(studies, tmp_path):
    datastore = SafeDatastore(str(studies))
    good = label_of(tmp_path / "l.nii.gz", 1)
    other_grid = str(tmp_path / "o.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 3, 3), np.uint8), AFFINE), other_grid)
    wrong_type = str(tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text("x")
    for image, file, tag, info in [
        ("nobody", good, "final", {}),
        ("a", other_grid, "final", {}),
        ("a", wrong_type, "final", {}),
        ("a", good, "../out", {}),
        ("a", good, "final", {"label_info": [{"name": "x"}]}),
    ]:
        with pytest.raises(InputError):
            datastore.save_label(image, file, tag, info)
    assert stored(studies) is None
    assert list((studies / "labels" / "final").iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "..", "x.nii.gz"])
def test_added_images_stay_in_the_folder(studies, name):
    with pytest.raises(InputError):
        SafeDatastore(str(studies)).add_image(name, str(studies / "a.nii.gz"), {})


def test_a_broken_list_is_named_and_not_overwritten(studies):
    SafeDatastore(str(studies))
    (studies / "datastore_v2.json").write_text("{")
    with pytest.raises(StateError, match=r"datastore_v2\.json"):
        SafeDatastore(str(studies))
    assert (studies / "datastore_v2.json").read_text() == "{"


# Labels of some slices or classes


def test_what_a_label_covers_survives_a_restart_and_reaches_the_training(studies, tmp_path):
    said = {"labelled_slices": [1, "3"], "labelled_classes": ["structure 1"]}
    SafeDatastore(str(studies)).save_label("a", label_of(tmp_path / "l.nii.gz", 1), "final", {**info_of(1), **said})
    again = SafeDatastore(str(studies))
    assert again.get_label_info("a", "final")["labelled_slices"] == [1, "3"]
    case = next(case for case in find_cases(studies) if case.id == "a")
    assert case.coverage == Coverage((1, 3), ("structure 1",))
    _, mask, report = read_case(case, LabelMap(("structure 1", "structure 2")))
    assert [int(value) for value in mask[0, 0]] == [IGNORE, 1, IGNORE, 1, IGNORE, IGNORE, IGNORE, IGNORE]
    assert report.unknown == ("structure 2",)


@pytest.mark.parametrize(
    "said",
    [
        {"labelled_slices": [8]},
        {"labelled_slices": [-1]},
        {"labelled_slices": [0.5]},
        {"labelled_slices": []},
        {"labelled_slices": "1-3"},
        {"labelled_classes": "structure 1"},
        {"labelled_classes": [7]},
    ],
)
def test_a_statement_that_cannot_be_true_is_refused_and_nothing_is_stored(studies, tmp_path, said):
    datastore = SafeDatastore(str(studies))
    with pytest.raises(InputError) as caught:
        datastore.save_label("a", label_of(tmp_path / "l.nii.gz", 1), "final", {**info_of(1), **said})
    assert caught.value.http_status in range(400, 500)
    assert caught.value.where == next(iter(said))
    assert stored(studies) is None
    datastore.save_label("a", label_of(tmp_path / "l.nii.gz", 1), "final", info_of(1))
    if said.get("labelled_slices") != [8]:  # which only the image can tell
        with pytest.raises(InputError):
            datastore.update_label_info("a", "final", said)
        assert find_cases(studies)[0].coverage == Coverage()


def test_what_is_labelled_is_counted_as_the_training_will(studies, tmp_path):
    datastore = SafeDatastore(str(studies))
    mask = np.zeros(SHAPE, np.uint8)
    mask[..., 2], mask[..., 5] = 1, 4
    path = save(tmp_path / "l.nii.gz", mask)
    names = {"label_info": [{"name": "spleen", "idx": 1}, {"name": "unlabelled", "idx": 4}]}

    def counted(**said):
        datastore.save_label("a", path, "final", {**names, **said})
        case = next(case for case in find_cases(studies) if case.id == "a")
        case = assume([case], datastore.assumed)[0]
        _, _, report = read_case(case, LabelMap(("spleen",)))
        assert datastore.last_saved.slices == (report.slices or (8, 8))
        return datastore.last_saved.slices

    assert counted() == (7, 8)
    assert counted(labelled_slices=[1, 2, 5]) == (2, 8)
    assert counted(labelled_slices="nonempty") == (1, 8)
    datastore.assumed = Coverage(slices="nonempty")
    assert counted() == (1, 8)
    assert counted(labelled_slices="all") == (7, 8)
