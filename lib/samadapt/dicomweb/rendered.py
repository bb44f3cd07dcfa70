"""One frame as a picture for people (WADO-RS rendered and thumbnail): the file's own window, 8 bits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.pixel_data_handlers.util import apply_modality_lut, apply_voi_lut, convert_color_space

from samadapt.dicomweb.frames import decoded
from samadapt.errors import InputError

MEDIA_TYPES = {"image/png": "PNG", "image/jpeg": "JPEG"}


def render(path: Path, number: int, media_type: str) -> bytes:
    """Frame ``number`` (from 1) as PNG or JPEG.

    Raises:
        InputError: there is no such frame, or its compression cannot be undone here.
    """
    header = pydicom.dcmread(path, stop_before_pixels=True)
    frames = decoded(path, path.stat().st_mtime_ns)
    if not 1 <= number <= len(frames):
        raise InputError(f"there is no frame {number}, only 1 to {len(frames)}", where=path.name)
    frame = frames[number - 1]
    colours = str(header.get("PhotometricInterpretation"))
    if frame.ndim == 3:
        frame = convert_color_space(frame, colours, "RGB") if colours.startswith("YBR") else frame
        picture = Image.fromarray(frame.astype(np.uint8))
    else:
        grey = np.asarray(apply_voi_lut(apply_modality_lut(frame, header), header), dtype=float)
        low, high = grey.min(), grey.max()
        shades = (grey - low) / ((high - low) or 1) * 255
        picture = Image.fromarray((255 - shades if colours == "MONOCHROME1" else shades).astype(np.uint8))
    with io.BytesIO() as written:
        picture.save(written, MEDIA_TYPES[media_type])
        return written.getvalue()
