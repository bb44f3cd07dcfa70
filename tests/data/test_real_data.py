"""The ten real sets beside the repository: every image and label is read, and lies where its counterpart lies."""

from pathlib import Path

import numpy as np
import pytest

from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap, remap
from samadapt.data.slices import SliceFrame, slice_count, slice_stack, take_slice
from samadapt.data.volume import read_label, read_volume, write_mask
from samadapt.data.window import choose_window

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")

# set: cases, patients known, classes, modality, window kind
SETS = {
    "acdc_mr": (20, 10, 3, "unknown", "percentile"),
    "brats_mr": (4, 0, 4, "unknown", "percentile"),
    "busi_us_2d": (30, 0, 2, "unknown", "fixed"),
    "curvas_ct_2d": (36, 0, 3, "unknown", "fixed"),
    "dicom_ct_rtstruct": (1, 0, 1, "CT", "fixed"),
    "dicom_sts_mr_rtstruct": (1, 0, 1, "unknown", "percentile"),
    "hippocampus_mr": (200, 0, 2, "unknown", "percentile"),
    "monuseg_histo_2d": (14, 14, 1, "RGB", "fixed"),
    "spleen_ct_crop": (1, 0, 1, "CT", "fixed"),
    "sts_ct": (12, 0, 1, "CT", "fixed"),
}
SOME = 6


def some_cases(name):
    """A few cases of a set; the float-stored labels of hippocampus_003 and _243 among them."""
    cases = find_cases(DATA / name)
    odd = [case for case in cases if case.id in ("hippocampus_003", "hippocampus_243")]
    return cases[:: max(1, len(cases) // SOME)][:SOME] + odd


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_found(name):
    count, patients, *_ = SETS[name]
    cases = find_cases(DATA / name)
    assert len(cases) == count
    assert all(case.label for case in cases)
    assert len({case.patient for case in cases if case.patient}) == patients


@pytest.mark.parametrize("name", SETS)
def test_images_and_labels_match(name):
    _, _, classes, modality, kind = SETS[name]
    labels = LabelMap.from_config([f"class {n}" for n in range(1, classes + 1)])
    volumes, masks = [], []
    for case in some_cases(name):
        volume = read_volume(case.image)
        mask, report = remap(read_label(case.label, volume.geometry), None, labels)
        assert volume.modality == modality
        assert volume.geometry.acquisition_axis == 2
        assert report.unknown_values == {}
        assert report.mapped
        volumes.append(volume)
        masks.append(mask)
    window = choose_window(volumes, masks)
    assert window.kind == kind
    shown = window.apply(volumes[0].array)
    assert shown.min() >= 0
    assert shown.max() <= 1
    inside = shown[0][masks[0] > 0]
    assert inside.std() > 0.01


@pytest.mark.parametrize("name", ["hippocampus_mr", "acdc_mr", "sts_ct", "monuseg_histo_2d"])
def test_a_mask_survives_the_whole_way(name, tmp_path):
    """Label -> slices -> frame -> slices -> file -> label: nothing moves by a voxel."""
    case = find_cases(DATA / name)[0]
    volume = read_volume(case.image)
    label = read_label(case.label, volume.geometry)
    axis = volume.geometry.acquisition_axis
    frame = SliceFrame.of(volume.geometry, axis, 2 * max(volume.geometry.shape))
    for index in range(0, slice_count(label.shape, axis), 7):
        native = take_slice(label, axis, index)
        assert slice_stack(volume.array, axis, index, 1).shape == (3, *native.shape)
        shown = frame.mask_to_model(native)
        rows, columns = np.nonzero(native)
        if rows.size:
            box = frame.boxes_to_model([[rows.min(), columns.min(), rows.max(), columns.max()]])[0]
            y, x = np.nonzero(shown)
            np.testing.assert_allclose(box, [x.min(), y.min(), x.max(), y.max()], atol=1)
    suffix = ".png" if volume.is_2d else ".nrrd"
    write_mask(tmp_path / f"m{suffix}", label, volume.geometry)
    np.testing.assert_array_equal(read_label(tmp_path / f"m{suffix}", volume.geometry), label)


@pytest.mark.parametrize(("name", "modality"), [("dicom_ct_rtstruct", "CT"), ("dicom_sts_mr_rtstruct", "MR")])
@pytest.mark.parametrize("inside", ["dicom", "dicom/image"])
def test_dicom_equals_its_nifti(name, modality, inside):
    """The RTSTRUCT under dicom/ is skipped."""
    (case,) = find_cases(DATA / name)
    series, nifti = read_volume(DATA / name / inside), read_volume(case.image)
    assert series.modality == modality
    np.testing.assert_array_equal(series.array, nifti.array)
    np.testing.assert_allclose(series.geometry.affine, nifti.geometry.affine, atol=1e-3)
    assert read_label(case.label, series.geometry).any()
