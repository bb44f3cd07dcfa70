import contextlib
import gzip
import itertools
import json

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from samadapt.data.geometry import turn_to_lps
from samadapt.data.volume import Geometry, looks_like_ct, read_label, read_volume, write_mask
from samadapt.errors import InputError

SHAPE = (4, 5, 6)
GREY = np.arange(120, dtype=np.int16).reshape(SHAPE) - 20
AFFINE = np.array([[-0.7, 0.0, 0.0, 10], [0, -0.7, 0, 20], [0, 0, 3.0, -5], [0, 0, 0, 1]])
LABEL = (np.arange(120).reshape(SHAPE) % 3).astype(np.uint8)
CODES = ["".join(c) for axes in itertools.permutations(("LR", "PA", "SI")) for c in itertools.product(*axes)]

one_file = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def save_nifti(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def save_itk(path, array, affine=AFFINE, **options):
    """``array`` (I, J, K[, C]) with the given voxel -> RAS affine."""
    channels = array.ndim == 4
    image = sitk.GetImageFromArray(np.swapaxes(array, 0, 2), isVector=channels)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), **options)
    return path


def reoriented(array, affine, code):
    """The same voxels at the same places, stored with other axes."""
    image = nib.Nifti1Image(array, affine)
    steps = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(code))
    turned = image.as_reoriented(steps)
    return np.asanyarray(turned.dataobj), turned.affine


def places(mask, affine):
    """World position (rounded) -> value, of every voxel that is not 0."""
    voxels = np.argwhere(mask)
    world = np.round(voxels @ affine[:3, :3].T + affine[:3, 3], 3) + 0.0
    return {tuple(place): mask[tuple(voxel)] for place, voxel in zip(world, voxels, strict=True)}


# Formats


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
def test_every_3d_format_gives_the_same_volume(tmp_path, name):
    save = save_nifti if ".nii" in name.lower() else save_itk
    volume = read_volume(save(tmp_path / name, GREY))
    np.testing.assert_array_equal(volume.array, GREY[None])
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.geometry.affine, AFFINE, atol=1e-6)
    assert not volume.is_2d
    assert not volume.is_colour


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", ">i2", ">f8"])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_every_type_of_number(tmp_path, dtype, name):
    array = (GREY + 20).astype(dtype)
    if name.endswith("gz"):
        nib.save(nib.Nifti1Image(array, AFFINE, dtype=array.dtype), tmp_path / name)
    else:
        nrrd.write(str(tmp_path / name), array)
    np.testing.assert_array_equal(read_volume(tmp_path / name).array[0], GREY + 20)


def test_nifti_scale_is_applied(tmp_path):
    image = nib.Nifti1Image(GREY, AFFINE)
    image.header.set_slope_inter(0.5, -100)
    nib.save(image, tmp_path / "a.nii")
    stored = nib.load(tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").array[0], stored.get_fdata(), rtol=1e-6)


def test_sheared_nifti(tmp_path):
    affine = AFFINE.copy()
    affine[1, 2] = 1.1
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", GREY, affine))
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-6)


def test_nifti_without_orientation_lies_where_slicer_puts_it(tmp_path):
    image = nib.Nifti1Image(GREY, None)
    image.header.set_zooms((0.5, 0.6, 2.0))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").geometry.affine, np.diag([-0.5, -0.6, 2, 1]), atol=1e-6)
    itk_image = sitk.ReadImage(str(tmp_path / "a.nii"))
    assert itk_image.GetOrigin() == (0, 0, 0)
    assert itk_image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 1, 1)])
def test_one_slice_nifti_is_2d(tmp_path, shape):
    volume = read_volume(save_nifti(tmp_path / "a.nii", np.ones(shape, np.float32)))
    assert volume.is_2d
    assert volume.array.shape == (1, 4, 5, 1)


def test_one_time_point_is_a_volume(tmp_path):
    np.testing.assert_array_equal(read_volume(save_nifti(tmp_path / "a.nii", GREY[..., None])).array[0], GREY)


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4, 5, 1, 3), (3, 4, 1, 7), (2, 2, 2, 2, 2)])
def test_more_axes_are_refused_by_name(tmp_path, shape):
    with pytest.raises(InputError, match=rf"{len(shape)}-D.*Save each time point") as caught:
        read_volume(save_nifti(tmp_path / "film.nii.gz", np.zeros(shape, np.float32)))
    assert caught.value.where.endswith("film.nii.gz")


def test_4d_nrrd_and_mha_are_refused(tmp_path):
    image = sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), np.float32), isVector=False)
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    for name in ("a.mha", "a.nrrd"):
        with pytest.raises(InputError, match="4-D"):
            read_volume(tmp_path / name)


def test_one_dimension_is_no_image(tmp_path):
    with pytest.raises(InputError, match="no image"):
        read_volume(save_nifti(tmp_path / "a.nii", np.zeros(7, np.float32)))


def test_2d_mha(tmp_path):
    image = sitk.GetImageFromArray(GREY[:, :, 0].T.copy())
    image.SetSpacing((0.4, 0.8))
    image.SetOrigin((3, 4))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    volume = read_volume(tmp_path / "a.mha")
    np.testing.assert_array_equal(volume.array[0, :, :, 0], GREY[:, :, 0])
    np.testing.assert_allclose(volume.geometry.affine, [[-0.4, 0, 0, -3], [0, -0.8, 0, -4], [0, 0, 1, 0], [0, 0, 0, 1]])


# Colour


RGB = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("names", ["RGB", "RGBA"])
def test_colour_nifti(tmp_path, names):
    array = np.zeros(SHAPE, dtype=[(n, "u1") for n in names])
    for n, name in enumerate("RGB"):
        array[name] = RGB[..., n]
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", array))
    assert volume.modality == "RGB"
    assert volume.array.dtype == np.uint8
    np.testing.assert_array_equal(volume.array, np.moveaxis(RGB, -1, 0))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_colour_nrrd_and_mha(tmp_path, name, channels):
    array = np.concatenate([RGB, np.full((*SHAPE, 1), 9, np.uint8)], axis=-1)[..., :channels]
    volume = read_volume(save_itk(tmp_path / name, array))
    np.testing.assert_array_equal(volume.array, np.moveaxis(RGB, -1, 0))


def test_vectors_are_no_colours(tmp_path):
    with pytest.raises(InputError, match="2 values per voxel"):
        read_volume(save_itk(tmp_path / "a.mha", RGB[..., :2]))
    with pytest.raises(InputError, match="float32: neither a colour image"):
        read_volume(save_itk(tmp_path / "b.mha", RGB.astype(np.float32)))


# Pictures


PIXELS = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)  # (rows, columns)
COLOUR = np.random.default_rng(2).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".PNG"])
def test_grey_picture(tmp_path, suffix):
    Image.fromarray(PIXELS).save(tmp_path / f"a{suffix}")
    volume = read_volume(tmp_path / f"a{suffix}")
    assert volume.is_2d
    assert volume.display_ready
    assert volume.modality == "unknown"
    assert volume.geometry.shape == (7, 5, 1)
    np.testing.assert_array_equal(volume.array[0, :, :, 0], PIXELS.T)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_picture(tmp_path, mode):
    picture = Image.fromarray(COLOUR).convert(mode)
    picture.save(tmp_path / "a.png")
    expected = np.asarray(picture.convert("RGB"))
    volume = read_volume(tmp_path / "a.png")
    assert volume.modality == "RGB"
    np.testing.assert_array_equal(volume.array[:, :, :, 0], expected.transpose(2, 1, 0))


def test_transparency_is_dropped_not_blended(tmp_path):
    rgba = np.dstack([COLOUR, np.zeros((5, 7), np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.png").array[:, :, :, 0], COLOUR.transpose(2, 1, 0))


def test_grey_with_alpha(tmp_path):
    Image.fromarray(PIXELS).convert("LA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.png").array[0, :, :, 0], PIXELS.T)


def test_one_bit_picture(tmp_path):
    Image.fromarray(PIXELS > 100).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.png").array[0, :, :, 0], (PIXELS > 100).T * 255)
    np.testing.assert_array_equal(read_label(tmp_path / "a.png")[:, :, 0], (PIXELS > 100).T)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_picture(tmp_path, suffix):
    deep = PIXELS.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / f"a{suffix}")
    volume = read_volume(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(volume.array[0, :, :, 0], deep.T)
    assert not volume.display_ready


def test_jpeg(tmp_path):
    Image.fromarray(np.full((5, 7, 3), 90, np.uint8)).save(tmp_path / "a.jpg")
    np.testing.assert_allclose(read_volume(tmp_path / "a.jpg").array, 90, atol=2)


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "a.jpg")
    assert read_volume(tmp_path / "a.jpg").array.shape == (3, 7, 5, 1)


def test_many_pages_are_refused(tmp_path):
    pages = [Image.fromarray(PIXELS)] * 3
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match="3 pages"):
        read_volume(tmp_path / "a.tif")


# Values


def test_nan_and_infinity_become_finite(tmp_path):
    array = GREY.astype(np.float32)
    array[0, 0, :3] = np.nan, np.inf, -np.inf
    values = read_volume(save_nifti(tmp_path / "a.nii.gz", array)).array[0]
    assert values[0, 0, :3].tolist() == [-17, 99, -17]
    np.testing.assert_array_equal(values[1:], GREY[1:])


def test_values_beyond_float32(tmp_path):
    array = GREY.astype(np.float64)
    array[0, 0, 0] = 1e300
    assert read_volume(save_nifti(tmp_path / "a.nii.gz", array)).array.max() == 99


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_nothing_finite(tmp_path, fill):
    with pytest.raises(InputError, match="no finite value"):
        read_volume(save_nifti(tmp_path / "a.nii.gz", np.full(SHAPE, fill, np.float32)))


def test_complex_values(tmp_path):
    with pytest.raises(InputError, match="complex64"):
        read_volume(save_nifti(tmp_path / "a.nii.gz", np.ones(SHAPE, np.complex64)))


def test_constant_image(tmp_path):
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", np.full(SHAPE, 7, np.int16)))
    assert (volume.array == 7).all()


def test_volume_does_not_hang_on_its_file(tmp_path):
    path = save_nifti(tmp_path / "a.nii", GREY.astype(np.float32))
    volume = read_volume(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(volume.array[0], GREY)


# Modality


def phantom(low, high, air):
    rng = np.random.default_rng(0)
    values = rng.uniform(low, high, (20, 20, 20)).astype(np.float32)
    values[:8] = air
    return values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (phantom(-100, 400, -1000), True),
        (phantom(-100, 400, -3024), True),
        (phantom(-100, 400, 0), False),  # a crop without air, or MR
        (phantom(0, 2000, 0), False),
        (phantom(-4096, 4095, -4096), False),  # MR phase
        (phantom(-3, 9, -3), False),  # z-scores
        (np.full((4, 4, 4), -1000.0), False),
    ],
)
def test_ct_is_known_by_its_units(values, expected):
    assert looks_like_ct(values) is expected


# Damage


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file") as caught:
        read_volume(tmp_path / "none.nii.gz")
    assert "none.nii.gz" in str(caught.value)


def damaged(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_volume(path)
    assert caught.value.where == str(path)
    assert caught.value.remedy
    return str(caught.value)


def test_text_named_nifti(tmp_path):
    assert "not gzip-compressed" in damaged(tmp_path, "a.nii.gz", b"<html>404</html>")
    damaged(tmp_path, "a.nii", b"hello" * 100)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.png", "a.jpg", "a.tif"])
def test_empty_file(tmp_path, name):
    assert "0 bytes" in damaged(tmp_path, name, b"")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.png", "a.jpg"])
def test_truncated_file(tmp_path, name):
    whole = tmp_path / f"whole_{name}"
    if ".nii" in name:
        save_nifti(whole, np.random.default_rng(0).random((20, 20, 20)))
    elif name.endswith(("png", "jpg")):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(whole)
    else:
        save_itk(whole, np.random.default_rng(0).random((20, 20, 20)))
    data = whole.read_bytes()
    damaged(tmp_path, name, data[: len(data) * 2 // 3])


def test_gzip_of_something_else(tmp_path):
    damaged(tmp_path, "a.nii.gz", gzip.compress(b"not an image" * 99))


def test_unknown_format(tmp_path):
    assert "NRRD" in damaged(tmp_path, "notes.docx", b"PK")


@given(data=st.binary(max_size=600), name=st.sampled_from(["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.png", "a.tif"]))
@one_file
def test_any_bytes_are_read_or_refused(tmp_path, data, name):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_volume(path)


@given(place=st.integers(0, 351), value=st.integers(0, 255))
@settings(parent=one_file, max_examples=150)
def test_any_byte_of_a_header_may_be_wrong(tmp_path, place, value):
    path = save_nifti(tmp_path / "a.nii", GREY)
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        assert np.isfinite(read_volume(path).array).all()


# Labels


@pytest.mark.parametrize(
    ("top", "dtype"), [(2, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.int32)]
)
def test_label_type_follows_its_values(tmp_path, top, dtype):
    label = LABEL.astype(np.int32)
    label[0, 0, 0] = top
    values = read_label(save_nifti(tmp_path / "l.nii.gz", label))
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, label)


def test_label_stored_as_float(tmp_path):
    values = read_label(save_nifti(tmp_path / "l.nii.gz", LABEL.astype(np.float32)))
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, LABEL)


@pytest.mark.parametrize("bad", [0.5, np.nan, np.inf])
def test_label_with_fractions(tmp_path, bad):
    label = LABEL.astype(np.float32)
    label[1, 1, 1] = bad
    with pytest.raises(InputError, match="fractions or missing"):
        read_label(save_nifti(tmp_path / "l.nii.gz", label))


def test_negative_label(tmp_path):
    with pytest.raises(InputError, match="run from -20 to 99"):
        read_label(save_nifti(tmp_path / "l.nii.gz", GREY))


def test_label_on_another_grid_names_both(tmp_path):
    geometry = read_volume(save_nifti(tmp_path / "i.nii.gz", GREY)).geometry
    shifted = AFFINE.copy()
    shifted[2, 3] += 3
    with pytest.raises(InputError, match=r"label 4x5x6 .*image 4x5x6 "):
        read_label(save_nifti(tmp_path / "l.nii.gz", LABEL, shifted), geometry)
    with pytest.raises(InputError, match=r"label 4x5x5 .*image 4x5x6 "):
        read_label(save_nifti(tmp_path / "l.nii.gz", LABEL[:, :, :5]), geometry)


@given(code=st.sampled_from(CODES))
@one_file
def test_label_in_another_orientation_is_turned(tmp_path, code):
    geometry = read_volume(save_nifti(tmp_path / "i.nii.gz", GREY)).geometry
    path = save_nifti(tmp_path / "l.nii.gz", *reoriented(LABEL, AFFINE, code))
    np.testing.assert_array_equal(read_label(path, geometry), LABEL)


def test_palette_entries_are_label_values(tmp_path):
    picture = Image.fromarray(PIXELS % 3).convert("P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "l.png")
    np.testing.assert_array_equal(read_label(tmp_path / "l.png")[:, :, 0], (PIXELS % 3).T)


def test_grey_stored_as_colour_is_a_label(tmp_path):
    Image.fromarray(np.dstack([PIXELS % 3] * 3)).save(tmp_path / "l.png")
    np.testing.assert_array_equal(read_label(tmp_path / "l.png")[:, :, 0], (PIXELS % 3).T)


def test_colours_are_no_label(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "l.png")
    with pytest.raises(InputError, match="colour picture"):
        read_label(tmp_path / "l.png")


def test_broken_label_picture_is_named(tmp_path):
    (tmp_path / "l.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"l\.png"):
        read_label(tmp_path / "l.png")


def test_jpeg_is_no_label(tmp_path):
    with pytest.raises(InputError, match="PNG"):
        read_label(tmp_path / "l.jpg")


# Masks


def test_any_orientation_round_trip(tmp_path):
    """Each voxel of the mask comes back at the same place in space, whatever the image's axes are."""
    expected = places(LABEL, AFFINE)
    for code in CODES:
        image, affine = reoriented(GREY, AFFINE, code)
        volume = read_volume(save_nifti(tmp_path / "i.nii", image, affine))
        native, _ = reoriented(LABEL, AFFINE, code)
        for name in ("m.nii.gz", "m.nrrd"):
            write_mask(tmp_path / name, native, volume.geometry)
            written = read_volume(tmp_path / name)
            assert places(written.array[0], written.geometry.affine) == expected
            np.testing.assert_array_equal(read_label(tmp_path / name, volume.geometry), native)
        turn = turn_to_lps(volume.geometry)
        np.testing.assert_array_equal(turn.forward(volume.array)[0], GREY)


@given(
    matrix=arrays(np.float64, (3, 3), elements=st.floats(-3, 3)),
    origin=arrays(np.float64, 3, elements=st.floats(-500, 500)),
    mask=arrays(np.uint8, SHAPE, elements=st.integers(0, 255)),
    name=st.sampled_from(["m.nii.gz", "m.nii", "m.nrrd"]),
)
@one_file
def test_any_affine_round_trip(tmp_path, matrix, origin, mask, name):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix + 4 * np.eye(3), origin
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.1:
        return
    geometry = Geometry(SHAPE, affine)
    write_mask(tmp_path / name, mask, geometry)
    np.testing.assert_array_equal(read_label(tmp_path / name, geometry), mask)
    np.testing.assert_allclose(read_volume(tmp_path / name).geometry.affine, affine, atol=1e-4)


@pytest.mark.parametrize("name", ["m.nii.gz", "m.nrrd"])
def test_itk_finds_mask_and_image_at_the_same_place(tmp_path, name):
    """What Slicer does on load."""
    image = sitk.ReadImage(str(save_itk(tmp_path / "i.mha", GREY)))
    write_mask(tmp_path / name, LABEL, read_volume(tmp_path / "i.mha").geometry, names={1: "spleen"})
    mask = sitk.ReadImage(str(tmp_path / name))
    for index in [(0, 0, 0), (3, 4, 5)]:
        np.testing.assert_allclose(
            mask.TransformIndexToPhysicalPoint(index), image.TransformIndexToPhysicalPoint(index), atol=1e-4
        )
    np.testing.assert_array_equal(np.swapaxes(sitk.GetArrayFromImage(mask), 0, 2), LABEL)


def test_raw_nrrd_is_a_header_and_the_bytes(tmp_path):
    """What OHIF relies on: uint8, i fastest, nothing after the data."""
    write_mask(tmp_path / "m.nrrd", LABEL, Geometry(SHAPE, AFFINE), compress=False)
    header, data = (tmp_path / "m.nrrd").read_bytes().split(b"\n\n", 1)
    assert data == LABEL.tobytes(order="F")
    text = header.decode("ascii")
    for line in ("type: uint8", "dimension: 3", "sizes: 4 5 6", "encoding: raw", "space: left-posterior-superior"):
        assert line in text


def test_gzip_nrrd(tmp_path):
    write_mask(tmp_path / "m.nrrd", LABEL, Geometry(SHAPE, AFFINE))
    assert b"encoding: gzip" in (tmp_path / "m.nrrd").read_bytes()
    np.testing.assert_array_equal(read_label(tmp_path / "m.nrrd"), LABEL)


def test_a_view_that_runs_backwards_can_be_written(tmp_path):
    write_mask(tmp_path / "m.nrrd", LABEL[::-1, :, ::-1], Geometry(SHAPE, AFFINE), compress=False)
    np.testing.assert_array_equal(read_label(tmp_path / "m.nrrd"), LABEL[::-1, :, ::-1])


def test_names_are_kept(tmp_path):
    names = {1: "left ventricle", 2: "Myokard (außen)"}
    for name in ("m.nrrd", "m.nii.gz"):
        write_mask(tmp_path / name, LABEL, Geometry(SHAPE, AFFINE), names=names)
        np.testing.assert_array_equal(read_label(tmp_path / name), LABEL)
    header = nrrd.read_header(str(tmp_path / "m.nrrd"))
    assert json.loads(header["label_names"]) == {"1": "left ventricle", "2": "Myokard (außen)"}
    (comment,) = nib.load(tmp_path / "m.nii.gz").header.extensions
    assert json.loads(comment.text) == {"1": "left ventricle", "2": "Myokard (außen)"}


@pytest.mark.parametrize("top", [255, 256, 65535])
@pytest.mark.parametrize("name", ["m.nii.gz", "m.nrrd", "m.png"])
def test_values_up_to_65535(tmp_path, name, top):
    mask = LABEL[:, :, :1].astype(np.int64)
    mask[0, 0, 0] = top
    write_mask(tmp_path / name, mask, Geometry(mask.shape, AFFINE))
    values = read_label(tmp_path / name)
    np.testing.assert_array_equal(values, mask)
    assert values.dtype == (np.uint8 if top == 255 else np.uint16)


def test_a_uint16_mask_stays_one(tmp_path):
    write_mask(tmp_path / "m.nii.gz", LABEL.astype(np.uint16), Geometry(SHAPE, AFFINE))
    assert nib.load(tmp_path / "m.nii.gz").get_data_dtype() == np.uint16


def test_boolean_mask(tmp_path):
    write_mask(tmp_path / "m.nii.gz", LABEL > 0, Geometry(SHAPE, AFFINE))
    np.testing.assert_array_equal(read_label(tmp_path / "m.nii.gz"), LABEL > 0)


def test_picture_mask_is_upright(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "i.png")
    volume = read_volume(tmp_path / "i.png")
    write_mask(tmp_path / "m.png", volume.array[0].astype(np.uint8), volume.geometry)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "m.png")), PIXELS)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("m.png", LABEL, "6 slices"),
        ("m.mha", LABEL, "suffix"),
        ("m.nii.gz", LABEL[:3], "shape"),
        ("m.nii.gz", LABEL.astype(np.float32), "whole numbers"),
        ("m.nii.gz", LABEL.astype(np.int32) - 1, "whole numbers"),
        ("m.nii.gz", LABEL.astype(np.int32) + 70000, "whole numbers"),
    ],
)
def test_masks_that_cannot_be_written_leave_nothing(tmp_path, name, mask, message):
    with pytest.raises(InputError, match=message):
        write_mask(tmp_path / name, mask, Geometry(SHAPE, AFFINE))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_mask(tmp_path, monkeypatch):
    path = tmp_path / "m.nii.gz"
    write_mask(path, LABEL, Geometry(SHAPE, AFFINE))
    monkeypatch.setattr(nib, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_mask(path, LABEL * 0, Geometry(SHAPE, AFFINE))
    np.testing.assert_array_equal(read_label(path), LABEL)
    assert [p.name for p in tmp_path.iterdir()] == ["m.nii.gz"]
