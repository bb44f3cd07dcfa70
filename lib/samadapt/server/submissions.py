"""Requests that take long: they run in worker threads, so that the server answers others meanwhile.

The host's handlers are ``async`` around code that is not; whatever one of them waits for, the whole server waits for.
Those that wait for a PACS or write a label get a twin here that runs in a thread, and requests for an image that is
not here yet wait in a thread before the host sees them.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, File, Form, UploadFile
from fastapi.responses import JSONResponse
from monailabel.config import settings as host
from monailabel.endpoints import activelearning, datastore
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import DefaultLabelTag
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from samadapt.errors import SamAdaptError
from samadapt.server.dicom_datastore import SafeDicomDatastore

FINAL = DefaultLabelTag.FINAL.value


def install(server: FastAPI, app: MONAILabelApp) -> None:
    """Add the endpoints, in front of the host's own. To be called before the server's middleware is built again."""
    server.include_router(router(app), prefix=host.MONAI_LABEL_API_STR)
    server.router.routes.insert(0, server.router.routes.pop())
    if isinstance(app.datastore(), SafeDicomDatastore):
        server.add_middleware(WaitsForSeries, store=app.datastore())


def router(app: MONAILabelApp) -> APIRouter:
    """``/samadapt/label`` and ``/samadapt/series``, and the twins of the host's endpoints."""
    made = APIRouter()
    annotator = Depends(RBAC(host.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
    user = Depends(RBAC(host.MONAI_LABEL_AUTH_ROLE_USER))
    one_at_a_time = threading.Lock()

    @made.put("/datastore/label", summary="Save a label", tags=["Datastore"])
    @made.put("/samadapt/label", summary="Save a label: an image file, or a volume's raw voxels", tags=["samadapt"])
    def save_label(
        background_tasks: BackgroundTasks,
        image: str,
        label: Annotated[UploadFile, File()],
        params: Annotated[str, Form()] = "{}",
        tag: str = FINAL,
        person: Any = annotator,
    ) -> Any:
        with one_at_a_time:
            return datastore.save_label(background_tasks, image, params, tag, label, person.username)

    @made.post("/activelearning/{strategy}", summary="Next sample", tags=["ActiveLearning"])
    def next_sample(strategy: str, params: dict[str, Any] | None = None, person: Any = user) -> Any:
        return activelearning.sample(strategy, params, person.username)

    @made.get("/samadapt/label/versions", summary="All labels an image ever had", tags=["samadapt"])
    def versions(image: str, person: Any = user) -> dict[str, Any]:
        known = app.datastore().label_versions(app.datastore().known_id(image))
        return {"image": image, "versions": [version.to_dict() for version in known]}

    @made.get("/samadapt/series/{image}", summary="How far the fetch of a series is", tags=["samadapt"])
    def progress(image: str, person: Any = user) -> dict[str, Any]:
        return _told(app.datastore(), image, start=False)

    @made.post("/samadapt/series/{image}", summary="Fetch a series in the background", tags=["samadapt"])
    def fetch(image: str, person: Any = user) -> dict[str, Any]:
        return _told(app.datastore(), image, start=True)

    return made


def _told(store: Any, image: str, *, start: bool) -> dict[str, Any]:
    if not isinstance(store, SafeDicomDatastore):
        store.image_path(image)
        return {"state": "ready", "done": 0, "total": 0, "reason": None}
    progress = store.start_fetching(image) if start else store.progress(image)
    if progress is None:
        return {"state": "absent", "done": 0, "total": 0, "reason": None}
    reason = str(progress.error) if progress.error else None
    return {"state": progress.state, "done": progress.done, "total": progress.total, "reason": reason}


class WaitsForSeries:
    """Lets requests that name an image of the PACS wait, in a thread, until it is here.

    Args:
        app: what answers then.
        store: fetches the series.
    """

    def __init__(self, app: ASGIApp, store: SafeDicomDatastore) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                await self._wait(scope)
            except SamAdaptError as error:
                later = {"Retry-After": "5"} if error.http_status == 503 else None
                answer = JSONResponse(error.to_dict(), status_code=error.http_status, headers=later)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _wait(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(host.MONAI_LABEL_API_STR)
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        if path.startswith(("/infer/", "/datastore/image")) and asked.get("image") and scope["method"] != "PUT":
            await run_in_threadpool(self._store.image_path, asked["image"][0])
        if path == "/datastore/label" and asked.get("label") and scope["method"] in ("GET", "HEAD"):
            await run_in_threadpool(self._store.get_label_uri, asked["label"][0], asked.get("tag", [FINAL])[0])
