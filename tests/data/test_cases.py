import json
import shutil
import threading
import time

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from make_dicom import write_rtstruct, write_stack
from samadapt.data.cases import Case, assume, find_cases
from samadapt.data.coverage import Coverage
from samadapt.errors import InputError

INFO = [{"name": "spleen", "idx": 2}, {"name": "liver", "idx": 1}]


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def write_datastore(studies, objects, **more):
    studies.mkdir(parents=True, exist_ok=True)
    (studies / "datastore_v2.json").write_text(
        json.dumps({"name": "n", "description": "d", "objects": objects, **more})
    )


def record(ext=".nii.gz", **labels):
    return {"image": {"ext": ext, "info": {}}, "labels": labels}


def by_id(studies):
    return {case.id: case for case in find_cases(studies)}


# MONAI Label's layout


def test_only_final_labels_count(tmp_path):
    touch(*(tmp_path / f"{name}.nii.gz" for name in "abc"))
    touch(tmp_path / "labels/final/a.nii.gz", tmp_path / "labels/original/b.nii.gz", tmp_path / "labels/c.nii.gz")
    assert find_cases(tmp_path) == [
        Case("a", tmp_path / "a.nii.gz", tmp_path / "labels/final/a.nii.gz"),
        Case("b", tmp_path / "b.nii.gz"),
        Case("c", tmp_path / "c.nii.gz"),
    ]


def test_names_of_values_come_from_the_datastore(tmp_path):
    touch(*(tmp_path / f"{name}.nii.gz" for name in "abc"))
    touch(*(tmp_path / f"labels/final/{name}.nii.gz" for name in "abc"))
    final = {"ext": ".nii.gz", "info": {"label_info": INFO, "model": "m", "ts": 1}}
    write_datastore(
        tmp_path,
        {
            "a": record(final=final),
            "b": record(final={"ext": ".nii.gz", "info": {"params": {"label_info": INFO}}}),
            "c": record(final={"ext": ".nii.gz", "info": {"ts": 1}}),
        },
    )
    cases = by_id(tmp_path)
    assert cases["a"].values == cases["b"].values == {2: "spleen", 1: "liver"}
    assert cases["c"].values is None


def test_the_datastores_suffix_wins(tmp_path):
    touch(
        tmp_path / "a.nii.gz", tmp_path / "a.nrrd", tmp_path / "labels/final/a.nrrd", tmp_path / "labels/final/a.nii.gz"
    )
    assert by_id(tmp_path)["a"].image.name == "a.nii.gz"
    write_datastore(tmp_path, {"a": record(".nrrd", final={"ext": ".nrrd", "info": {}})})
    assert by_id(tmp_path)["a"].image.name == "a.nrrd"
    assert by_id(tmp_path)["a"].label == tmp_path / "labels/final/a.nrrd"


def test_entries_without_files_are_no_cases(tmp_path):
    touch(tmp_path / "a.nii.gz")
    write_datastore(tmp_path, {"a": record(final={"ext": ".nii.gz", "info": {"label_info": INFO}}), "gone": record()})
    assert find_cases(tmp_path) == [Case("a", tmp_path / "a.nii.gz")]


def test_other_folders_of_the_datastore(tmp_path):
    touch(tmp_path / "scans/a.nii.gz", tmp_path / "masks/final/a.nii.gz")
    write_datastore(tmp_path, {}, images_dir="scans", labels_dir="masks")
    assert find_cases(tmp_path) == [Case("a", tmp_path / "scans/a.nii.gz", tmp_path / "masks/final/a.nii.gz")]


def test_malformed_names_say_which_case(tmp_path):
    touch(tmp_path / "a.nii.gz", tmp_path / "labels/final/a.nii.gz")
    write_datastore(tmp_path, {"a": record(final={"ext": ".nii.gz", "info": {"label_info": [{"name": "x"}]}})})
    with pytest.raises(InputError, match=r"datastore_v2\.json: label of 'a'.*Submit that label again"):
        find_cases(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"objects": []}'])
def test_a_broken_datastore_is_named(tmp_path, content):
    (tmp_path / "datastore_v2.json").write_text(content)
    with pytest.raises(InputError, match="datastore_v2"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    "entry", [None, 3, {}, {"image": None}, {"image": {"ext": ".nii.gz"}, "labels": {"final": None}}]
)
def test_odd_entries_do_no_harm(tmp_path, entry):
    touch(tmp_path / "a.nii.gz", tmp_path / "labels/final/a.nii.gz")
    write_datastore(tmp_path, {"a": entry})
    assert by_id(tmp_path)["a"].label is not None


def test_a_datastore_that_is_just_being_written(tmp_path):
    touch(tmp_path / "a.nii.gz", tmp_path / "labels/final/a.nii.gz")
    path = tmp_path / "datastore_v2.json"
    path.write_text('{"objects": {')

    def finish():
        time.sleep(0.15)
        write_datastore(tmp_path, {"a": record(final={"ext": ".nii.gz", "info": {"label_info": INFO}})})

    writer = threading.Thread(target=finish)
    writer.start()
    assert by_id(tmp_path)["a"].values == {2: "spleen", 1: "liver"}
    writer.join()


def test_hidden_files_and_folders_are_ignored(tmp_path):
    touch(tmp_path / "a.nii.gz", tmp_path / ".b.tmp.nii.gz", tmp_path / "labels/final/.1.tmp.a.nii.gz")
    touch(tmp_path / ".samadapt/images/c.nii.gz", tmp_path / ".samadapt/d.nii.gz")
    assert find_cases(tmp_path) == [Case("a", tmp_path / "a.nii.gz")]


def test_the_same_ids_and_labels_as_monai_label_itself(tmp_path):
    datastore = pytest.importorskip("monailabel.datastore.local")
    extensions = ("*.nii.gz", "*.nii", "*.nrrd", "*.jpg", "*.png", "*.tif")
    touch(
        tmp_path / "scan.v1.nii.gz", tmp_path / "b.nii", tmp_path / "c.nrrd", tmp_path / "d.png", tmp_path / "notes.txt"
    )
    store = datastore.LocalDatastore(str(tmp_path), extensions=extensions)
    submitted = tmp_path / "submit.nii.gz"
    submitted.write_bytes(b"label")
    store.save_label("c", str(submitted), "final", {"label_info": INFO, "model": "m"})
    store.save_label("b", str(submitted), "original", {"label_info": INFO})
    submitted.unlink()
    cases = by_id(tmp_path)
    assert set(cases) == set(store.list_images()) - {"submit"}
    assert [case.id for case in cases.values() if case.label] == store.get_labeled_images() == ["c"]
    assert cases["c"].values == {2: "spleen", 1: "liver"}
    for case_id, case in cases.items():
        assert str(case.image.resolve()) == store.get_image_uri(case_id)
    assert str(cases["c"].label.resolve()) == store.get_label_uri("c", "final")


# Plain folders


def test_images_and_labels(tmp_path):
    touch(
        tmp_path / "images/a.jpg", tmp_path / "images/b.jpg", tmp_path / "labels/a.png", tmp_path / "labels/other.png"
    )
    assert find_cases(tmp_path) == [
        Case("a", tmp_path / "images/a.jpg", tmp_path / "labels/a.png"),
        Case("b", tmp_path / "images/b.jpg"),
    ]


def test_a_plain_folder_over_which_a_server_once_ran(tmp_path):
    touch(tmp_path / "images/a.nii.gz", tmp_path / "labels/a.nii.gz")
    (tmp_path / "labels/final").mkdir()
    write_datastore(tmp_path, {})
    assert find_cases(tmp_path) == [Case("a", tmp_path / "images/a.nii.gz", tmp_path / "labels/a.nii.gz")]


def test_images_in_the_folder_itself(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "labels/a.png")
    assert by_id(tmp_path)["a"].label == tmp_path / "labels/a.png"


def test_jpeg_labels_do_not_count(tmp_path):
    touch(tmp_path / "images/a.png", tmp_path / "labels/a.jpg")
    assert by_id(tmp_path)["a"].label is None


def test_empty_folder(tmp_path):
    assert find_cases(tmp_path) == []


@pytest.mark.parametrize("name", ["none", "file.txt"])
def test_no_folder(tmp_path, name):
    touch(tmp_path / "file.txt")
    with pytest.raises(InputError, match="no such folder"):
        find_cases(tmp_path / name)


# DICOM


def series(folder, patient="P7"):
    return write_stack(folder, np.zeros((3, 4, 5)), [(0, 0, z) for z in range(3)], PatientID=patient)


@pytest.mark.parametrize("inside", ["", "images"])
def test_a_dicom_series_in_each_folder(tmp_path, inside):
    series(tmp_path / inside / "case_2", "")
    series(tmp_path / inside / "case_1")
    write_rtstruct(tmp_path / inside / "case_1/rtstruct/x.dcm")
    touch(tmp_path / inside / "notes/readme.txt", tmp_path / "labels/case_1.nii.gz")
    assert find_cases(tmp_path) == [
        Case("case_1", tmp_path / inside / "case_1", tmp_path / "labels/case_1.nii.gz", patient="P7"),
        Case("case_2", tmp_path / inside / "case_2"),
    ]


def test_dicom_beside_plain_images_is_their_source(tmp_path):
    series(tmp_path / "dicom")
    touch(tmp_path / "images/a.nii.gz")
    assert list(by_id(tmp_path)) == ["a"]


# Patients


@pytest.mark.parametrize(
    ("case_id", "patient"),
    [
        ("patient001_12", "patient001"),
        ("Patient-7", "Patient-7"),
        ("patient007", "patient007"),
        ("sub-01_ses-2_T1w", "sub-01"),
        ("TCGA-ZF-A9R5-01A-01-TS1", "TCGA-ZF-A9R5"),
        ("patient001b", None),
        ("patients_12", None),
        ("hippocampus_001", None),
        ("10001_509", None),
        ("outpatient001", None),
    ],
)
def test_patients_named_in_the_id(tmp_path, case_id, patient):
    touch(tmp_path / f"{case_id}.nii.gz")
    assert by_id(tmp_path)[case_id].patient == patient


def test_patients_file_comes_first(tmp_path):
    touch(tmp_path / "patient001_1.nii.gz", tmp_path / "patient001_2.nii.gz")
    (tmp_path / "patients.json").write_text('{"patient001_1": "Ada", "unknown": "x"}')
    cases = by_id(tmp_path)
    assert cases["patient001_1"].patient == "Ada"
    assert cases["patient001_2"].patient == "patient001"


@pytest.mark.parametrize("content", ["[", "[]"])
def test_a_broken_patients_file_is_named(tmp_path, content):
    (tmp_path / "patients.json").write_text(content)
    with pytest.raises(InputError, match="patients"):
        find_cases(tmp_path)


def test_real_files_are_read_later_not_now(tmp_path):
    """Finding cases opens no image: a damaged one is a case until someone reads it."""
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "b.png")
    shutil.copy(tmp_path / "b.png", tmp_path / "c.nii.gz")
    assert list(by_id(tmp_path)) == ["a", "b", "c"]


# What a label covers


def test_what_a_label_covers_comes_from_the_datastore(tmp_path):
    touch(*(tmp_path / f"{name}.nii.gz" for name in "ab"))
    touch(*(tmp_path / f"labels/final/{name}.nii.gz" for name in "ab"))
    said = {"label_info": INFO, "labelled_slices": [4, 2], "labelled_classes": "named"}
    write_datastore(tmp_path, {"a": record(final={"ext": ".nii.gz", "info": said})})
    cases = by_id(tmp_path)
    assert cases["a"].coverage == Coverage((2, 4), "named")
    assert cases["b"].coverage == Coverage()
    assumed = assume(cases.values(), Coverage("nonempty", "all"))
    assert [case.coverage for case in assumed] == [Coverage((2, 4), "named"), Coverage("nonempty", "all")]


def test_a_malformed_statement_says_which_case(tmp_path):
    touch(tmp_path / "a.nii.gz", tmp_path / "labels/final/a.nii.gz")
    write_datastore(tmp_path, {"a": record(final={"ext": ".nii.gz", "info": {"labelled_slices": "few"}})})
    with pytest.raises(InputError, match=r"datastore_v2\.json: label of 'a'.*Submit that label again"):
        find_cases(tmp_path)
