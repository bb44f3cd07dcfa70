import numpy as np
import pytest

from make_dicom import write_image, write_multiframe, write_rtstruct, write_stack
from samadapt.data.dicom import patient_id
from samadapt.data.volume import read_volume
from samadapt.errors import InputError

VOLUME = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6) - 50  # (slices, rows, columns)


def along_z(*heights):
    return [(-10.0, -20.0, height) for height in heights]


def test_slices_are_sorted_by_position_not_by_name(tmp_path):
    write_stack(tmp_path, VOLUME[[2, 0, 3, 1]], along_z(4, 0, 6, 2))
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[0], VOLUME.transpose(2, 1, 0))
    assert volume.modality == "CT"
    assert volume.geometry.orientation == "LPS"
    np.testing.assert_allclose(volume.geometry.spacing, (0.75, 0.5, 2.0))
    np.testing.assert_allclose(volume.geometry.affine[:3, 3], (10, 20, 0))


def test_every_slice_has_its_own_rescale(tmp_path):
    for n, slope in enumerate((1.0, 0.5, 3.0)):
        write_image(
            tmp_path / f"{n}.dcm",
            VOLUME[n],
            (0, 0, n),
            SeriesInstanceUID="1.2.3",
            RescaleSlope=slope,
            RescaleIntercept=-7.25,
        )
    array = read_volume(tmp_path).array[0]
    for n, slope in enumerate((1.0, 0.5, 3.0)):
        np.testing.assert_allclose(array[:, :, n], VOLUME[n].T * slope - 7.25)


def test_oblique_slices_keep_their_directions(tmp_path):
    c, s = np.cos(0.4), np.sin(0.4)
    directions = (c, s, 0.0, -s, c, 0.0)
    write_stack(tmp_path, VOLUME, along_z(0, 2, 4, 6), ImageOrientationPatient=list(directions))
    affine = read_volume(tmp_path).geometry.affine
    np.testing.assert_allclose(affine[:3, 0], np.array([-c, -s, 0]) * 0.75, atol=1e-6)
    np.testing.assert_allclose(affine[:3, 1], np.array([s, -c, 0]) * 0.5, atol=1e-6)


def test_gantry_tilt_becomes_shear(tmp_path):
    positions = [(0.0, 0.5 * n, 2.0 * n) for n in range(4)]
    geometry = read_volume(write_stack(tmp_path, VOLUME, positions)).geometry
    np.testing.assert_allclose(geometry.to_world(np.array([[0, 0, 3]]))[0], (0, -1.5, 6))


def test_rounding_of_positions_is_no_shear(tmp_path):
    positions = [(0.004 * n, 0.0, 2.0 * n) for n in range(4)]
    affine = read_volume(write_stack(tmp_path, VOLUME, positions)).geometry.affine
    np.testing.assert_allclose(affine[:3, 2], (0, 0, 2))


def test_missing_slice_is_refused_with_the_place(tmp_path):
    write_stack(tmp_path, VOLUME, along_z(0, 2, 6, 8))
    with pytest.raises(InputError, match=r"slices are missing: 4 mm between slice_001\.dcm and slice_002\.dcm"):
        read_volume(tmp_path)


def test_uneven_slices_are_refused(tmp_path):
    write_stack(tmp_path, VOLUME, along_z(0, 2, 4.6, 6.6))
    with pytest.raises(InputError, match="unevenly spaced"):
        read_volume(tmp_path)


def test_time_series_is_refused_as_4d(tmp_path):
    write_stack(tmp_path, VOLUME, along_z(0, 2, 0, 2))
    with pytest.raises(InputError, match="4-D"):
        read_volume(tmp_path)


def test_several_series_are_listed(tmp_path):
    write_stack(tmp_path / "a", VOLUME, along_z(0, 2, 4, 6), SeriesDescription="portal venous")
    write_stack(tmp_path / "b", VOLUME, along_z(0, 2, 4, 6), SeriesDescription="arterial")
    with pytest.raises(InputError, match="2 DICOM series") as caught:
        read_volume(tmp_path)
    assert "portal venous" in str(caught.value)
    assert "arterial" in str(caught.value)
    assert "own folder" in str(caught.value)


def test_scout_in_the_series_is_refused(tmp_path):
    write_stack(tmp_path, VOLUME, along_z(0, 2, 4, 6), SeriesInstanceUID="1.2.3")
    write_image(
        tmp_path / "scout.dcm",
        VOLUME[0],
        (0, 0, 0),
        SeriesInstanceUID="1.2.3",
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
    )
    with pytest.raises(InputError, match="ImageOrientationPatient"):
        read_volume(tmp_path)


def test_objects_that_are_no_images_are_skipped(tmp_path):
    write_stack(tmp_path, VOLUME, along_z(0, 2, 4, 6))
    write_rtstruct(tmp_path / "structures.dcm")
    (tmp_path / "readme.txt").write_text("notes")
    (tmp_path / ".hidden.dcm").write_bytes((tmp_path / "slice_000.dcm").read_bytes())
    assert read_volume(tmp_path).geometry.shape == (6, 5, 4)


def test_only_structures(tmp_path):
    write_rtstruct(tmp_path / "structures.dcm")
    with pytest.raises(InputError, match="only RTSTRUCT"):
        read_volume(tmp_path)


def test_folder_without_dicom(tmp_path):
    (tmp_path / "readme.txt").write_text("notes")
    with pytest.raises(InputError, match="no DICOM file at all"):
        read_volume(tmp_path)


def test_images_without_position(tmp_path):
    write_stack(tmp_path, VOLUME, [None] * 4)
    with pytest.raises(InputError, match="ImagePositionPatient"):
        read_volume(tmp_path)


def test_one_radiograph_without_position(tmp_path):
    path = write_image(tmp_path / "x.dcm", VOLUME[0], None, Modality="DX")
    volume = read_volume(path)
    assert volume.is_2d
    assert volume.modality == "DX"
    np.testing.assert_array_equal(volume.array[0, :, :, 0], VOLUME[0].T)
    np.testing.assert_allclose(volume.geometry.spacing, (0.75, 0.5, 2.0))


def test_monochrome1_is_inverted(tmp_path):
    path = write_image(tmp_path / "x.dcm", VOLUME[0], None, PhotometricInterpretation="MONOCHROME1")
    shown = read_volume(path).array[0, :, :, 0]
    assert np.ptp(shown + VOLUME[0].T) == 0


def test_colour(tmp_path):
    rgb = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    path = write_image(tmp_path / "x.dcm", rgb, None, Modality="US", SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1")
    volume = read_volume(path)
    assert volume.is_colour
    assert volume.modality == "US"
    np.testing.assert_array_equal(volume.array[:, :, :, 0], rgb.transpose(2, 1, 0))


def test_enhanced_multiframe(tmp_path):
    path = write_multiframe(tmp_path / "x.dcm", VOLUME[::-1], along_z(6, 4, 2, 0))
    volume = read_volume(path)
    np.testing.assert_allclose(volume.array[0], VOLUME.transpose(2, 1, 0) * 2.0 - 10)
    np.testing.assert_allclose(volume.geometry.affine[:3, 3], (10, 20, 0))
    np.testing.assert_allclose(volume.geometry.spacing, (0.75, 0.5, 2.0))


def test_film_is_refused(tmp_path):
    with pytest.raises(InputError, match="film over time"):
        read_volume(write_multiframe(tmp_path / "x.dcm", VOLUME, None))


def test_damaged_slice_names_the_folder(tmp_path):
    write_stack(tmp_path, VOLUME, along_z(0, 2, 4, 6))
    slice_file = tmp_path / "slice_002.dcm"
    slice_file.write_bytes(slice_file.read_bytes()[:200])
    with pytest.raises(InputError) as caught:
        read_volume(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_patient_id(tmp_path):
    write_stack(tmp_path / "named", VOLUME, along_z(0, 2, 4, 6))
    write_stack(tmp_path / "anonymous", VOLUME, along_z(0, 2, 4, 6), PatientID="")
    (tmp_path / "empty").mkdir()
    (tmp_path / "named" / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"junk" * 9)
    assert patient_id(tmp_path / "named") == "P7"
    assert patient_id(tmp_path / "anonymous") is None
    assert patient_id(tmp_path / "empty") is None
