"""The DICOMweb endpoints (PS3.18) over one folder, and ``/status``, which says how far its index is."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from samadapt.dicomweb import converted, metadata, multipart, store
from samadapt.dicomweb.frames import read_frames
from samadapt.dicomweb.index import Found, Index, Progress
from samadapt.dicomweb.query import MODALITIES, Query, element, uid_of
from samadapt.dicomweb.rendered import MEDIA_TYPES, render
from samadapt.errors import InputError, NotFoundError, SamAdaptError
from samadapt.project import FOLDER as HIDDEN

logger = logging.getLogger(__name__)

ROOT = "/dicom-web"
LOOK_AGAIN_S = 10.0
"""A study list that is asked for so long after the last look at the folder begins another."""

NAMED = 5
"""So many of the files that are no DICOM are named; the others are counted."""

_JSON = "application/dicom+json"
_INSTANCE = "/studies/{study}/series/{series}/instances/{instance}"
_SYNTAX_TYPES = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
}


class Archive:
    """A folder with DICOM files, its index, and the thread that keeps that up to date.

    Args:
        folder: the files; what is stored over DICOMweb goes to ``.samadapt/dicomweb/received`` in it.
        progress: called with files done and files in all while the folder is looked at.
    """

    _database = "index.sqlite"

    def __init__(self, folder: Path, progress: Progress = lambda done, total: None) -> None:
        self.folder = folder.resolve()
        own = self.folder / HIDDEN / "dicomweb"
        self.received = own / "received"
        self.received.mkdir(parents=True, exist_ok=True)
        self.index = Index([self._images(), self.received], own / self._database)
        self._tell = progress
        self._progress = (0, 0)
        self._looked = 0.0
        self._error = ""
        self._looking = threading.Lock()

    def look(self) -> None:
        """Take in what is new in the folder; at once if it is being done already."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            self._update()
            self._error = ""
        except (OSError, SamAdaptError) as error:  # an unplugged disk, a share that is away
            self._error = str(error)
            logger.error("%s cannot be looked through: %s", self.folder, error)
        finally:
            self._looked = time.monotonic()
            self._looking.release()

    def look_in_background(self) -> None:
        threading.Thread(target=self.look, name="dicomweb-index", daemon=True).start()

    def look_again(self) -> None:
        """As ``look_in_background``, unless that was a moment ago."""
        if self._looked and time.monotonic() - self._looked > LOOK_AGAIN_S:
            self.look_in_background()

    def _images(self) -> Path:
        return self.folder

    def _update(self) -> None:
        self.index.update(self._note)

    def problems(self) -> dict[str, str]:
        """File -> why it is left out."""
        return self.index.problems()

    def not_dicom(self) -> tuple[str, ...]:
        """Files of the folder that are no DICOM files."""
        return self.index.not_dicom()

    def status(self) -> dict[str, Any]:
        done, total = self._progress
        return {
            "folder": str(self.folder),
            "indexing": self._looking.locked() or not self._looked,
            "files_done": done,
            "files_total": total,
            **self.index.counts(),
            "left_out": self.problems(),
            "conflicts": self.index.conflicts(),
            "not_dicom": {"files": len(others := self.not_dicom()), "first": list(others[:NAMED])},
            "error": self._error or None,
        }

    def _note(self, done: int, total: int) -> None:
        self._progress = (done, total)
        self._tell(done, total)


class ConvertedArchive(Archive):
    """A folder with volumes (NIfTI, ...), each shown as a DICOM series; DICOM files in the folder are not shown."""

    _database = "converted.sqlite"

    def __init__(self, folder: Path, progress: Progress = lambda done, total: None) -> None:
        self._unusable: dict[str, str] = {}
        super().__init__(folder, progress)

    def _images(self) -> Path:
        return converted.folder_in(self.folder)

    def _update(self) -> None:
        self._images().mkdir(parents=True, exist_ok=True)
        self.index.update()  # what earlier runs have converted can be seen at once
        self._unusable = converted.convert_all(self.folder, self.index.add, self._note)
        self.index.update()

    def problems(self) -> dict[str, str]:
        return {**super().problems(), **self._unusable}

    def not_dicom(self) -> tuple[str, ...]:
        """None: beside the series lie their records, and what of the studies folder is no volume is not looked at."""
        return ()


def application(archive: Archive) -> FastAPI:
    """The server over ``archive``. It answers only requests that name this machine as their host."""
    made = FastAPI(title="samadapt DICOMweb", docs_url=None, redoc_url=None, openapi_url=None)
    # A web page whose name resolves to 127.0.0.1 must not read patients' images.
    made.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    made.add_exception_handler(SamAdaptError, _answer)
    made.add_exception_handler(FileNotFoundError, _gone)
    made.include_router(_searches(archive), prefix=ROOT)
    made.include_router(_retrievals(archive), prefix=ROOT)
    made.include_router(_storage(archive), prefix=ROOT)
    made.add_api_route("/status", archive.status)
    return made


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SamAdaptError)
    logger.warning("%s %s: %s", request.method, request.url.path, error)
    return JSONResponse(error.to_dict(), status_code=error.http_status)


async def _gone(request: Request, error: Exception) -> JSONResponse:
    gone = NotFoundError("this file is no longer there", where=str(error), remedy="Reload the study list.")
    return await _answer(request, gone)


def _searches(archive: Archive) -> APIRouter:
    """QIDO-RS."""
    made = APIRouter()
    index = archive.index

    def answer(request: Request, found: list[Found], level: str) -> Response:
        query = Query.from_parameters(request.query_params.multi_items())
        root = _root(request)
        return _json([_result(one, level, root) for one in query.select(found)])

    @made.get("/studies")
    def studies(request: Request) -> Response:
        archive.look_again()
        return answer(request, index.studies(), "studies")

    @made.get("/series")
    def all_series(request: Request) -> Response:
        archive.look_again()
        return answer(request, index.series(), "series")

    @made.get("/studies/{study}/series")
    def series(request: Request, study: str) -> Response:
        return answer(request, index.series(study), "series")

    @made.get("/instances")
    def all_instances(request: Request) -> Response:
        return answer(request, index.instances(), "instances")

    @made.get("/studies/{study}/instances")
    def instances_of_study(request: Request, study: str) -> Response:
        return answer(request, index.instances(study), "instances")

    @made.get("/studies/{study}/series/{series}/instances")
    def instances(request: Request, study: str, series: str) -> Response:
        return answer(request, index.instances(study, series), "instances")

    return made


def _retrievals(archive: Archive) -> APIRouter:
    """WADO-RS."""
    made = APIRouter()
    index = archive.index

    def described(request: Request, *uids: str) -> Response:
        texts = (index.metadata(path, metadata.describe) for path in _paths(index, *uids))
        body = "[" + ",".join(texts) + "]"
        return Response(body.replace(metadata.ROOT, _root(request)), media_type=_JSON)

    def files(*uids: str) -> Response:
        return multipart.response((("application/dicom", path) for path in _paths(index, *uids)), "application/dicom")

    @made.get("/studies/{study}/metadata")
    def study_metadata(request: Request, study: str) -> Response:
        return described(request, study)

    @made.get("/studies/{study}/series/{series}/metadata")
    def series_metadata(request: Request, study: str, series: str) -> Response:
        return described(request, study, series)

    @made.get(f"{_INSTANCE}/metadata")
    def instance_metadata(request: Request, study: str, series: str, instance: str) -> Response:
        return described(request, study, series, instance)

    @made.get("/studies/{study}")
    def study(study: str) -> Response:
        return files(study)

    @made.get("/studies/{study}/series/{series}")
    def series(study: str, series: str) -> Response:
        return files(study, series)

    @made.get(_INSTANCE)
    def instance(study: str, series: str, instance: str) -> Response:
        return files(study, series, instance)

    @made.get(f"{_INSTANCE}/frames/{{numbers}}")
    def frames(request: Request, study: str, series: str, instance: str, numbers: str) -> Response:
        (path,) = _paths(index, study, series, instance)
        return _frames(path, _numbers(numbers), request.headers.get("accept", "*/*"))

    @made.get(f"{_INSTANCE}/rendered")
    @made.get(f"{_INSTANCE}/thumbnail")
    @made.get(f"{_INSTANCE}/frames/{{number}}/rendered")
    @made.get(f"{_INSTANCE}/frames/{{number}}/thumbnail")
    def rendered(request: Request, study: str, series: str, instance: str, number: str = "1") -> Response:
        (path,) = _paths(index, study, series, instance)
        accepted = request.headers.get("accept", "")
        media_type = next((known for known in MEDIA_TYPES if known in accepted), "image/jpeg")
        return Response(render(path, _numbers(number)[0], media_type), media_type=media_type)

    @made.get(f"{_INSTANCE}/bulkdata/{{place:path}}")
    def bulkdata(study: str, series: str, instance: str, place: str) -> Response:
        (path,) = _paths(index, study, series, instance)
        octets = "application/octet-stream"
        return multipart.response([(octets, metadata.bulkdata(path, place))], octets)

    return made


def _storage(archive: Archive) -> APIRouter:
    """STOW-RS."""
    made = APIRouter()

    @made.post("/studies")
    @made.post("/studies/{study}")
    async def stow(request: Request, study: str | None = None) -> Response:
        body = await request.body()
        content_type = request.headers.get("content-type", "")

        def work() -> store.Outcome:
            contents = (content for _, content in multipart.parts(body, content_type))
            return store.store(contents, archive.received, archive.index, _root(request), study)

        outcome = await run_in_threadpool(work)
        answer = _json(outcome.answer, outcome.status)
        if outcome.reasons:
            text = "; ".join(outcome.reasons).encode("ascii", "replace").decode().replace('"', "'").replace("\n", " ")
            answer.headers["Warning"] = f'299 samadapt "{text[:1000]}"'
        return answer

    return made


def _root(request: Request) -> str:
    """This server's address. Not by the Host header: dicomweb_client leaves the port out of that."""
    host, port = request.scope["server"]
    return f"http://{host}:{port}{ROOT}"


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value, separators=(",", ":")), status, media_type=_JSON)


def _result(found: Found, level: str, root: str) -> dict[str, Any]:
    """What QIDO-RS answers of one study, series or instance."""
    study = uid_of(found.header, "StudyInstanceUID")
    address = f"{root}/studies/{study}"
    counts: dict[str, Any] = {}
    if level == "studies":
        counts = element("NumberOfStudyRelatedSeries", found.series) | element(MODALITIES, *found.modalities)
        counts |= element("NumberOfStudyRelatedInstances", found.instances)
    else:
        address += f"/series/{uid_of(found.header, 'SeriesInstanceUID')}"
    if level == "series":
        counts = element("NumberOfSeriesRelatedInstances", found.instances)
    if level == "instances":
        address += f"/instances/{uid_of(found.header, 'SOPInstanceUID')}"
    return {**found.header, **counts, **element("RetrieveURL", address), **element("InstanceAvailability", "ONLINE")}


def _paths(index: Index, *uids: str) -> list[Path]:
    found = index.paths(*uids)
    if not found:
        raise NotFoundError("not in this folder", where="/".join(uids), remedy="Reload the study list.")
    missing = next((path for path in found if not path.is_file()), None)
    if missing:
        raise NotFoundError("this file is no longer there", where=missing, remedy="Reload the study list.")
    return found


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise InputError(f"{text!r} is no list of frame numbers", where="frames", remedy="Give numbers from 1: 1,2,3.")
    return [int(number) for number in text.split(",")]


def _frames(path: Path, numbers: list[int], accept: str) -> Response:
    """As they are stored where that is acceptable, else without compression, which is the standard's default."""
    as_stored = "octet-stream" not in accept or re.search(r"transfer-syntax=\"?\*", accept) is not None
    frames = read_frames(path, numbers, decode=not as_stored)
    types = [_SYNTAX_TYPES.get(frame.transfer_syntax, "application/octet-stream") for frame in frames]

    def parts() -> Iterator[multipart.Part]:
        for media_type, frame in zip(types, frames, strict=True):
            yield f"{media_type}; transfer-syntax={frame.transfer_syntax}", frame.data

    return multipart.response(parts(), types[0])
