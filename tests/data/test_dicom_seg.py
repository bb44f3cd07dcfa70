"""A SEG says the same to us and to other programs, whatever series it was drawn on and whoever wrote it."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pydicom_seg
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given
from hypothesis import strategies as st

from make_dicom import write_multiframe
from phantoms import KINDS, Kind, octants, write_phantom
from samadapt.data.dicom import dicom_files, read_series, series_grid
from samadapt.data.dicom_seg import code_of, read_seg, write_seg
from samadapt.data.volume import Geometry, read_label
from samadapt.errors import InputError

NAMES = {2: "left kidney", 5: "something of ours", 7: "not drawn"}


def series_of(folder):
    images = [pydicom.dcmread(path, stop_before_pixels=True) for path in dicom_files(folder)]
    return series_grid(images, "here"), images


def made(tmp_path, kind="axial", values=(2, 5)):
    grid, images = series_of(write_phantom(tmp_path / "series", KINDS[kind]))
    mask = octants(grid.geometry.shape, values)
    return grid, images, mask, write_seg(mask, NAMES, grid, images, "Doe^Jane")


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_is_that_of_the_voxels(tmp_path, kind):
    folder = write_phantom(tmp_path / "series", KINDS[kind])
    grid, _ = series_of(folder)
    series = read_series(folder)
    assert grid.geometry.matches(Geometry(series.array.shape, series.affine))
    assert len(grid.frames) == series.array.shape[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_comes_back_voxel_for_voxel_and_name_for_name(tmp_path, kind):
    grid, _, mask, seg = made(tmp_path, kind)
    back = read_seg(seg, grid)
    assert back.values == {1: "left kidney", 2: "something of ours"}
    assert (back.mask == np.select([mask == 2, mask == 5], [1, 2])).all()
    assert back.remarks == ()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "single slice"])
def test_an_independent_reader_finds_the_same_at_the_same_place(tmp_path, kind):
    """dcmqi, a C++ program, writes one image per segment; ITK says where its voxels lie."""
    grid, _, mask, seg = made(tmp_path, kind)
    seg.save_as(tmp_path / "seg.dcm", write_like_original=False)
    words = [str(Path(sys.executable).parent / "segimage2itkimage"), "--inputDICOM", str(tmp_path / "seg.dcm")]
    subprocess.run([*words, "--outputDirectory", str(tmp_path), "-t", "nii"], check=True, capture_output=True)
    about = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"]
    assert [part[0]["SegmentLabel"] for part in about] == ["left kidney", "something of ours"]
    for number, value in ((1, 2), (2, 5)):
        found = sitk.ReadImage(str(tmp_path / f"{number}.nii.gz"))
        for voxel in np.argwhere(mask == value):
            lps = np.diag([-1, -1, 1]) @ grid.geometry.to_world(voxel[None])[0]
            assert found[found.TransformPhysicalPointToIndex(lps.tolist())] > 0
        assert (sitk.GetArrayFromImage(found) > 0).sum() == (mask == value).sum()


def test_another_independent_reader_agrees(tmp_path):
    _grid, _, mask, seg = made(tmp_path)
    result = pydicom_seg.SegmentReader().read(pydicom.dcmread(_saved(tmp_path, seg)))
    assert [result.segment_infos[n].SegmentLabel for n in (1, 2)] == ["left kidney", "something of ours"]
    for number, value in ((1, 2), (2, 5)):
        assert result.segment_data(number).sum() == (mask == value).sum()


def _saved(tmp_path, seg):
    seg.save_as(tmp_path / "saved.dcm", write_like_original=False)
    return tmp_path / "saved.dcm"


def test_a_mask_with_only_the_second_label_keeps_the_second_name(tmp_path):
    grid, images = series_of(write_phantom(tmp_path / "series", KINDS["axial"]))
    mask = np.zeros(grid.geometry.shape, np.uint8)
    mask[1, 2, 3] = 2
    seg = write_seg(mask, {1: "first", 2: "second"}, grid, images)
    assert read_seg(seg, grid).values == {1: "second"}


def test_thirty_classes(tmp_path):
    grid, images = series_of(write_phantom(tmp_path / "series", KINDS["oblique"]))
    mask = np.zeros(grid.geometry.shape, np.uint8)
    mask.flat[np.arange(30) * 7] = np.arange(1, 31)
    back = read_seg(write_seg(mask, {n: f"class {n}" for n in range(1, 31)}, grid, images), grid)
    assert back.values == {n: f"class {n}" for n in range(1, 31)}
    assert (back.mask == mask).all()


def test_an_empty_mask_and_one_of_another_shape_are_refused(tmp_path):
    grid, images = series_of(write_phantom(tmp_path / "series", KINDS["axial"]))
    for mask in (np.zeros(grid.geometry.shape, np.uint8), np.ones((2, 2, 2), np.uint8)):
        with pytest.raises(InputError):
            write_seg(mask, {}, grid, images)


def test_a_seg_refers_to_its_images_and_patient(tmp_path):
    grid, images, _mask, seg = made(tmp_path)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == grid.series
    assert (seg.PatientID, seg.StudyInstanceUID) == (images[0].PatientID, images[0].StudyInstanceUID)
    place = {uid: k for k, (uid, _) in enumerate(grid.frames)}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        named = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        lps = np.array(frame.PlanePositionSequence[0].ImagePositionPatient)
        ras = grid.geometry.to_world(np.array([[0, 0, place[named]]]))[0]
        assert np.allclose(lps, np.diag([-1, -1, 1]) @ ras)


def test_names_get_codes_that_others_know():
    assert [code_of(name)[1].value for name in ("Liver", "left kidney", "tumour")] == [
        "10200004",
        "18639004",
        "108369006",
    ]
    category, private = code_of("a name of our own " * 5)
    assert private.scheme_designator == "99SAMADAPT"
    assert len(private.value) <= 16
    assert len(private.meaning) <= 64
    assert code_of("Our  NAME")[1].value == code_of("our name")[1].value
    assert category.value == "123037004"


def test_frames_are_placed_by_where_they_lie_not_by_their_order(tmp_path):
    """OHIF's own export runs the other way along z."""
    grid, _, _mask, seg = made(tmp_path)
    expected = read_seg(seg, grid).mask
    seg = pydicom.dcmread(_saved(tmp_path, seg))
    pixels = seg.pixel_array[::-1]
    seg.PerFrameFunctionalGroupsSequence = seg.PerFrameFunctionalGroupsSequence[::-1]
    seg.PixelData = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    assert (read_seg(pydicom.dcmread(_saved(tmp_path, seg)), grid).mask == expected).all()


def test_frames_of_another_orientation_are_placed_too(tmp_path):
    """The same plane with rows and columns exchanged, as programs write it that segment reformatted images."""
    grid, _, _mask, seg = made(tmp_path, "long pixels")
    expected = read_seg(seg, grid).mask
    seg = pydicom.dcmread(_saved(tmp_path, seg))
    pixels = seg.pixel_array.swapaxes(1, 2)
    shared = seg.SharedFunctionalGroupsSequence[0]
    turned = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [*turned[3:], *turned[:3]]
    measures = shared.PixelMeasuresSequence[0]
    measures.PixelSpacing = list(measures.PixelSpacing)[::-1]
    seg.Rows, seg.Columns = seg.Columns, seg.Rows
    seg.PixelData = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    assert (read_seg(pydicom.dcmread(_saved(tmp_path, seg)), grid).mask == expected).all()


def test_a_seg_on_another_grid_or_beyond_the_series_is_refused(tmp_path):
    grid, _, _, seg = made(tmp_path)
    for shift in ((0.0, 0.0, 1.0), (0.0, 0.25, 0.0), (500.0, 0.0, 0.0)):
        moved = copy.deepcopy(pydicom.dcmread(_saved(tmp_path, seg)))
        for frame in moved.PerFrameFunctionalGroupsSequence:
            place = frame.PlanePositionSequence[0]
            place.ImagePositionPatient = [float(a) + b for a, b in zip(place.ImagePositionPatient, shift, strict=True)]
        with pytest.raises(InputError):
            read_seg(moved, grid)


def test_frames_without_a_place_go_to_the_image_they_name(tmp_path):
    grid, _, _mask, seg = made(tmp_path)
    expected = read_seg(seg, grid).mask
    seg = pydicom.dcmread(_saved(tmp_path, seg))
    for frame in seg.PerFrameFunctionalGroupsSequence:
        del frame.PlanePositionSequence
    assert (read_seg(seg, grid).mask == expected).all()
    for frame in seg.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence
    with pytest.raises(InputError):
        read_seg(seg, grid)


def test_where_segments_overlap_the_smaller_stays_visible(tmp_path):
    grid, images = series_of(write_phantom(tmp_path / "series", KINDS["axial"]))
    organ = np.zeros(grid.geometry.shape, np.uint8)
    organ[1:7, 1:9, 1:5] = 1
    seg = pydicom.dcmread(_saved(tmp_path, write_seg(organ, {1: "organ"}, grid, images)))
    tumour = copy.deepcopy(seg.SegmentSequence[0])
    tumour.SegmentNumber, tumour.SegmentLabel = 2, "tumour"
    seg.SegmentSequence.append(tumour)
    frame = copy.deepcopy(seg.PerFrameFunctionalGroupsSequence[0])
    frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 2
    seg.PerFrameFunctionalGroupsSequence.append(frame)
    small = np.zeros((1, seg.Rows, seg.Columns), np.uint8)
    small[0, 3, 4] = 1
    seg.PixelData = np.packbits(np.concatenate([seg.pixel_array, small]).ravel(), bitorder="little").tobytes()
    seg.NumberOfFrames += 1
    label = read_seg(pydicom.dcmread(_saved(tmp_path, seg)), grid)
    assert label.values == {1: "organ", 2: "tumour"}
    assert label.mask[4, 3, 1] == 2
    assert (label.mask > 0).sum() == organ.sum()
    assert "1 voxels" in label.remarks[0]
    assert "'organ' and 'tumour'" in label.remarks[0]


def test_a_multiframe_series_whose_frames_are_in_no_order(tmp_path):
    heights = [4, 0, 6, 2]
    path = write_multiframe(tmp_path / "ct.dcm", np.zeros((4, 5, 3), np.int16), [(0, 0, z) for z in heights])
    image = pydicom.dcmread(path)
    image.FrameOfReferenceUID = pydicom.uid.generate_uid()
    grid = series_grid([image], "here")
    assert [frame for _, frame in grid.frames] == [2, 4, 1, 3]
    mask = octants(grid.geometry.shape)
    back = read_seg(write_seg(mask, NAMES, grid, [image]), grid)
    assert (back.mask == np.select([mask == 2, mask == 5], [1, 2])).all()


@given(st.data())
def test_any_direction_any_spacing_any_mask(tmp_path_factory, data):
    angles = data.draw(st.tuples(*[st.floats(-3, 3)] * 3))
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*angles)
    axes = np.array(turn.GetMatrix()).reshape(3, 3)
    spacing = data.draw(st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)))
    kind = Kind(
        row=tuple(axes[:, 0]),
        column=tuple(axes[:, 1]),
        gap=data.draw(st.floats(0.5, 9)),
        spacing=tuple(round(s, 4) for s in spacing),
        slices=data.draw(st.integers(1, 4)),
    )
    grid, images = series_of(write_phantom(tmp_path_factory.mktemp("s") / "series", kind, (4, 3)))
    flat = data.draw(st.lists(st.integers(0, 3), min_size=12 * kind.slices, max_size=12 * kind.slices))
    mask = np.array(flat, np.uint8).reshape(grid.geometry.shape)
    if mask.any():
        back = read_seg(write_seg(mask, {n: f"n{n}" for n in (1, 2, 3)}, grid, images), grid)
        named = {int(name[1:]): value for value, name in back.values.items()}
        assert {n: (mask == n).sum() for n in (1, 2, 3) if (mask == n).any()} == {
            n: (back.mask == value).sum() for n, value in named.items()
        }
        assert all(((back.mask == value) == (mask == n)).all() for n, value in named.items())


def test_labels_are_read_as_files_too(tmp_path):
    """What the datastore keeps is read by the training: the same voxels."""
    from samadapt.data.volume import write_mask

    grid, _, mask, _ = made(tmp_path, "oblique")
    write_mask(tmp_path / "m.nii.gz", mask, grid.geometry)
    assert (read_label(tmp_path / "m.nii.gz", grid.geometry) == mask).all()


def test_names_in_any_script_survive_the_file(tmp_path):
    grid, images = series_of(write_phantom(tmp_path / "series", KINDS["axial"]))
    for image in images:
        image.SpecificCharacterSet = "ISO_IR 192"
        image.PatientName = "Müller^日本語"
    seg = write_seg(octants(grid.geometry.shape, (2, 5)), {2: "肝臓 Ω", 5: "a\\b\0c"}, grid, images)
    back = pydicom.dcmread(_saved(tmp_path, seg))
    assert str(back.PatientName) == "Müller^日本語"
    assert [segment.SegmentLabel for segment in back.SegmentSequence] == ["肝臓 Ω", "a b c"]
