"""``multipart/related`` messages, in which DICOMweb sends and takes instances and frames."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastapi.responses import StreamingResponse
from requests_toolbelt.multipart.decoder import (
    ImproperBodyPartContentException,
    MultipartDecoder,
    NonMultipartContentTypeException,
)

from samadapt.errors import InputError

Part = tuple[str, "bytes | Path"]
"""Content type, and the bytes or the file that holds them."""


def response(parts: Iterable[Part], media_type: str) -> StreamingResponse:
    """A message of ``parts``; files are opened when their turn comes."""
    boundary = secrets.token_hex(16)
    content_type = f'multipart/related; type="{media_type}"; boundary={boundary}'
    return StreamingResponse(_written(parts, boundary), media_type=content_type)


def parts(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """Content type and bytes of each part of a message.

    Raises:
        InputError: not such a message.
    """
    try:
        decoded = MultipartDecoder(body, content_type).parts
    except (ImproperBodyPartContentException, NonMultipartContentTypeException, AttributeError) as error:
        raise InputError(
            f"no multipart message ({error})",
            where="body",
            remedy='Send Content-Type: multipart/related; type="application/dicom"; boundary=...',
        ) from None
    return [(part.headers.get(b"Content-Type", b"").decode("latin-1"), part.content) for part in decoded]


def _written(parts: Iterable[Part], boundary: str) -> Iterator[bytes]:
    for content_type, content in parts:
        data = content.read_bytes() if isinstance(content, Path) else content
        head = f"--{boundary}\r\nContent-Type: {content_type}\r\nContent-Length: {len(data)}\r\n\r\n"
        yield head.encode()
        yield data
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()
