"""A file's attributes as DICOM JSON; what is large and binary is named by an address instead (PS3.18 F.2.2)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset

from samadapt.errors import NotFoundError

ROOT = "@root@"
"""Stands for the server's own address in what ``describe`` returns, which is kept for longer than an address lasts."""

PRIVATE_INLINE = 1 << 10
"""Vendors hide 100 KiB and more in every slice; what is longer than this is left to those who ask for it."""

INLINE = 256 << 10
"""Standard attributes (palettes above all) are wanted at once, up to this length."""


def describe(path: Path) -> str:
    """The DICOM JSON object of one file, as text."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    base = (
        f"{ROOT}/studies/{header.StudyInstanceUID}/series/{header.SeriesInstanceUID}/instances/{header.SOPInstanceUID}"
    )
    value = header.to_json_dict(suppress_invalid_tags=True)
    _refer(value, f"{base}/bulkdata")
    return json.dumps(_finite(value), separators=(",", ":"))


def bulkdata(path: Path, place: str) -> bytes:
    """The bytes that ``describe`` has put at ``place``: tags, and item numbers from 0 between them, as in ``a/0/b``.

    Raises:
        NotFoundError: there is nothing.
    """
    found: Any = pydicom.dcmread(path, stop_before_pixels=True)
    try:
        for step in place.split("/"):
            found = found[int(step, 16)].value if isinstance(found, Dataset) else found[int(step)]
    except (KeyError, IndexError, ValueError, TypeError):
        found = None
    if not isinstance(found, bytes):
        raise NotFoundError("no binary attribute here", where=place, remedy="Take the address from the metadata.")
    return found


def _refer(value: dict[str, Any], base: str) -> None:
    for tag, element in value.items():
        inline = element.get("InlineBinary")
        private = int(tag[:4], 16) % 2 == 1
        if inline is not None and len(inline) * 3 // 4 > (PRIVATE_INLINE if private else INLINE):
            del element["InlineBinary"]
            element["BulkDataURI"] = f"{base}/{tag}"
        for number, item in enumerate(_items(element)):
            _refer(item, f"{base}/{tag}/{number}")


def _items(element: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if element.get("vr") == "SQ":
        yield from element.get("Value", [])


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value
