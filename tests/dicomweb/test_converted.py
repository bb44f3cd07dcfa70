"""Volumes as DICOM series: the same voxels at the same places, whatever order the file stores them in."""

from __future__ import annotations

import json
import os

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samadapt.data.dicom import read_series
from samadapt.data.geometry import LPS_FROM_RAS, Geometry, turn_to_series
from samadapt.data.volume import Volume, read_volume
from samadapt.dicomweb.converted import convert_all, folder_in, records, write_series
from samadapt.errors import InputError

TURNED = np.array([[0.8, -0.6, 0], [0.48, 0.64, -0.6], [0.36, 0.48, 0.8]])
GRIDS = {
    "right-handed": np.diag([-0.75, -0.5, 2.0]),
    "left-handed": np.diag([0.75, -0.5, 2.0]),
    "RAS": np.diag([0.75, 0.5, 2.0]),
    "upside down": np.diag([-0.75, -0.5, -2.0]),
    "oblique": TURNED @ np.diag([0.75, 0.5, 2.0]),
    "oblique, left-handed": TURNED @ np.diag([0.75, 0.5, -2.0]),
    "sagittal": np.array([[0, 0, 2.0], [0.75, 0, 0], [0, 0.5, 0]]),
    "slices along i": np.diag([3.0, 0.5, 0.75]),
    "slices along j, left-handed": np.diag([-0.5, 3.0, 0.75]),
}


def affine_of(directions):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions, (-20.25, 13.5, 40.125)
    return affine


def every_voxel_differs(shape=(5, 7, 4)):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 30


def volume_of(array, directions, path):
    return Volume(array[None].astype(np.float32), Geometry(array.shape, affine_of(directions)), "MR", path)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_series_has_the_volume_s_voxels_at_their_places(kind, tmp_path):
    volume = volume_of(every_voxel_differs(), GRIDS[kind], tmp_path / "a.nii")
    (tmp_path / "series").mkdir()
    _, _, instances = write_series(volume, "a", "a", tmp_path / "series")
    read = read_series(tmp_path / "series")
    turn = turn_to_series(volume.geometry)
    assert Geometry(read.array.shape, read.affine).matches(turn.turned)
    assert np.allclose(read.affine, turn.turned.affine, atol=1e-6)
    assert (turn.back(read.array) == volume.array[0]).all()
    in_space = nibabel.affines.apply_affine(read.affine, np.argwhere(read.array == -30)[0])
    assert np.allclose(in_space, volume.geometry.affine[:3, 3], atol=1e-6)
    stored = [pydicom.dcmread(path) for path in sorted((tmp_path / "series").iterdir())]
    assert [str(one.SOPInstanceUID) for one in stored] == instances


@given(
    st.permutations([0, 1, 2]),
    st.tuples(*[st.sampled_from([-1, 1])] * 3),
    st.tuples(*[st.floats(0.3, 4)] * 3),
    st.tuples(*[st.floats(-3, 3)] * 3),
)
@settings(max_examples=150)
def test_the_order_of_a_series_is_a_right_hand_with_slices_of_the_acquisition_plane(order, signs, spacing, angles):
    x, y, z = angles
    turn_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    turn_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    turn_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    directions = (turn_x @ turn_y @ turn_z @ np.eye(3)[:, order] * signs) * spacing
    geometry = Geometry((3, 4, 5), affine_of(directions))
    turn = turn_to_series(geometry)
    lps = (LPS_FROM_RAS @ turn.turned.affine)[:3, :3]
    assert np.cross(lps[:, 0], lps[:, 1]) @ lps[:, 2] > 0
    assert int(turn.steps[geometry.acquisition_axis, 0]) == 2
    array = every_voxel_differs((3, 4, 5))
    assert (turn.back(turn.forward(array)) == array).all()
    voxel = np.array([[2, 1, 3]])
    there = turn.voxels_forward(voxel)
    assert np.allclose(turn.turned.to_world(there), geometry.to_world(voxel), atol=1e-6)


@pytest.mark.parametrize(
    ("array", "tolerance"),
    [
        (np.linspace(-0.01, 0.02, 140), 0.03 / 65535),
        (np.linspace(-1e7, 3e7, 140), 4e7 / 65535),
        (np.full(140, 0.5), 0),
        (np.full(140, 40000.0), 0),
        (np.linspace(-32768, 32767, 140).round(), 0),
    ],
)
def test_values_come_back(array, tolerance, tmp_path):
    volume = volume_of(array.reshape(5, 7, 4), GRIDS["RAS"], tmp_path / "a.nii")
    (tmp_path / "series").mkdir()
    write_series(volume, "a", "a", tmp_path / "series")
    back = turn_to_series(volume.geometry).back(read_series(tmp_path / "series").array)
    assert np.abs(back - volume.array[0]).max() <= tolerance * 1.01


def test_what_cannot_be_a_series_is_said(tmp_path):
    sheared = np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 2.0]])
    with pytest.raises(InputError, match="perpendicular"):
        write_series(volume_of(every_voxel_differs(), sheared, tmp_path / "a.nii"), "a", "a", tmp_path)


def save(path, directions=GRIDS["left-handed"], add=0):
    nibabel.save(nibabel.Nifti1Image(every_voxel_differs() + add, affine_of(directions)), path)


def test_a_folder_is_kept_up_to_date(tmp_path):
    studies, done = tmp_path / "studies", []
    studies.mkdir()
    save(studies / "sub-7_a.nii.gz")
    save(studies / "plain.nii")
    (studies / "broken.nii.gz").write_bytes(b"nothing")
    problems = convert_all(studies, done.append)
    assert list(problems) == [str(studies / "broken.nii.gz")]
    first = {one.case: one for one in records(folder_in(studies))}
    assert first.keys() == {"sub-7_a", "plain"}
    assert (first["sub-7_a"].patient, first["plain"].patient) == ("sub-7", "plain")
    assert sorted(len(files) for files in done) == [4, 4]
    assert first["plain"].series != first["sub-7_a"].series  # of the same content

    done.clear()
    convert_all(studies, done.append)
    assert done == []

    os.utime(studies / "plain.nii", (1, 1))  # touched: the same content has the same names
    save(studies / "sub-7_a.nii.gz", add=1)
    convert_all(studies, done.append)
    second = {one.case: one for one in records(folder_in(studies))}
    assert second["plain"].instances == first["plain"].instances
    assert second["sub-7_a"].series != first["sub-7_a"].series
    assert not (folder_in(studies) / first["sub-7_a"].series).exists()

    (studies / "plain.nii").unlink()
    (folder_in(studies) / f"{second['sub-7_a'].series}.json").write_text("{")  # a damaged record
    convert_all(studies, done.append)
    assert [one.case for one in records(folder_in(studies))] == ["sub-7_a"]
    assert not (folder_in(studies) / second["plain"].series).exists()
    json.loads((folder_in(studies) / f"{second['sub-7_a'].series}.json").read_text())


def test_a_turned_volume_shows_models_the_same_slices(tmp_path):
    save(tmp_path / "a.nii", GRIDS["slices along j, left-handed"])
    volume = read_volume(tmp_path / "a.nii")
    turned = volume.turned(turn_to_series(volume.geometry))
    assert turned.digest == volume.digest
    assert turned.geometry.acquisition_axis == 2
