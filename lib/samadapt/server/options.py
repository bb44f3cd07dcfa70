"""What a viewer may put into a request, parsed and checked.

Viewers send options as they like: numbers, lists, or the same as text (OHIF sends text once a person changed one).
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samadapt.config import closest
from samadapt.data.labels import LabelMap
from samadapt.errors import InputError

Box = tuple[int, int, int, int, int, int]
Shape = tuple[int, int, int]

_EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".png")
_DTYPES = ("uint8", "uint16")


@dataclass(frozen=True)
class MaskFormat:
    """How the reply's mask is written."""

    extension: str
    dtype: str
    compress: bool


def mask_format(request: Mapping[str, Any], *, default_extension: str) -> MaskFormat:
    """``result_extension``, ``result_dtype`` and ``result_compress`` of a request."""
    extension = str(request.get("result_extension") or default_extension)
    dtype = str(request.get("result_dtype") or "uint8")
    _check_among(extension, _EXTENSIONS, "result_extension")
    _check_among(dtype, _DTYPES, "result_dtype")
    return MaskFormat(extension, dtype, flag(request, "result_compress", default=True))


def points(request: Mapping[str, Any], key: str, shape: Shape) -> list[tuple[int, int, int]]:
    """Clicked voxels (i, j, k) under ``key``; a flat image may leave out k.

    Raises:
        InputError: not a list of voxels, or a voxel outside ``shape``.
    """
    value = _decoded(request.get(key) or [], key)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _malformed(key, value, "a list of voxels [[i, j, k], ...]")
    return [_voxel(point, key, shape) for point in value]


def _voxel(value: Any, key: str, shape: Shape) -> tuple[int, int, int]:
    flat = shape[2] == 1 and isinstance(value, Sequence) and len(value) == 2
    i, j, k = _integers([*value, 0] if flat else value, 3, key, "[i, j, k]")
    if not all(0 <= index < size for index, size in zip((i, j, k), shape, strict=True)):
        raise InputError(
            f"the click {[i, j, k]} lies outside the image of {list(shape)} voxels",
            where=key,
            remedy="Give voxel indices i, j, k that count from 0.",
        )
    return i, j, k


def box(request: Mapping[str, Any], shape: Shape) -> Box | None:
    """``roi``: two corners as [i0, i1, j0, j1, k0, k1], ends included, in any order; cut to the image.

    Raises:
        InputError: not six numbers, or no voxel of the image inside.
    """
    value = _decoded(request.get("roi") or [], "roi")
    if not value:
        return None
    corners = _integers(value, 6, "roi", "[i0, i1, j0, j1, k0, k1]")
    bounds: list[int] = []
    for axis, size in enumerate(shape):
        low, high = sorted(corners[2 * axis : 2 * axis + 2])
        if high < 0 or low >= size:
            raise InputError(
                f"the box {corners} lies outside the image of {list(shape)} voxels",
                where="roi",
                remedy="Give voxel indices [i0, i1, j0, j1, k0, k1] that count from 0.",
            )
        bounds += [max(low, 0), min(high, size - 1)]
    return bounds[0], bounds[1], bounds[2], bounds[3], bounds[4], bounds[5]


def slice_index(request: Mapping[str, Any], depth: int) -> int | None:
    """``slice``, the k index that Slicer sends with 2D clicks; None when it is absent."""
    value = request.get("slice")
    if value is None or value == "":
        return None
    (index,) = _integers([value], 1, "slice", "an index")
    if not 0 <= index < depth:
        raise InputError(f"there is no slice {index}", where="slice", remedy=f"Give a k index from 0 to {depth - 1}.")
    return index


def label_names(request: Mapping[str, Any], labels: LabelMap | None) -> list[str] | None:
    """The classes that ``label_prompt`` asks for by index (or by name); None for all of them."""
    value = _decoded(request.get("label_prompt"), "label_prompt")
    if value is None or value == []:
        return None
    known = labels.names if labels else ()
    names = []
    for item in value if isinstance(value, list) else [value]:
        number = int(item) if str(item).isdecimal() else labels.find(str(item)) if labels else None
        if number is None or not 1 <= number <= len(known):
            raise InputError(f"there is no label {str(item)!r}", where="label_prompt", remedy=closest(str(item), known))
        names.append(known[number - 1])
    return names


def flag(request: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """A switch, as JSON or as text."""
    text = str(request.get(key, default)).strip().lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise _malformed(key, request[key], "true or false")
    return text in ("true", "1", "yes")


def is_upload(image: str, session_store: str | None) -> bool:
    """Whether the host itself has just put this file here, as an upload or a session's image.

    Both lie under random names that nobody can guess, so such a path was not made up by a client.
    """
    path = Path(image)
    if not path.is_absolute() or ".." in path.parts:
        return False
    as_upload = path.parent == Path(tempfile.gettempdir()) and re.match(r"tmp[a-z0-9_]{8}(\.|$)", path.name)
    in_session = session_store is not None and Path(session_store) in path.parents
    return bool(as_upload or in_session) and path.exists()


def _decoded(value: Any, key: str) -> Any:
    """Text that holds JSON becomes what it holds; other text is left alone."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError:
        if key == "label_prompt":
            return [part.strip() for part in value.split(",")]
        raise _malformed(key, value, "JSON") from None


def _integers(value: Any, count: int, key: str, form: str) -> list[int]:
    try:
        numbers = [float(item) for item in value]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise _malformed(key, value, form)
    return [math.floor(number + 0.5) for number in numbers]


def _check_among(value: str, known: Sequence[str], key: str) -> None:
    if value not in known:
        raise InputError(f"{value!r} cannot be written", where=key, remedy=closest(value, known))


def _malformed(key: str, value: Any, form: str) -> InputError:
    return InputError(f"{value!r} cannot be understood", where=key, remedy=f"Give {form}.")
