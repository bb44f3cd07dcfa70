"""The way from OHIF to the PACS: what is asked for under ``/proxy/dicom``, and nothing else of the PACS.

The host's own version lets ``..`` through to everything that the PACS serves, drops the query, reads each answer
whole, and blocks the server meanwhile. Its routes stay, and with them its check of who asks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Callable
from urllib.parse import quote

import httpx
from fastapi import Request
from fastapi.responses import StreamingResponse
from monailabel.config import settings
from monailabel.endpoints import proxy
from starlette.background import BackgroundTask

from samadapt.dicomweb.child import ADDRESS
from samadapt.errors import InputError, NotFoundError, SamAdaptError

logger = logging.getLogger(__name__)

RESOURCES = ("studies", "series", "instances", "bulkdata")
"""What DICOMweb addresses begin with."""

CONNECT_S = 5.0
BAD_REQUEST = 400
_SEGMENT = re.compile(r"(?!\.{1,2}$)[\w.,:@+ -]+", re.ASCII)
_TO_PACS = ("accept", "accept-encoding", "accept-language", "content-type", "content-length", "if-none-match")
_FROM_PACS = ("content-type", "content-encoding", "content-length", "etag", "last-modified", "warning", "retry-after")


class PacsAwayError(SamAdaptError):
    """The PACS cannot be reached, or broke off."""

    http_status = 502


class PacsSlowError(SamAdaptError):
    """The PACS does not answer in time."""

    http_status = 504


def install(stored: Callable[[], None]) -> None:
    """Put this proxy in the place of the host's.

    Args:
        stored: called when the PACS has taken something, before OHIF hears of it.
    """
    client = httpx.AsyncClient(
        timeout=httpx.Timeout(settings.MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT, connect=CONNECT_S), follow_redirects=False
    )

    async def pass_on(request: Request, op: str, path: str) -> StreamingResponse:
        answer = await _pass_on(client, request, op, path)
        if request.method == "POST" and answer.status_code < BAD_REQUEST:
            stored()
        return answer

    proxy.proxy_dicom = pass_on


def pacs_address(op: str, path: str) -> str:
    """Where ``path`` lies at the PACS.

    Args:
        op: ``qido``, ``wado``, ``stow`` or "".
        path: as the request has it, decoded once.

    Raises:
        InputError: no DICOMweb address; one with ``..`` or an encoded character in it, above all.
        NotFoundError: this server has a folder, and no PACS.
    """
    studies = _store()
    if not studies.startswith(("http://", "https://")):
        raise NotFoundError(
            "this server has no DICOMweb store behind it",
            where="/proxy/dicom",
            remedy="Start it with the address of one, or `samadapt serve --studies FOLDER`.",
        )
    segments = path.split("/")
    if segments[0] not in RESOURCES or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise InputError(
            "no DICOMweb resource",
            where=f"/proxy/dicom/{op}",
            remedy=f"Ask for {', '.join(RESOURCES)}, with plain names behind it.",
        )
    prefixes = {
        "qido": settings.MONAI_LABEL_QIDO_PREFIX,
        "wado": settings.MONAI_LABEL_WADO_PREFIX,
        "stow": settings.MONAI_LABEL_STOW_PREFIX,
    }
    # Some versions of OHIF ask for metadata where they search.
    prefix = prefixes.get("wado" if segments[-1] == "metadata" and op == "qido" else op)
    return "/".join([studies, *([prefix.strip("/")] if prefix else []), quote(path, safe="/,:@+")])


def _store() -> str:
    """The PACS, or the DICOMweb server of a folder."""
    return (os.environ.get(ADDRESS) or settings.MONAI_LABEL_STUDIES).strip().rstrip("/")


async def _pass_on(client: httpx.AsyncClient, request: Request, op: str, path: str) -> StreamingResponse:
    address = pacs_address(op, path)
    headers = {name: request.headers[name] for name in _TO_PACS if name in request.headers}
    headers.setdefault("accept-encoding", "identity")
    auth, token = await _credentials()
    if token:
        headers["authorization"] = f"Bearer {token}"
    # Orthanc 1.10 takes no asterisk that is encoded, so the query goes on byte for byte.
    url = httpx.URL(address, query=request.scope["query_string"] or None)
    body = request.stream() if request.method == "POST" else None
    asked = client.build_request(request.method, url, headers=headers, content=body)
    try:
        answer = await client.send(asked, auth=auth, stream=True)
    except httpx.HTTPError as error:
        raise _away(error) from error
    passed = {name: answer.headers[name] for name in _FROM_PACS if name in answer.headers}
    return StreamingResponse(
        _read(answer), answer.status_code, headers=passed, background=BackgroundTask(answer.aclose)
    )


async def _read(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The body as it comes. Where it breaks off, so does the answer: its status has gone out already."""
    try:
        async for block in answer.aiter_raw():
            yield block
    except httpx.HTTPError as error:
        logger.error("%s", _away(error))
        raise
    finally:
        await answer.aclose()


def _away(error: httpx.HTTPError) -> SamAdaptError:
    where = _store()
    if isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout)):
        seconds = settings.MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT
        return PacsSlowError(
            f"the PACS does not answer within {seconds:g} s",
            where=where,
            remedy="Try again; MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT sets the time.",
        )
    reason = str(error) or type(error).__name__
    return PacsAwayError(
        f"the PACS cannot be reached ({reason})", where=where, remedy="See that it runs, and try again."
    )


async def _credentials() -> tuple[httpx.BasicAuth | None, str | None]:
    """The PACS's password from the host's settings; for Google's, a token."""
    if "googleapis.com" in settings.MONAI_LABEL_STUDIES:
        return None, await asyncio.to_thread(_google_token)
    name, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    return (httpx.BasicAuth(name, password) if name and password else None), None


def _google_token() -> str:
    import google.auth
    import google.auth.transport.requests

    found, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    found.refresh(google.auth.transport.requests.Request())
    return str(found.token)
