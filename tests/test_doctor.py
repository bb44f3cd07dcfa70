"""Each thing that can be wrong is found, named, and comes with a remedy."""

import json

import nibabel as nib
import numpy as np
import pydicom
import pytest

from make_dicom import write_stack
from phantoms import KINDS
from phantoms import write_phantom as write_series
from samadapt import doctor
from samadapt.config import AppConfig
from samadapt.data.cases import find_cases
from samadapt.data.dicom import series_grid
from samadapt.data.dicom_seg import write_seg
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.dicomweb.child import store_folder
from samadapt.files import write_json
from samadapt.project import Project
from samadapt.server.outbox import outbox_folder
from samadapt.training import train
from tiny import write_phantom, write_studies

AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


@pytest.fixture
def studies(tmp_path):
    """Four labelled phantoms with a label map: nothing to complain about."""
    folder = tmp_path / "studies"
    write_studies(folder, 4)
    (folder / "labels.json").write_text('{"bright": 1, "dark": 2}')
    return folder


def look(studies):
    """Checks of a studies folder that are not ok, by name."""
    found = doctor._studies(studies, AppConfig(), lambda text: None)
    return {check.name: check for check in found if check.status != "ok"}


def save_label(studies, case, mask, affine=AFFINE):
    nib.save(nib.Nifti1Image(mask, affine), studies / "labels" / "final" / f"{case}.nii.gz")


def test_this_installation_is_fine():
    found = doctor.examine(AppConfig())
    assert {check.name for check in found} >= {
        "Python",
        "packages",
        "weights of lite_medsam",
        "device",
        "memory",
        "disk",
    }
    assert [check for check in found if check.status == "problem"] == []


def test_every_finding_has_a_remedy(studies):
    (studies / "broken.nii.gz").write_bytes(b"no image")
    assert all(check.remedy for check in look(studies).values())


def test_sound_studies_are_fine(studies):
    assert look(studies) == {}


def test_missing_and_empty_folders(tmp_path):
    assert look(tmp_path / "nowhere")["studies"].status == "problem"
    assert "no image" in look(tmp_path)["studies"].what


def test_unreadable_image(studies):
    (studies / "broken.nii.gz").write_bytes(b"no image")
    assert look(studies)["broken"].status == "problem"


def test_four_dimensions(studies):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.float32), AFFINE), studies / "movie.nii.gz")
    assert look(studies)["movie"].status == "problem"


def test_label_on_another_grid(studies):
    save_label(studies, "case_1", np.ones((5, 5, 5), np.uint8))
    found = look(studies)["case_1"]
    assert found.status == "problem"
    assert "grid" in found.what


def test_fractional_label(studies):
    image = nib.load(studies / "case_1.nii.gz")
    save_label(studies, "case_1", np.full(image.shape, 0.5, np.float32))
    assert look(studies)["case_1"].status == "problem"


def test_empty_label(studies):
    image = nib.load(studies / "case_1.nii.gz")
    save_label(studies, "case_1", np.zeros(image.shape, np.uint8))
    assert (look(studies)["case_1"].status, look(studies)["case_1"].what) == ("warning", "the label is empty")


def test_values_without_names(studies):
    (studies / "labels.json").unlink()
    assert {check.what for check in look(studies).values()} == {"the label's values have no names"}


def test_values_that_the_label_map_lacks(studies):
    (studies / "labels.json").write_text('["bright"]')
    found = look(studies)
    assert found["case_0"].status == "warning"
    assert "2 (" in found["case_0"].what


def test_names_that_the_published_model_learned(studies, tiny_backbone):
    (studies / "labels.json").unlink()
    settings = {"recipe": "lora", "image_size": "64", "max_steps": "1", "labels": "bright,dark"}
    train(find_cases(studies), LabelMap(("bright", "dark")), AppConfig.from_strings(settings), Project(studies))
    assert look(studies) == {}


def test_a_full_cache(studies, monkeypatch):
    assert look(studies) == {}
    monkeypatch.setattr(SliceCache, "bytes_used", lambda cache: 19 * 2**30)
    assert look(studies)["cache"].status == "warning"


def test_label_without_an_image(studies):
    (studies / "case_2.nii.gz").unlink()
    assert "without an image" in look(studies)["case_2.nii.gz"].what


def test_broken_records(studies):
    (studies / "labels.json").write_text("{")
    assert look(studies)["labels.json"].status == "problem"


def test_nothing_held_out(studies):
    assert "ledger" not in look(studies)
    write_json(studies / ".samadapt" / "ledger.json", {f"case {case.id}": "train" for case in find_cases(studies)})
    assert "nothing is held out" in look(studies)["ledger"].what


def test_interrupted_training(studies):
    write_json(
        studies / ".samadapt" / "training" / "status.json", {"state": "running", "pid": 2**22 + 1, "pid_started": 0}
    )
    assert look(studies)["training"].status == "warning"


def test_a_large_folder_is_left_in_time(studies, monkeypatch):
    monkeypatch.setattr(doctor, "STUDIES_SECONDS", -1.0)
    assert "only 1 of 4" in look(studies)["cases"].what


def test_packages_that_are_missing_or_differ(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("# pins\nnumpy==0.0.1  # too old\nno-such-package-at-all\npytest\n")
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    found = {check.name: check for check in doctor._packages()}
    assert set(found) == {"numpy", "no-such-package-at-all"}
    assert "0.0.1 is needed" in found["numpy"].what
    assert "pip install -r" in found["numpy"].remedy


def test_weights_that_are_damaged_or_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMADAPT_CACHE", str(tmp_path))
    assert doctor._weights(AppConfig(backbone="mobile_sam")).status == "warning"
    (tmp_path / "mobile_sam.pt").write_bytes(b"cut off")
    found = doctor._weights(AppConfig(backbone="mobile_sam"))
    assert found.status == "problem"
    assert "SHA-256" in found.what


def test_labels_with_names_of_their_own(studies):
    """A submitted label's names count, not the order of labels.json."""
    write_phantom(studies / "case_9.nii.gz", seed=9)
    image = nib.load(studies / "case_9.nii.gz")
    save_label(studies, "case_9", np.full(image.shape, 7, np.uint8))
    entry = {"info": {"label_info": [{"name": "dark", "idx": 7}]}, "ext": ".nii.gz"}
    record = {"objects": {"case_9": {"image": {"ext": ".nii.gz"}, "labels": {"final": entry}}}}
    (studies / "datastore_v2.json").write_text(json.dumps(record))
    assert look(studies) == {}


def say(studies, case, **said):
    record = {"objects": {case: {"image": {"ext": ".nii.gz"}, "labels": {"final": {"ext": ".nii.gz", "info": said}}}}}
    (studies / "datastore_v2.json").write_text(json.dumps(record))


def test_what_is_labelled_in_part_is_told_and_is_nothing_wrong(studies):
    names = [{"name": "dark", "idx": 2}]
    say(studies, "case_1", labelled_slices=[0, 2], labelled_classes="named", label_info=names)
    mask = np.asarray(nib.load(studies / "labels/final/case_1.nii.gz").dataobj).copy()
    mask[mask == 1] = 0
    save_label(studies, "case_1", mask)
    assert look(studies) == {}
    found = {check.name: check for check in doctor._studies(studies, AppConfig(), lambda text: None)}
    assert found["case_1"].status == "ok"
    assert found["case_1"].what == "2 of 6 slices are labelled; background may also be bright"
    assert "case_0" not in found
    config = AppConfig(unlabelled_slices="ignore")
    found = {check.name: check for check in doctor._studies(studies, config, lambda text: None)}
    assert found["case_0"].what == "4 of 6 slices are labelled"


def test_labelled_slices_that_the_image_does_not_have(studies):
    say(studies, "case_1", labelled_slices=[6])
    assert look(studies)["case_1"].status == "problem"
    assert "no slice 6" in look(studies)["case_1"].what


def test_a_label_that_names_only_what_is_to_be_ignored(studies):
    (studies / "labels.json").unlink()
    say(studies, "case_1", label_info=[{"name": "ignore", "idx": 1}])
    assert "names no structure" in look(studies)["case_1"].what


def test_dicom_files_that_are_not_served_are_named(tmp_path):
    places = [(0, 0, 2.0 * z) for z in range(4)]
    folder = write_stack(tmp_path / "studies" / "series", np.zeros((4, 6, 5), np.int16), places)
    files = sorted(folder.iterdir())
    assert look(tmp_path / "studies") == {}
    files[0].write_bytes(files[0].read_bytes()[:400])
    (folder / "z_again.dcm").write_bytes(files[1].read_bytes())
    found = [check for check in doctor._left_out(tmp_path / "studies") if check.status == "warning"]
    assert [str(files[0]) in found[0].what, "the same instance" in found[1].what] == [True, True]
    assert "z_again.dcm" in found[1].what


def test_labels_that_the_pacs_has_yet_to_get_are_named(tmp_path):
    folder = write_series(tmp_path / "studies" / "series", KINDS["axial"])
    images = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    grid = series_grid(images, "here")
    seg = write_seg(np.ones(grid.geometry.shape, np.uint8), {1: "liver"}, grid, images, "ann")
    outbox = outbox_folder(store_folder(tmp_path / "studies"))
    outbox.mkdir(parents=True)
    seg.save_as(outbox / f"{seg.SOPInstanceUID}.dcm", write_like_original=False)
    found = look(tmp_path / "studies")["PACS"]
    assert found.status == "warning"
    assert grid.series in found.what
    assert "ann" in found.what
