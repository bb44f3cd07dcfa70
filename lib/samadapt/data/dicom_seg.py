"""Label maps as DICOM Segmentation objects (SEG): written by highdicom, read by where each frame lies in space."""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid
from pydicom.valuerep import PersonName

from samadapt import __version__
from samadapt.data.dicom import SeriesGrid, functional_group
from samadapt.data.dicom_label import MANUFACTURER, DicomLabel, Structure, label_map
from samadapt.data.geometry import LPS_FROM_RAS, MISMATCH_VOXELS
from samadapt.data.labels import same_name, values_in
from samadapt.errors import InputError

FIRST_SERIES_NUMBER = 300
"""Beyond those that scanners give, so that labels stand behind the images."""

_CREATOR_SHOWN = 36  # SeriesDescription has 64 characters

ANATOMY = Code("123037004", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")

_ABNORMAL_TYPES = {
    "tumor": Code("108369006", "SCT", "Neoplasm"),
    "tumour": Code("108369006", "SCT", "Neoplasm"),
    "neoplasm": Code("108369006", "SCT", "Neoplasm"),
    "lesion": Code("52988006", "SCT", "Lesion"),
    "cyst": Code("441457006", "SCT", "Cyst"),
    "edema": Code("79654002", "SCT", "Edema"),
    "oedema": Code("79654002", "SCT", "Edema"),
    "necrosis": Code("6574001", "SCT", "Necrosis"),
}
_ANATOMY_TYPES = {
    "left ventricle": Code("87878005", "SCT", "Left ventricle"),
    "right ventricle": Code("53085002", "SCT", "Right ventricle"),
    "myocardium": Code("74281007", "SCT", "Myocardium"),
    "left kidney": Code("18639004", "SCT", "Left kidney"),
    "right kidney": Code("9846003", "SCT", "Right kidney"),
    "left lung": Code("44029006", "SCT", "Left lung"),
    "right lung": Code("3341006", "SCT", "Right lung"),
}

# Attributes that a SEG has to take over from its images; archives hold images that lack some of them.
_TAKEN_OVER = {
    "PatientID": "",
    "PatientName": "",
    "PatientBirthDate": "",
    "PatientSex": "",
    "AccessionNumber": "",
    "StudyID": "",
    "StudyDate": "",
    "StudyTime": "",
    "ReferringPhysicianName": "",
}


def code_of(name: str) -> tuple[Code, Code]:
    """Category and type of a structure, by its name.

    Names that are none of SNOMED's (as far as pydicom's dictionary of it goes) get a private code, the same for the
    same name everywhere.
    """
    plain = same_name(name)
    if plain in _ABNORMAL_TYPES:
        return ABNORMAL, _ABNORMAL_TYPES[plain]
    if plain in _ANATOMY_TYPES:
        return ANATOMY, _ANATOMY_TYPES[plain]
    keyword = "".join(word[:1].upper() + word[1:] for word in plain.replace("-", " ").split())
    found = getattr(codes.SCT, keyword, None) if keyword.isidentifier() else None
    if isinstance(found, Code):
        return ANATOMY, found
    return ANATOMY, Code(hashlib.blake2b(plain.encode(), digest_size=8).hexdigest(), "99SAMADAPT", name[:64])


def write_seg(
    mask: np.ndarray,
    values: Mapping[int, str],
    grid: SeriesGrid,
    images: Sequence[Dataset],
    creator: str | None = None,
    made: datetime | None = None,
    number: int = 1,
) -> Dataset:
    """A binary SEG of a label map: one segment for each value that occurs, in ascending order.

    Args:
        mask: (I, J, K) whole numbers on the grid, at least one voxel not 0.
        values: value -> name; values without a name become "label <value>".
        grid: of the images.
        images: attributes of the images of the series, pixels not needed.
        creator: who drew it.
        made: when; None: now.
        number: of this label among those of the series; viewers sort by it.

    Raises:
        InputError: an empty mask (a SEG has at least one segment), or another shape than the grid's.
    """
    if mask.shape != grid.geometry.shape:
        raise InputError(f"the mask's shape is {mask.shape}, its series' {grid.geometry.shape}", where=grid.series)
    present = sorted(values_in(mask) - {0})
    if not len(present):
        raise InputError("an empty mask cannot be a DICOM SEG, which has at least one segment", where=grid.series)
    numbers = np.zeros(int(present[-1]) + 1, np.uint8 if len(present) < 256 else np.uint16)
    numbers[present] = range(1, len(present) + 1)
    sources, order = _sources(grid, images)
    pixels = numbers[mask.transpose(2, 1, 0)][order]
    with warnings.catch_warnings():  # about how archives write names and identifiers, which is not ours to change
        warnings.simplefilter("ignore", UserWarning)
        made_of = _segmentation(pixels, sources, [values.get(int(v), f"label {v}") for v in present])
    _sign(made_of, _plain(creator), made or datetime.now(), number)
    return made_of


def _segmentation(pixels: np.ndarray, sources: list[Dataset], names: list[str]) -> hd.seg.Segmentation:
    """``pixels`` (frames, rows, columns) with segment n as value n; ``names[n - 1]`` is what it is called."""
    made = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(n, name) for n, name in enumerate(names, start=1)],
        series_instance_uid=generate_uid(),
        series_number=FIRST_SERIES_NUMBER,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name="samadapt",
        software_versions=__version__,
        device_serial_number="0",
        content_label="SEGMENTATION",
    )
    made.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: patients and structures have names in every script
    return made


def _sign(seg: Dataset, creator: str, made: datetime, number: int) -> None:
    """Say who drew it and when, in what viewers show in their list of series, too."""
    seg.SeriesDate = seg.ContentDate = made.strftime("%Y%m%d")
    seg.SeriesTime = seg.ContentTime = made.strftime("%H%M%S")
    by = f" by {creator[:_CREATOR_SHOWN]}" if creator else ""
    seg.SeriesDescription = f"Label{by}, {made:%Y-%m-%d %H:%M}"
    seg.SeriesNumber = FIRST_SERIES_NUMBER + number
    if creator:
        seg.ContentCreatorName = PersonName(f"{creator}^")


def _plain(name: str | None) -> str:
    """A person's name without what has a meaning of its own in DICOM."""
    return " ".join(re.sub(r"[\^=\\\x00-\x1f]", " ", name or "").split())[:60]


def _sources(grid: SeriesGrid, images: Sequence[Dataset]) -> tuple[list[Dataset], np.ndarray]:
    """The images as highdicom wants them, and which k each of its frames is."""
    by_uid = {str(image.SOPInstanceUID): image for image in images}
    used = list(dict.fromkeys(uid for uid, _ in grid.frames))
    if missing := [uid for uid in used if uid not in by_uid]:
        raise InputError(f"{len(missing)} images of the series are not at hand", where=grid.series)
    order = np.argsort([frame for _, frame in grid.frames], kind="stable")  # identity where all frames are 1
    return [_completed(by_uid[uid], grid) for uid in used], order


def _completed(image: Dataset, grid: SeriesGrid) -> Dataset:
    whole = copy.copy(image)
    for name, empty in _TAKEN_OVER.items():
        if name not in whole:
            setattr(whole, name, empty)
    if "FrameOfReferenceUID" not in whole:
        whole.FrameOfReferenceUID = generate_uid(entropy_srcs=[grid.series])
    if "ImagePositionPatient" not in whole and "PerFrameFunctionalGroupsSequence" not in whole:
        whole.ImagePositionPatient, whole.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    if "PixelSpacing" not in whole and "SharedFunctionalGroupsSequence" not in whole:
        whole.PixelSpacing = whole.get("ImagerPixelSpacing") or [1, 1]
    if "SliceThickness" not in whole and "SharedFunctionalGroupsSequence" not in whole:
        whole.SliceThickness = float(np.linalg.norm(grid.geometry.affine[:3, 2]))
    return whole


def _description(number: int, name: str) -> hd.seg.SegmentDescription:
    category, kind = code_of(name)
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=re.sub(r"[\\\x00-\x1f]", " ", name)[:64],  # a backslash would begin a second value
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="samadapt",
            version=__version__,
            family=Code("123110", "DCM", "Artificial Intelligence"),
        ),
    )


def read_seg(seg: Dataset, grid: SeriesGrid) -> DicomLabel:
    """The label map of a SEG by any program, on the grid of the series it was drawn on.

    Each frame goes where its own position and orientation say (or, without these, to the image that it names), in
    whatever order the frames are stored. Fractional segments count from half their maximum on. Values of the label
    map are the segment numbers, names the segment labels.

    Raises:
        InputError: frames that do not lie on the series' voxels (a resampled segmentation), or outside the series, or
            without any place.
    """
    names = {int(segment.SegmentNumber): _label_of(segment) for segment in seg.get("SegmentSequence", [])}
    voxels: dict[int, list[np.ndarray]] = defaultdict(list)
    for number, found in _frames(seg, grid):
        voxels[number].append(found)
    structures = [
        Structure(number, names.get(number, f"segment {number}"), np.concatenate(voxels[number]))
        if number in voxels
        else Structure(number, names[number], np.empty((0, 3), np.int64))
        for number in sorted({*names, *voxels})
        if number > 0
    ]
    return label_map(grid.geometry.shape, structures)


def segment_names(seg: Dataset) -> dict[int, str]:
    """Segment number -> name, from the SEG's attributes alone."""
    return {int(s.SegmentNumber): _label_of(s) for s in seg.get("SegmentSequence", []) if int(s.SegmentNumber) > 0}


def _label_of(segment: Dataset) -> str:
    name = " ".join(str(segment.get("SegmentLabel") or "").split())
    kind = segment.get("SegmentedPropertyTypeCodeSequence")
    return name or (str(kind[0].get("CodeMeaning") or "") if kind else "") or f"segment {segment.SegmentNumber}"


def _frames(seg: Dataset, grid: SeriesGrid) -> Iterator[tuple[int, np.ndarray]]:
    """Segment number and voxels (N, 3) of every frame; several times the same number."""
    pixels = seg.pixel_array.reshape(-1, int(seg.Rows), int(seg.Columns))
    shared = (seg.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    kind = str(seg.get("SegmentationType", "BINARY")).upper()
    half = float(seg.get("MaximumFractionalValue") or 255) / 2
    for frame, groups in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        place = _place(groups, shared, grid)
        if kind == "LABELMAP":
            for number in np.unique(frame[frame > 0]):
                yield int(number), _voxels(frame == number, place, grid)
            continue
        number = functional_group(groups, shared, "SegmentIdentificationSequence").get("ReferencedSegmentNumber")
        drawn = frame >= half if kind == "FRACTIONAL" else frame > 0
        if number is not None and drawn.any():
            yield int(number), _voxels(drawn, place, grid)


def _place(groups: Dataset, shared: Dataset, grid: SeriesGrid) -> np.ndarray:
    """4x3: (column, row, 1) of a frame's pixel -> voxel index on the grid, not rounded."""
    position = functional_group(groups, shared, "PlanePositionSequence").get("ImagePositionPatient")
    orientation = functional_group(groups, shared, "PlaneOrientationSequence").get("ImageOrientationPatient")
    spacing = functional_group(groups, shared, "PixelMeasuresSequence").get("PixelSpacing")
    if position is None or orientation is None or spacing is None:
        return np.array([[1, 0, 0], [0, 1, 0], [0, 0, _named_slice(groups, grid)], [0, 0, 1]], dtype=float)
    pixel = np.zeros((4, 3))
    pixel[:3, 0] = np.array(orientation[:3], float) * float(spacing[1])
    pixel[:3, 1] = np.array(orientation[3:], float) * float(spacing[0])
    pixel[:3, 2] = position
    pixel[3, 2] = 1
    return np.asarray(np.linalg.inv(LPS_FROM_RAS @ grid.geometry.affine) @ pixel)


def _named_slice(groups: Dataset, grid: SeriesGrid) -> int:
    """k of the image that a frame says it was drawn on."""
    for derivation in groups.get("DerivationImageSequence") or []:
        for source in derivation.get("SourceImageSequence") or []:
            named = (str(source.get("ReferencedSOPInstanceUID")), int(source.get("ReferencedFrameNumber") or 1))
            if named in grid.frames:
                return grid.frames.index(named)
    raise InputError(
        "a frame of the segmentation has no place in space and names no image of the series",
        where=grid.series,
        remedy="Export it again as a DICOM SEG with plane positions.",
    )


def _voxels(drawn: np.ndarray, place: np.ndarray, grid: SeriesGrid) -> np.ndarray:
    """Voxel indices (N, 3) of the drawn pixels of a frame (rows, columns)."""
    rows, columns = np.nonzero(drawn)
    exact = (place @ np.stack([columns, rows, np.ones_like(rows)]))[:3].T
    nearest = np.rint(exact).astype(np.int64)
    if np.abs(exact - nearest).max(initial=0.0) > MISMATCH_VOXELS:
        raise InputError(
            "the segmentation was drawn on another grid than the series' (between its slices or voxels)",
            where=grid.series,
            remedy="Export it on the series' own grid.",
        )
    if (nearest < 0).any() or (nearest >= grid.geometry.shape).any():
        raise InputError(
            "the segmentation reaches beyond the series", where=grid.series, remedy="Was it drawn on another series?"
        )
    return nearest
