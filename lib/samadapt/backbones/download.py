"""Downloading one large file so that a break costs only what was not yet transferred."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm import tqdm

from samadapt.errors import WeightsError
from samadapt.files import sha256_of

CONNECT_SECONDS = 15
SILENCE_SECONDS = 60
CHUNK = 1 << 16  # small: what a break leaves of an unfinished chunk is lost


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download ``url`` to ``path``, with a progress bar on a terminal.

    The bytes collect in ``path`` + ".part"; a later call continues there. Only a complete file with the right
    SHA-256 gets the name ``path``, by one rename. Processes that want the same file wait for each other.

    Args:
        url: http or https address.
        path: where the file goes; folders are made.
        sha256: hex SHA-256 that the file must have.

    Raises:
        WeightsError: the server cannot be reached, answers with an error, breaks off (the part stays), or sends
            something else (the part is removed); or the folder cannot be written to.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if path.exists():  # another process fetched it while this one waited
                return
            _transfer(url, part)
            _check(part, sha256, url)
            os.replace(part, path)
    except OSError as error:
        raise WeightsError(
            f"the download cannot be written ({error.strerror or error})",
            where=part,
            remedy="Free some disk space or set SAMADAPT_CACHE to a folder that you may write to; calling again "
            "resumes.",
        ) from error


def _transfer(url: str, part: Path) -> None:
    """Append to ``part`` what is missing, or start it anew where the server does not continue at its end."""
    start = part.stat().st_size if part.exists() else 0
    with _request(url, start) as response:
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return  # nothing follows what is there already; its hash tells whether it is right
        if response.status_code >= HTTPStatus.BAD_REQUEST:
            raise WeightsError(
                f"the server answers {response.status_code} {response.reason}",
                where=url,
                remedy="Try again later, or get the file from elsewhere and give its path.",
            )
        if not _continues_at(response, start):
            start = 0
        length = int(response.headers.get("Content-Length", 0))
        with open(part, "ab" if start else "wb") as file:
            _receive(response, file, start, start + length if length else None, url)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _request(url: str, start: int) -> Iterator[requests.Response]:
    """A streamed GET of everything from byte ``start`` on."""
    # "identity": byte offsets count the file's own bytes only if the server does not compress.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, SILENCE_SECONDS))
    except requests.RequestException as error:
        raise WeightsError(
            f"cannot reach {urlsplit(url).hostname} ({type(error).__name__})",
            where=url,
            remedy=f"Check the network and the proxy settings. {_by_hand(url)}",
        ) from error
    with response:
        yield response


def _continues_at(response: requests.Response, start: int) -> bool:
    """Whether the body is the rest from ``start`` on; servers without ranges send the whole file instead."""
    partial = response.status_code == HTTPStatus.PARTIAL_CONTENT
    return partial and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _receive(response: requests.Response, file, start: int, total: int | None, url: str) -> None:
    """Write the body to ``file``; ``total`` is the size of the whole file where the server tells it."""
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=Path(urlsplit(url).path).name, disable=None)
    received = start
    cause: Exception | None = None
    with bar:
        try:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
        except requests.RequestException as error:
            cause = error
    if cause is not None or (total is not None and received < total):
        of = f" of {total / 1e6:.1f}" if total else ""
        raise WeightsError(
            f"the transfer broke off after {received / 1e6:.1f}{of} MB",
            where=url,
            remedy="Call again: it resumes where it stopped.",
        ) from cause


def _check(part: Path, sha256: str, url: str) -> None:
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise WeightsError(
            f"what the server sent has SHA-256 {found}, not the published {sha256}; it was removed",
            where=url,
            remedy=f"Call again to download it from the start. {_by_hand(url)}",
        )


def _by_hand(url: str) -> str:
    return f"Otherwise fetch {url} on another machine and give the path of the file."
