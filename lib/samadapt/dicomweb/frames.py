"""Pixel data of DICOM files, frame by frame, as it is stored or without compression."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import generate_pixel_data_frame
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian

from samadapt.errors import InputError

_PIXELS = frozenset({Tag(0x7FE00008), Tag(0x7FE00009), Tag(0x7FE00010)})
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_UNDEFINED = 0xFFFFFFFF
_AGAIN = "Copy or export the file again."


@dataclass(frozen=True)
class Frame:
    """One frame's bytes and the transfer syntax they are in (explicit little endian where not compressed)."""

    data: bytes
    transfer_syntax: str


def frame_count(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def frame_bits(header: Dataset) -> int:
    """Bits of one frame without compression."""
    samples = 2 if "422" in str(header.get("PhotometricInterpretation")) else int(header.get("SamplesPerPixel") or 1)
    return int(header.Rows) * int(header.Columns) * samples * int(header.BitsAllocated)


def check_complete(handle: IO[bytes], size: int, header: Dataset) -> None:
    """Refuse a file that ends before its pixel data does.

    Args:
        handle: the file, positioned where pydicom stopped before the pixels.
        size: its length in bytes.
        header: what pydicom read.

    Raises:
        InputError: it is cut off.
    """
    if header.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        return  # what was read has been inflated as a whole
    start = _pixel_start(handle, header)
    if start is None:
        if "Rows" in header:
            raise InputError("cut off: it has no pixels", remedy=_AGAIN)
        return
    offset, length = start
    if length != _UNDEFINED:
        needed = max(length, (frame_bits(header) * frame_count(header) + 7) // 8)
        if offset + needed > size:
            raise InputError(f"cut off: {offset + needed - size} bytes of its pixels are missing", remedy=_AGAIN)
        return
    while (tag := handle.read(4)) == _ITEM:
        handle.seek(int.from_bytes(handle.read(4), "little"), os.SEEK_CUR)
    if tag != _END:
        raise InputError("cut off: its compressed pixels do not end", remedy=_AGAIN)


def read_frames(path: Path, numbers: list[int], *, decode: bool) -> list[Frame]:
    """Frames by number, from 1.

    Args:
        path: a DICOM file.
        numbers: which frames.
        decode: give compressed frames without compression.

    Raises:
        InputError: there is no such frame, the object has no pixels, or this compression cannot be undone here.
    """
    with open(path, "rb") as handle:
        header = pydicom.dcmread(handle, stop_before_pixels=True)
        syntax = header.file_meta.TransferSyntaxUID
        deflated = syntax == DeflatedExplicitVRLittleEndian
        start = (0, 0) if deflated else _pixel_start(handle, header)
    if start is None or "Rows" not in header:
        raise InputError("this object has no pixels", where=path.name, remedy="Ask for its metadata.")
    unknown = [number for number in numbers if not 1 <= number <= frame_count(header)]
    if unknown:
        raise InputError(f"there is no frame {unknown[0]}, only 1 to {frame_count(header)}", where=path.name)
    if syntax.is_encapsulated and not decode:
        compressed = _compressed(path, path.stat().st_mtime_ns)
        return [Frame(compressed[number - 1], str(syntax)) for number in numbers]
    if syntax.is_encapsulated or deflated or syntax == ExplicitVRBigEndian:
        array = decoded(path, path.stat().st_mtime_ns)
        return [Frame(array[number - 1].tobytes(), str(ExplicitVRLittleEndian)) for number in numbers]
    return [Frame(_raw(path, header, start[0], number), str(ExplicitVRLittleEndian)) for number in numbers]


def _pixel_start(handle: IO[bytes], header: Dataset) -> tuple[int, int] | None:
    """Where the pixel data's value begins, and its length; None where there is none. ``handle`` ends up there."""
    order = "little" if header.is_little_endian else "big"
    tag = handle.read(4)
    if len(tag) < 4:
        return None
    group, element = int.from_bytes(tag[:2], order), int.from_bytes(tag[2:], order)  # type: ignore[arg-type]
    if Tag(group, element) not in _PIXELS:
        return None
    if not header.is_implicit_VR:
        handle.read(4)  # VR and two bytes of nothing
    length = int.from_bytes(handle.read(4), order)  # type: ignore[arg-type]
    return handle.tell(), length


def _raw(path: Path, header: Dataset, offset: int, number: int) -> bytes:
    bits = frame_bits(header)
    first = bits * (number - 1)
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if bits % 8 == 0:
            return file[offset + first // 8 : offset + (first + bits) // 8]
        # Frames of a binary SEG may begin inside a byte; sent alone, each begins with one.
        part = np.frombuffer(file[offset + first // 8 : offset + (first + bits + 7) // 8], np.uint8)
    loose = np.unpackbits(part, bitorder="little")[first % 8 : first % 8 + bits]
    return np.packbits(loose, bitorder="little").tobytes()


@lru_cache(maxsize=4)
def _compressed(path: Path, modified: int) -> list[bytes]:
    read = pydicom.dcmread(path)
    return list(generate_pixel_data_frame(read.PixelData, frame_count(read)))


@lru_cache(maxsize=4)
def decoded(path: Path, modified: int) -> np.ndarray:
    """(frames, rows, columns[, samples]) in this machine's little-endian order."""
    read = pydicom.dcmread(path)
    try:
        array = read.pixel_array
    except (NotImplementedError, RuntimeError, AttributeError, ValueError, OSError) as error:
        name = read.file_meta.TransferSyntaxUID.name
        raise InputError(
            f"pixels compressed as {name} cannot be decoded here ({error})",
            where=path.name,
            remedy="Ask for them as they are stored (transfer-syntax=*), as OHIF does.",
        ) from error
    array = array if frame_count(read) > 1 else array[None]
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
