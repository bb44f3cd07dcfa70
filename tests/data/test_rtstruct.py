"""Contours become the voxels that lie inside them."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from phantoms import KINDS, write_phantom
from samadapt.data.dicom import dicom_files, series_grid
from samadapt.data.rtstruct import read_rtstruct, structure_names
from samadapt.data.volume import read_label
from samadapt.errors import InputError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
LPS = np.array([-1, -1, 1])


def grid_of(folder):
    return series_grid([pydicom.dcmread(path, stop_before_pixels=True) for path in dicom_files(folder)], "here")


def structures(grid, **contours):
    """A structure set; each contour is a list of (i, j) corners in voxels, and its k."""
    made = Dataset()
    made.StructureSetROISequence, made.ROIContourSequence = Sequence(), Sequence()
    for number, (name, drawn) in enumerate(contours.items(), start=10):
        roi, lines = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        lines.ReferencedROINumber, lines.ContourSequence = number, Sequence()
        for corners, k, *kind in drawn:
            line = Dataset()
            line.ContourGeometricType = kind[0] if kind else "CLOSED_PLANAR"
            voxels = np.column_stack([np.array(corners, float), np.full(len(corners), float(k))])
            line.ContourData = [round(float(x), 6) for x in (grid.geometry.to_world(voxels) * LPS).ravel()]
            lines.ContourSequence.append(line)
        made.StructureSetROISequence.append(roi)
        made.ROIContourSequence.append(lines)
    return made


def box(low, high):
    return [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]


@pytest.mark.parametrize("kind", KINDS)
def test_voxels_whose_centre_is_inside_belong_to_the_structure(tmp_path, kind):
    grid = grid_of(write_phantom(tmp_path / "s", KINDS[kind]))
    last = grid.geometry.shape[2] - 1
    label = read_rtstruct(structures(grid, organ=[(box((1.6, 2.4), (4.4, 6.6)), last)]), grid)
    expected = np.zeros(grid.geometry.shape, bool)
    expected[2:5, 3:7, last] = True
    assert ((label.mask == 1) == expected).all()
    assert label.values == {1: "organ"}


def test_a_contour_inside_another_is_a_hole_and_a_keyhole_is_one_too(tmp_path):
    grid = grid_of(write_phantom(tmp_path / "s", KINDS["oblique"]))
    outer, inner = box((0.5, 0.5), (6.5, 8.5)), box((2.5, 2.5), (4.5, 5.5))
    keyhole = [*outer, outer[0], inner[0], *inner[::-1], outer[0]]
    expected = np.zeros(grid.geometry.shape, bool)
    expected[1:7, 1:9, 2] = True
    expected[3:5, 3:6, 2] = False
    for drawn in ([(outer, 2), (inner, 2)], [(keyhole, 2)]):
        assert ((read_rtstruct(structures(grid, ring=drawn), grid).mask > 0) == expected).all()


def test_two_structures_one_in_the_other(tmp_path):
    grid = grid_of(write_phantom(tmp_path / "s", KINDS["axial"]))
    drawn = structures(grid, body=[(box((-0.5, -0.5), (7.5, 9.5)), 1)], tumour=[(box((1.5, 1.5), (3.5, 3.5)), 1)])
    label = read_rtstruct(drawn, grid)
    assert label.values == {1: "body", 2: "tumour"} == structure_names(drawn)
    assert [(label.mask == value).sum() for value in (1, 2)] == [80 - 4, 4]
    assert "4 voxels belong to both" in label.remarks[0]


def test_points_are_left_out_and_said(tmp_path):
    grid = grid_of(write_phantom(tmp_path / "s", KINDS["axial"]))
    drawn = structures(grid, organ=[(box((0.5, 0.5), (3.5, 3.5)), 1), ([(2, 2)], 1, "POINT")])
    label = read_rtstruct(drawn, grid)
    assert (label.mask > 0).sum() == 9
    assert "1 points" in label.remarks[0]


def test_contours_beyond_the_series_or_across_its_slices_are_refused(tmp_path):
    grid = grid_of(write_phantom(tmp_path / "s", KINDS["axial"]))
    for k in (17.0, -1.0):
        with pytest.raises(InputError):
            read_rtstruct(structures(grid, organ=[(box((1, 1), (4, 4)), k)]), grid)
    across = structures(grid, organ=[(box((1, 1), (4, 4)), 2)])
    points = across.ROIContourSequence[0].ContourSequence[0].ContourData
    points[2] = float(points[2]) + 4.0
    with pytest.raises(InputError):
        read_rtstruct(across, grid)
    with pytest.raises(InputError):
        read_rtstruct(structures(grid, organ=[]), grid)


@pytest.mark.requires_data
@pytest.mark.parametrize("name", ["dicom_ct_rtstruct", "dicom_sts_mr_rtstruct"])
def test_real_contours_give_the_official_mask(name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    grid = grid_of(folder / "dicom" / "image")
    label = read_rtstruct(pydicom.dcmread(next(dicom_files(folder / "dicom" / "rtstruct"))), grid)
    truth = read_label(next((folder / "labels").glob("*.nii.gz")), grid.geometry)
    found = label.mask > 0
    assert 2 * (found & (truth > 0)).sum() / (found.sum() + (truth > 0).sum()) > 0.999
    assert next(iter(label.values.values())).startswith("GTV")
