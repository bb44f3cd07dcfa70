"""One reader for every image format, one writer for masks; voxels stay in their native order throughout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its customary name
from PIL import Image

from samadapt.data.dicom import Series, is_dicom, read_series
from samadapt.data.geometry import LPS_FROM_RAS, Geometry, Turn, turn_to, turn_to_lps
from samadapt.errors import InputError
from samadapt.files import atomic_path

__all__ = ["Geometry", "Volume", "image_suffix", "read_label", "read_volume", "write_image", "write_mask"]

NIFTI = (".nii.gz", ".nii")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
LOSSY = (".jpg", ".jpeg")
SUFFIXES = NIFTI + ITK + PICTURES
"""Endings of the image files that :func:`read_volume` reads (DICOM files are known by their content)."""

_MODALITY = "modality="
_READABLE = "NIfTI (.nii, .nii.gz), NRRD, MHA, PNG, JPEG, TIFF, BMP, or a folder with one DICOM series"
_AGAIN = "Open it in a viewer to check it; if it was copied or downloaded, do that again."


@dataclass(frozen=True, eq=False)
class Volume:
    """An image as stored.

    Args:
        array: (C, I, J, K), C = 1 (grey, float32, finite) or 3 (colour, uint8 red-green-blue). Index order is that of
            the file, which is ITK's and MONAI Label's: for 2D images K = 1, i = column x, j = row y.
        geometry: the grid.
        modality: "CT", "MR", "US", ... from the DICOM tag; "RGB" for colour; otherwise "CT" where the values look
            like Hounsfield units (:func:`looks_like_ct`), else "unknown".
        path: where it was read from.
        display_ready: values are 8-bit grey or colour levels as shown on a screen (PNG, JPEG, ...).
    """

    array: np.ndarray
    geometry: Geometry
    modality: str
    path: Path
    display_ready: bool = False

    @property
    def is_2d(self) -> bool:
        """Whether there is one slice only."""
        return self.geometry.shape[2] == 1

    @property
    def is_colour(self) -> bool:
        """Whether there are three channels: red, green, blue."""
        return self.array.shape[0] == 3

    @cached_property
    def digest(self) -> str:
        """Hex name of the content, voxels and grid; the same in every process, whatever the file's name or format."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.array).data, digest_size=16)
        digest.update(repr([self.array.shape, self.array.dtype.str]).encode())
        digest.update(self.geometry.affine.tobytes())
        return digest.hexdigest()

    def turned(self, turn: Turn) -> Volume:
        """The same image on ``turn``'s other grid; a view of the voxels.

        It keeps its digest where models, which see every image turned to LPS, see the same slices.
        """
        other = replace(self, array=turn.forward(self.array), geometry=turn.turned)
        if turn_to_lps(other.geometry).turned.matches(turn_to_lps(self.geometry).turned):
            other.__dict__["digest"] = self.digest
        return other


@dataclass(frozen=True, eq=False)
class _Raw:
    """What a format reader gives: ``array`` (I, J, K) or (I, J, K, 3), as stored."""

    array: np.ndarray
    geometry: Geometry
    modality: str | None = None
    display_ready: bool = False


def image_suffix(name: str) -> str | None:
    """The suffix by which an image file's format is known (``".nii.gz"``), None for other files."""
    lower = name.lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)


def read_volume(path: str | Path) -> Volume:
    """Read an image file, or a folder with one DICOM series.

    Not-a-number becomes the smallest finite value, infinities the smallest or largest one. Alpha channels are
    dropped, palettes resolved, NIfTI's scale applied, trailing axes of length one dropped.

    Raises:
        InputError: missing, damaged, empty, of unknown format, 4-D, without a finite value.
    """
    path = Path(path)
    raw = _read(path)
    if raw.array.ndim == 4:
        array = np.moveaxis(_as_uint8(raw.array, path), -1, 0)
        return Volume(array, raw.geometry, raw.modality or "RGB", path, raw.display_ready)
    values = _finite_float32(raw.array, path)
    modality = raw.modality or ("CT" if not raw.display_ready and looks_like_ct(values) else "unknown")
    return Volume(values[None], raw.geometry, modality, path, raw.display_ready)


def read_label(path: str | Path, geometry: Geometry | None = None) -> np.ndarray:
    """Read a label: (I, J, K), uint8, uint16 or int32, whichever holds the largest value.

    A DICOM SEG or RTSTRUCT needs ``geometry``, the grid of the series that it was drawn on.

    Args:
        geometry: the image's grid. A label on the same grid with other axis order or direction is turned to it;
            any other difference is refused.

    Raises:
        InputError: fractional, negative or missing values, colour, a lossy format, or a grid that differs.
    """
    path = Path(path)
    _refuse_lossy(path)
    if geometry is not None and path.is_file() and is_dicom(path):
        return _read_drawn(path, geometry)
    raw = _read_indices(path) if _is_picture(path) else _read(path)
    values = _whole_numbers(raw.array, path)
    if geometry is None or raw.geometry.matches(geometry):
        return values
    if raw.geometry.in_space and geometry.in_space:
        turn = turn_to(raw.geometry, geometry)
        if turn.turned.matches(geometry):
            return turn.forward(values)
    raise InputError(
        f"the label does not lie on its image's grid: label {raw.geometry}; image {geometry}",
        where=path,
        remedy="Save the label on the image's own grid (in Slicer: set the image as reference geometry).",
    )


def _read_drawn(path: Path, geometry: Geometry) -> np.ndarray:
    """A SEG or RTSTRUCT on the grid of its series."""
    from samadapt.data.dicom_label_file import read_label_object  # its libraries take a second to import

    with _damage_named(path):
        return read_label_object(path, geometry).mask


def write_mask(
    path: str | Path,
    mask: np.ndarray,
    geometry: Geometry,
    names: dict[int, str] | None = None,
    compress: bool = True,
) -> None:
    """Write a label image on the native grid; nothing half-written is ever left under ``path``.

    Args:
        path: ``.nii.gz``, ``.nii``, ``.nrrd`` (a plain labelmap, in LPS, i fastest) or, for one slice, ``.png``.
        mask: (I, J, K) of whole numbers from 0 to 65535; stored as uint8, or as uint16 where it is that already or its
            values exceed 255.
        names: label value -> name, stored in the header of NRRD (key ``label_names``) and NIfTI (a comment).
        compress: NRRD only: gzip, or the raw bytes that OHIF reads.

    Raises:
        InputError: a shape other than the grid's, values that are no labels, an unknown suffix, a volume as PNG.
    """
    path = Path(path)
    if mask.shape != geometry.shape:
        raise InputError(f"the mask's shape is {mask.shape}, its image's {geometry.shape}", where=path)
    values = _storable(mask, path)
    suffix = image_suffix(path.name)
    if suffix not in (*NIFTI, ".nrrd", ".png"):
        raise InputError("masks are written as .nii.gz, .nii, .nrrd or .png", where=path, remedy="Change the suffix.")
    with atomic_path(path) as temporary:
        if suffix in NIFTI:
            _write_nifti(temporary, values, geometry, names)
        elif suffix == ".nrrd":
            _write_nrrd(temporary, values, geometry, names, "gzip" if compress else "raw")
        else:
            _write_png(temporary, values, path)


def write_image(path: str | Path, series: Series) -> None:
    """Write a DICOM series as ``.nii``, so that :func:`read_volume` gives the same voxels, grid and modality again.

    Whole numbers are stored with two bytes, which every viewer reads; nothing is compressed, so that it opens quickly.
    """
    array = series.array
    if array.ndim == 4:
        array = np.ascontiguousarray(array).view([(name, np.uint8) for name in "RGB"])[..., 0]
    else:
        array = _as_int16(array)
    image = nib.Nifti1Image(array, series.affine)
    _place_nifti(image, Geometry(_shape3(series.array), series.affine))
    image.header["descrip"] = f"{_MODALITY}{series.modality}".encode()[:79]
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def looks_like_ct(values: np.ndarray) -> bool:
    """Whether grey values are Hounsfield units, for formats that do not say so.

    Air lies near -1000: the smallest value is at most -500 (and no less than -9000). Leaving out the smallest value
    (padding outside the field of view), 95 % lie within [-1100, 3100] and at least 5 % are soft tissue or water
    ([-200, 300]). A crop without air is not recognised.
    """
    sample = values.reshape(-1)[:: max(1, values.size // 500_000)]
    lowest = float(sample.min())
    if not -9000 <= lowest <= -500:
        return False
    inside = sample[sample > lowest]
    if inside.size == 0:
        return False
    plausible = ((inside >= -1100) & (inside <= 3100)).mean()
    soft = ((inside >= -200) & (inside <= 300)).mean()
    return bool(plausible >= 0.95 and soft >= 0.05)


# Reading


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever a codec raises on a broken file becomes an InputError that names the file."""
    try:
        yield
    except InputError as error:
        if error.where is not None:
            raise
        raise InputError(error.what, where=path, remedy=error.remedy) from error
    except Exception as error:  # codecs raise anything from zlib.error to SyntaxError on damaged files
        detail = " ".join(str(error).split())[-200:]
        raise InputError(f"cannot be read ({type(error).__name__}: {detail})", where=path, remedy=_AGAIN) from error


def _read(path: Path) -> _Raw:
    if not path.exists():
        raise InputError("no such file or folder", where=path, remedy="Check the path.")
    with _damage_named(path):
        if path.is_dir() or is_dicom(path):
            series = read_series(path)
            return _Raw(series.array, Geometry(_shape3(series.array), series.affine), series.modality)
        if path.stat().st_size == 0:
            raise InputError("the file is empty (0 bytes)", where=path, remedy=_AGAIN)
        suffix = image_suffix(path.name)
        if suffix in NIFTI:
            return _read_nifti(path)
        if suffix in ITK:
            return _read_itk(path)
        if suffix in PICTURES:
            return _read_picture(path)
    raise InputError("not an image that samadapt reads", where=path, remedy=f"Use {_READABLE}.")


def _read_nifti(path: Path) -> _Raw:
    if path.name.lower().endswith(".gz"):
        with open(path, "rb") as handle:
            if handle.read(2) != b"\x1f\x8b":
                raise InputError("named .gz but not gzip-compressed", where=path, remedy="Rename it, or compress it.")
    image = nib.load(path)
    if not isinstance(image, nib.Nifti1Image):
        raise InputError(f"named as NIfTI but holds {type(image).__name__}", where=path, remedy="Save it as NIfTI.")
    array = np.asanyarray(image.dataobj)
    modality = _nifti_modality(image)
    if array.dtype.names is not None:
        array = np.stack([array[name] for name in "RGB"], axis=-1)
        return _Raw(_three_axes(array, path, channels=1), _geometry(array.shape[:-1], _nifti_affine(image)), modality)
    array = _three_axes(array, path, channels=0)
    return _Raw(array, Geometry(_shape3(array), _nifti_affine(image)), modality)


def _nifti_modality(image: nib.Nifti1Image) -> str | None:
    """What :func:`write_image` has noted; NIfTI has no field of its own for it."""
    text = bytes(image.header["descrip"]).decode("latin-1") if "descrip" in image.header else ""
    return text[len(_MODALITY) :].strip("\x00 ") or None if text.startswith(_MODALITY) else None


def _nifti_affine(image: nib.Nifti1Image) -> np.ndarray:
    header = image.header
    if "qform_code" in header and header["qform_code"] == 0 and header["sform_code"] == 0:
        # No orientation stored. ITK, and so Slicer, then places the first voxel at 0 with axes along L, P, S.
        return np.diag([*(LPS_FROM_RAS.diagonal()[:3] * _zooms(header)), 1.0])
    return np.asarray(image.affine)


def _zooms(header: nib.Nifti1Header) -> np.ndarray:
    zooms = np.ones(3)
    stored = header.get_zooms()[:3]
    zooms[: len(stored)] = stored
    return zooms


def _read_itk(path: Path) -> _Raw:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size = reader.GetSize()
    _refuse_more_axes(size, path)
    if 0 in size:
        raise InputError(f"the image is empty: its shape is {tuple(size)}", where=path, remedy=_AGAIN)
    image = sitk.ReadImage(str(path))
    channels = image.GetNumberOfComponentsPerPixel()
    if channels not in (1, 3, 4):
        raise _too_many(f"{channels} values per voxel", path)
    array = sitk.GetArrayFromImage(image)
    spatial = array.ndim - (1 if channels > 1 else 0)
    array = array.transpose(*range(spatial)[::-1], *range(spatial, array.ndim))
    array = _three_axes(array, path, channels=1 if channels > 1 else 0)
    return _Raw(array[..., :3] if channels == 4 else array, Geometry(_shape3(array), _itk_affine(image)))


def _itk_affine(image: sitk.Image) -> np.ndarray:
    """Voxel -> RAS mm of an ITK image; axes beyond the third are left out, missing ones are unit axes."""
    n = image.GetDimension()
    m = min(n, 3)
    direction = np.array(image.GetDirection()).reshape(n, n)
    lps = np.eye(4)
    lps[:m, :m] = (direction * np.array(image.GetSpacing()))[:m, :m]
    lps[:m, 3] = image.GetOrigin()[:m]
    return LPS_FROM_RAS @ lps


def _read_picture(path: Path) -> _Raw:
    with _one_page(path) as image:
        if image.mode in ("P", "PA"):
            image = image.convert("RGB")
        elif image.mode in ("LA", "La"):
            image = image.convert("L")
        elif image.mode not in ("1", "L", "F", "RGB") and not image.mode.startswith("I"):
            image = image.convert("RGB")
        if image.mode == "1":
            image = image.convert("L")
        array = np.asarray(image)
        return _Raw(_columns_first(array), _picture_geometry(array), None, array.dtype == np.uint8)


def _read_indices(path: Path) -> _Raw:
    """A picture as label: palette entries count as label values, equal channels as one."""
    with _damage_named(path), _one_page(path) as image:
        if image.mode in ("LA", "La"):
            image = image.convert("L")
        array = np.asarray(image)
    if array.ndim == 3:
        if not (array[..., :3] == array[..., :1]).all():
            raise InputError(
                "a colour picture cannot be a label",
                where=path,
                remedy="Save one whole number per pixel (8-bit grey): 0 for background, then 1, 2, ...",
            )
        array = array[..., 0]
    return _Raw(_columns_first(array), _picture_geometry(array))


def _one_page(path: Path) -> Image.Image:
    image = Image.open(path)
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        image.close()
        raise _too_many(f"{pages} pages", path)
    return image


def _picture_geometry(array: np.ndarray) -> Geometry:
    return Geometry((array.shape[1], array.shape[0], 1), LPS_FROM_RAS, in_space=False)


def _columns_first(array: np.ndarray) -> np.ndarray:
    """(H, W[, C]) -> (I = W, J = H, K = 1[, C])."""
    return np.expand_dims(np.swapaxes(array, 0, 1), 2)


def _is_picture(path: Path) -> bool:
    return path.is_file() and not is_dicom(path) and image_suffix(path.name) in PICTURES


def _three_axes(array: np.ndarray, path: Path, *, channels: int) -> np.ndarray:
    """Drop trailing axes of length one beyond the third, add missing ones; the last ``channels`` axes are kept."""
    spatial = array.shape[: array.ndim - channels]
    _refuse_more_axes(spatial, path)
    if len(spatial) < 2:
        raise InputError(f"a {len(spatial)}-D array is no image: its shape is {spatial}", where=path, remedy=_AGAIN)
    return array.reshape((*spatial, 1)[:3] + array.shape[array.ndim - channels :], order="A")


def _refuse_more_axes(shape: tuple[int, ...], path: Path) -> None:
    if any(n != 1 for n in shape[3:]):
        raise _too_many(f"{len(shape)}-D, shape {tuple(shape)}", path)


def _too_many(what: str, path: Path) -> InputError:
    return InputError(
        f"more than one 3-D grey or colour volume in one file ({what})",
        where=path,
        remedy="Save each time point, channel or page as a file of its own.",
    )


def _geometry(shape: tuple[int, ...], affine: np.ndarray) -> Geometry:
    padded = (*shape, 1, 1)[:3]
    return Geometry((padded[0], padded[1], padded[2]), affine)


def _shape3(array: np.ndarray) -> tuple[int, int, int]:
    return array.shape[0], array.shape[1], array.shape[2]


# Values


def _as_uint8(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype != np.uint8:
        raise InputError(
            f"three channels of {array.dtype}: neither a colour image (8 bits a channel) nor a grey volume",
            where=path,
            remedy="Save colour with 8 bits a channel, or each channel as a file of its own.",
        )
    return np.ascontiguousarray(array)


def _finite_float32(array: np.ndarray, path: Path) -> np.ndarray:
    """A float32 copy without NaN or infinity; values beyond float32's range count as infinite."""
    if array.dtype.kind not in "buif":
        raise InputError(f"values of type {array.dtype} are no grey values", where=path, remedy="Save real numbers.")
    with np.errstate(over="ignore"):
        values = np.array(array, dtype=np.float32)
    if array.dtype.kind != "f":
        return values
    finite = np.isfinite(values)
    if finite.all():
        return values
    if not finite.any():
        raise InputError("the image holds no finite value", where=path, remedy="Export it again from its source.")
    low, high = values[finite].min(), values[finite].max()
    return np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)


def _whole_numbers(array: np.ndarray, path: Path) -> np.ndarray:
    remedy = "Save the label with whole numbers: 0 for background, then 1, 2, ..."
    if array.ndim != 3 or array.dtype.kind not in "buif":
        raise InputError("this is no label image: it has colours or complex values", where=path, remedy=remedy)
    values = array
    if array.dtype.kind == "f":
        values = np.rint(array)
        if not np.isfinite(array).all() or np.abs(values - array).max() > 1e-3:
            raise InputError("the label holds fractions or missing values (NaN)", where=path, remedy=remedy)
    low, high = values.min(), values.max()
    if low < 0 or high > np.iinfo(np.int32).max:
        raise InputError(f"the label's values run from {low:g} to {high:g}", where=path, remedy=remedy)
    return values.astype(np.uint8 if high <= 255 else np.uint16 if high <= 65535 else np.int32)


def _refuse_lossy(path: Path) -> None:
    if image_suffix(path.name) in LOSSY:
        raise InputError(
            "JPEG blurs label values into ones that nobody drew", where=path, remedy="Save the label as PNG."
        )


def _storable(mask: np.ndarray, path: Path) -> np.ndarray:
    if mask.dtype.kind not in "bui" or mask.min() < 0 or mask.max() > 65535:
        raise InputError("a mask holds whole numbers from 0 to 65535", where=path)
    return mask.astype(np.uint16 if mask.dtype == np.uint16 or mask.max() > 255 else np.uint8, copy=False)


# Writing


def _write_nifti(path: Path, mask: np.ndarray, geometry: Geometry, names: dict[int, str] | None) -> None:
    image = nib.Nifti1Image(mask, geometry.affine)
    _place_nifti(image, geometry)
    image.header.set_intent("label")
    if names:
        comment = nib.nifti1.Nifti1Extension("comment", json.dumps(names).encode())
        image.header.extensions.append(comment)
    nib.save(image, path)


def _place_nifti(image: nib.Nifti1Image, geometry: Geometry) -> None:
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, code=1)
    # A qform cannot express shear; then the sform alone says where the voxels lie.
    image.set_qform(geometry.affine, code=0 if _is_sheared(geometry) else 1)


def _as_int16(array: np.ndarray) -> np.ndarray:
    """(I, J, K) with two bytes a voxel, or as it is where that would change a value."""
    whole = np.empty(array.shape, np.int16, order="F")
    for k in range(array.shape[2]):  # slice by slice, because volumes are large
        plane = array[:, :, k]
        if plane.min() < -32768 or plane.max() > 32767:
            return array
        whole[:, :, k] = plane
        if (whole[:, :, k] != plane).any():
            return array
    return whole


def _is_sheared(geometry: Geometry) -> bool:
    axes = geometry.affine[:3, :3] / np.array(geometry.spacing)
    return not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3)


def _write_nrrd(path: Path, mask: np.ndarray, geometry: Geometry, names: dict[int, str] | None, encoding: str) -> None:
    lps = LPS_FROM_RAS @ geometry.affine
    header: dict[str, object] = {
        "space": "left-posterior-superior",
        "space directions": lps[:3, :3].T,
        "space origin": lps[:3, 3],
        "kinds": ["domain", "domain", "domain"],
        "encoding": encoding,
    }
    if names:
        header["label_names"] = json.dumps(names)  # "labels" is NRRD's own field, for axes
    nrrd.write(str(path), mask, header, index_order="F", compression_level=1)


def _write_png(path: Path, mask: np.ndarray, target: Path) -> None:
    if mask.shape[2] != 1:
        raise InputError(
            f"a volume of {mask.shape[2]} slices does not fit into a PNG",
            where=target,
            remedy="Write .nii.gz or .nrrd.",
        )
    Image.fromarray(np.ascontiguousarray(mask[:, :, 0].T)).save(path)
