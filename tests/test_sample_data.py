"""sample-data/: the demo cohort has what the demo needs, and survives being interrupted."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samadapt.errors import ConfigError, StateError

SAMPLE_DATA = Path(__file__).resolve().parents[1] / "sample-data"
sys.path.append(str(SAMPLE_DATA))

import anatomy  # noqa: E402
import generate  # noqa: E402
import scanner  # noqa: E402

CASES = 6


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return generate.generate(tmp_path_factory.mktemp("cohort") / "studies", cases=CASES, progress=iter)


@pytest.fixture
def copied(cohort, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(cohort.folder, tmp_path / "studies")
    shutil.copytree(cohort.truth, tmp_path / "studies_truth")
    return tmp_path / "studies"


@pytest.fixture
def drawn(monkeypatch):
    """Indices of the cases that are made anew."""
    made = []
    draw = generate.draw_scan
    monkeypatch.setattr(generate, "draw_scan", lambda index, seed: made.append(index) or draw(index, seed))
    return made


def volumes(cohort):
    return [(nib.load(cohort.images[name]), nib.load(cohort.truths[name])) for name in cohort.images]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


def test_folder_holds_images_label_map_and_manifest_only(cohort):
    names = {path.name for path in cohort.folder.iterdir()}
    assert names == {f"case_{n:02d}.nii.gz" for n in range(1, CASES + 1)} | {"labels.json", "cohort.json"}
    assert json.loads((cohort.folder / "labels.json").read_text()) == cohort.labels
    assert {path.name for path in cohort.truth.iterdir()} == {f"case_{n:02d}.nii.gz" for n in range(1, CASES + 1)}


def test_default_cohort_is_large_enough_and_small(cohort):
    assert generate.generate.__defaults__[0] >= 12
    size = sum(path.stat().st_size for path in (*cohort.images.values(), *cohort.truths.values()))
    assert size / CASES * generate.generate.__defaults__[0] < 6e6


def test_every_case_has_every_structure_on_both_sides(cohort):
    for _, label in volumes(cohort):
        array = np.asarray(nib.as_closest_canonical(label).dataobj)
        assert set(np.unique(array)) == {0, *cohort.labels.values()}
        middle = array.shape[0] // 2
        for name, value in cohort.labels.items():
            left, right = (array[:middle] == value).sum(), (array[middle:] == value).sum()
            assert min(left, right) > 40, name


def test_label_lies_on_the_grid_of_its_image(cohort):
    for image, label in volumes(cohort):
        assert label.shape == image.shape
        assert len(image.shape) == 3
        np.testing.assert_array_equal(label.affine, image.affine)
        for header in (image.header, label.header):
            np.testing.assert_allclose(header.get_qform(), image.affine, atol=1e-4)
            np.testing.assert_allclose(header.get_sform(), image.affine, atol=1e-4)


def test_slices_are_few_and_thick_and_the_image_has_signal(cohort):
    for image, _ in volumes(cohort):
        shape = nib.as_closest_canonical(image).shape
        assert max(shape[:2]) <= 100
        assert 16 <= shape[2] <= 32
        spacing = nib.as_closest_canonical(image).header.get_zooms()
        assert spacing[2] > 1.3 * spacing[0]
        array = image.get_fdata()
        assert np.isfinite(array).all()
        assert array.min() == 0
        assert 0.1 < (array > 0).mean() < 0.9


def test_stored_form_varies(cohort):
    images = [image for image, _ in volumes(cohort)]
    assert len({image.get_data_dtype() for image in images}) >= 3
    assert len({nib.aff2axcodes(image.affine) for image in images}) >= 4
    assert len({image.shape for image in images}) == CASES
    assert any(np.count_nonzero(np.abs(image.affine[:3, :3]) > 1e-3) > 3 for image in images), "no oblique case"


def test_structures_do_not_follow_from_intensity(cohort):
    """Ventricles are the darkest structure in most cases and the brightest in others."""
    brighter = []
    for image, label in volumes(cohort):
        array, mask = image.get_fdata(), np.asarray(label.dataobj)
        ventricles, stem = (
            np.median(array[mask == cohort.labels[name]]) for name in ("lateral_ventricles", "brain_stem")
        )
        brighter.append(ventricles > stem)
    assert any(brighter)
    assert not all(brighter)


def test_heads_have_different_shapes(cohort):
    """No two cases are one head: volumes of the structures differ, and so does left from right."""
    sizes, imbalance = [], []
    for _, label in volumes(cohort):
        array = np.asarray(nib.as_closest_canonical(label).dataobj)
        voxel = np.prod(label.header.get_zooms())
        sizes.append([(array == value).sum() * voxel for value in cohort.labels.values()])
        ventricles = array == cohort.labels["lateral_ventricles"]
        left, right = np.array_split(ventricles, 2)
        imbalance.append(abs(left.sum() - right.sum()) / ventricles.sum())
    for one, other in itertools.combinations(np.array(sizes), 2):
        assert np.abs(one / other - 1).max() > 0.03
    ventricles = np.array(sizes)[:, 0]
    assert ventricles.max() > 1.8 * ventricles.min()
    assert max(imbalance) > 0.1


def test_lesions_darken_white_matter_on_t1():
    scan = dataclasses.replace(scanner.draw_scan(5, seed=0), noise=0.0, bias=0.0)
    assert scan.lesions > 0
    assert scan.contrast == "T1"
    anatomy_ = anatomy.load_anatomy()
    damaged, labels = (volume.get_fdata() for volume in scanner.acquire(anatomy_, scan))
    healthy, same_labels = (
        volume.get_fdata() for volume in scanner.acquire(anatomy_, dataclasses.replace(scan, lesions=0.0))
    )
    np.testing.assert_array_equal(labels, same_labels)
    assert np.percentile(damaged - healthy, 0.1) < -0.08 * healthy.max()


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(cohort, tmp_path):
    again = generate.generate(tmp_path / "again", cases=1, progress=iter)
    other = generate.generate(tmp_path / "other", cases=1, seed=1, progress=iter)
    for name in again.images:
        assert again.images[name].read_bytes() == cohort.images[name].read_bytes()
        assert again.truths[name].read_bytes() == cohort.truths[name].read_bytes()
        assert other.truths[name].read_bytes() != cohort.truths[name].read_bytes()


def test_complete_cohort_is_reused(copied, drawn):
    before = contents(copied)
    generate.generate(copied, cases=CASES, progress=iter)
    assert drawn == []
    assert contents(copied) == before


def test_missing_and_damaged_files_are_made_again(copied, drawn, cohort):
    (copied / "case_02.nii.gz").unlink()
    truth = copied.with_name("studies_truth") / "case_04.nii.gz"
    truth.write_bytes(truth.read_bytes()[:500])
    (copied / ".0123abcd.tmp.case_05.nii.gz").write_bytes(b"half a volume")
    generate.generate(copied, cases=CASES, progress=iter)
    assert drawn == [1, 3]
    assert contents(copied) == contents(cohort.folder)
    assert contents(truth.parent) == contents(cohort.truth)
    assert not list(copied.glob(".*"))


def test_interrupted_run_continues(tmp_path, drawn, cohort):
    def stop_at_second(loop):
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate.generate(tmp_path / "studies", cases=2, progress=stop_at_second)
    assert contents(tmp_path / "studies").keys() == {"case_01.nii.gz"}
    assert drawn == [0]
    finished = generate.generate(tmp_path / "studies", cases=2, progress=iter)
    assert drawn == [0, 1]
    for name, path in finished.images.items():
        assert path.read_bytes() == cohort.images[name].read_bytes()


def test_other_cohorts_and_other_images_are_left_alone(copied, tmp_path):
    before = contents(copied)
    with pytest.raises(StateError, match="'seed': 0"):
        generate.generate(copied, cases=CASES, seed=3, progress=iter)
    assert contents(copied) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "patient.nii").write_bytes(b"")
    with pytest.raises(StateError, match="not sample data"):
        generate.generate(tmp_path / "mine", progress=iter)


@pytest.mark.parametrize(("cases", "truth"), [(0, None), (100, None), (2, "studies"), (2, "studies/truth")])
def test_impossible_requests_are_refused(tmp_path, cases, truth):
    with pytest.raises(ConfigError):
        generate.generate(tmp_path / "studies", cases=cases, truth=truth and tmp_path / truth, progress=iter)
    assert not (tmp_path / "studies").exists()


def test_command_line(copied):
    command = [sys.executable, SAMPLE_DATA / "generate.py", copied, "--cases", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=copied)
    assert f"{CASES} volumes in {copied}" in done.stdout
    assert "Sample data: 100%" in done.stderr
    refused = subprocess.run([*command, "--seed", "3"], capture_output=True, text=True, check=False)
    assert refused.returncode == StateError.exit_code
    assert "Choose another folder" in refused.stderr
    assert "Traceback" not in refused.stderr


@settings(max_examples=200, deadline=None)
@given(index=st.integers(0, 98), seed=st.integers(0, 2**31))
def test_every_scan_covers_the_brain_in_plane_and_all_structures(index, seed):
    scan = scanner.draw_scan(index, seed)
    assert scan == scanner.draw_scan(index, seed)
    across, along, up = np.array(scan.shape) * scan.spacing
    assert 165 <= across <= 200
    assert 200 <= along <= 225
    assert 16 <= scan.shape[2] <= 32
    assert scan.centre[2] - up / 2 <= -60
    assert scan.centre[2] + up / 2 >= 30
    assert min(scan.levels) > 0


def test_template_structures_have_plausible_volumes():
    """In millilitres (voxels are 1 mm), from the ranges that volumetric studies of adults report."""
    ranges = {
        "lateral_ventricles": (8, 40),
        "deep_grey_nuclei": (28, 55),
        "brain_stem": (18, 40),
        "cerebellum": (100, 190),
    }
    template = anatomy.load_anatomy()
    for name, (low, high) in ranges.items():
        assert low < (template.labels == anatomy.LABELS[name]).sum() / 1000 < high, name


def test_template_structures_mirror_each_other():
    """The template is symmetric, so what is found on one side is found on the other."""
    template = anatomy.load_anatomy()
    middle = int(-template.origin[0])
    right, left = template.labels[middle + 1 :], template.labels[:middle][::-1]
    width = min(len(right), len(left))
    for value in anatomy.LABELS.values():
        one, other = right[:width] == value, left[:width] == value
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.97
