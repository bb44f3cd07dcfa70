"""Makes the host's endpoints answer bad requests with 4xx and a remedy, before anything is started or stored.

MONAI Label 0.8.5 offers no hook between its routes and its handlers, but each route calls a plain function of its
module by name. ``install`` puts checked versions in their place and adds exception handlers to the FastAPI app.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from monailabel.config import settings
from monailabel.endpoints import activelearning, datastore, infer, train
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.main import Main
from monailabel.utils.async_tasks.utils import processes

from samadapt.activelearning.leases import somebody_at
from samadapt.config import closest
from samadapt.dicomweb import child
from samadapt.errors import InputError, SamAdaptError
from samadapt.server import endpoints, ohif, origins, proxy, submissions, threads, versions
from samadapt.server.datastore import check_text
from samadapt.server.train import FROM_THE_HOST, asked_for

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from samadapt.server.train import TrainSamAdapt

logger = logging.getLogger(__name__)

LONGEST_DEATH_S = 20.0
"""How long a killed training may take to give its memory back before the answer says so anyway."""


_ADDRESS: ContextVar[str | None] = ContextVar("address", default=None)
"""Where the request that is being answered comes from."""


def install(server: FastAPI, app: MONAILabelApp) -> None:
    """Guard ``server``'s endpoints. To be called when the app is ready and before the first request."""
    for module, name in (
        (infer, "run_inference"),
        (datastore, "add_image"),
        (datastore, "save_label"),
        (datastore, "update_image_info"),
        (datastore, "update_label_info"),
    ):
        setattr(module, name, _with_json_object(getattr(module, name)))
    datastore.download_image = _once_here(datastore.download_image, app)
    infer.run_inference = _on_an_image(_without_scribbles(infer.run_inference))
    activelearning.sample = _sample(activelearning.sample, app)
    train.run = _train_all(train.run, app)
    train.run_model = _train_one(train.run_model, app)
    train.stop = _stop(train.stop, app)
    server.add_exception_handler(SamAdaptError, _answer)
    server.add_exception_handler(MONAILabelException, _answer_host)
    server.add_exception_handler(RequestValidationError, _answer_malformed)
    versions.install(server, app.project, app.settings)
    endpoints.install(server, app)
    submissions.install(server, app)
    ohif.install(server, Path(app.app_dir))
    proxy.install(stored=app.forget_lists)
    child.watch()
    threads.install(server)
    allowed = [str(origin) for origin in settings.MONAI_LABEL_CORS_ORIGINS]
    origins.install(server, allowed, loopback=_host() in origins.LOOPBACK, prefix=settings.MONAI_LABEL_API_STR)
    server.middleware_stack = None  # Starlette builds its stack once, at start-up; this makes it build again
    server.add_middleware(_NoteAddress)
    _warn_if_public()


class _NoteAddress:
    """Keeps the client's address for handlers that the host does not show the request.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        _ADDRESS.set(client[0] if client else None)
        await self._app(scope, receive, send)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SamAdaptError)
    log = logger.warning if error.http_status < 500 else logger.error
    log("%s %s: %s", request.method, request.url.path, error)
    later = {"Retry-After": "5"} if error.http_status == 503 else None
    return JSONResponse(error.to_dict(), status_code=error.http_status, headers=later)


async def _answer_host(request: Request, error: Exception) -> JSONResponse:
    """The host's own exceptions: what it calls invalid or not found is the client's to mend."""
    assert isinstance(error, MONAILabelException)
    clients = error.error in (MONAILabelError.INVALID_INPUT, MONAILabelError.APP_ERROR)
    logger.warning("%s %s: %s", request.method, request.url.path, error.msg)
    content = {"error": error.error.value, "what": error.msg, "where": request.url.path, "remedy": None}
    return JSONResponse(content, status_code=404 if clients else 500)


async def _answer_malformed(request: Request, error: Exception) -> JSONResponse:
    """What FastAPI finds wrong with a request's parts, in the form of all our errors."""
    assert isinstance(error, RequestValidationError)
    found = [(".".join(map(str, one["loc"][1:])) or str(one["loc"][0]), str(one["msg"])) for one in error.errors()]
    what = "; ".join(f"{place}: {reason[:1].lower()}{reason[1:]}" for place, reason in found)
    where = ", ".join(dict.fromkeys(place for place, _ in found))
    remedy = f"GET /docs says what {request.method} {request.url.path} takes."
    logger.warning("%s %s: %s", request.method, request.url.path, what)
    content = {"error": "InputError", "what": what, "where": where, "remedy": remedy}
    return JSONResponse(content, status_code=422)


def _with_json_object(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Check the form field ``params`` (or ``info``), which the host parses without a look."""
    signature = inspect.signature(handler)
    field = "params" if "params" in signature.parameters else "info"

    @functools.wraps(handler)
    def checked(*args: Any, **kwargs: Any) -> Any:
        text = signature.bind(*args, **kwargs).arguments.get(field) or "{}"
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON ({error})", where=field, remedy='Send an object such as {"a": 1}.') from None
        if not isinstance(value, dict):
            raise InputError(f"{text!r} is no JSON object", where=field, remedy='Send an object such as {"a": 1}.')
        return handler(*args, **kwargs)

    return checked


def _once_here(handler: Callable[..., Any], app: MONAILabelApp) -> Callable[..., Any]:
    """Let whoever downloads an image wait until the PACS has sent it; an unknown id is said to be one."""

    @functools.wraps(handler)
    def checked(image: str, *args: Any, **kwargs: Any) -> Any:
        app.datastore().image_path(image)
        return handler(image, *args, **kwargs)

    return checked


def _without_scribbles(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a drawn mask as prompt: none of the models takes one, and an answer that ignores it would surprise."""
    signature = inspect.signature(handler)

    @functools.wraps(handler)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if signature.bind(*args, **kwargs).arguments.get("label"):
            raise InputError(
                "scribbles are not understood",
                where="label",
                remedy="Use samadapt_click or samadapt_click_3d: click on the structure, or draw a box around it.",
            )
        return handler(*args, **kwargs)

    return checked


def _on_an_image(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Say it where a request names no image, which the host calls an error of its own (500)."""
    signature = inspect.signature(handler)

    @functools.wraps(handler)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not any(given.get(name) for name in ("image", "file", "session_id")):
            raise InputError("no image is named", where="image", remedy="Add ?image=ID, or send a file.")
        return handler(*args, **kwargs)

    return checked


def _sample(handler: Callable[..., Any], app: MONAILabelApp) -> Callable[..., Any]:
    """Name unknown strategies, and say why there is no next image (the host would answer ``{}``).

    Viewers that do not say who asks (OHIF's panel) are told apart by their machines.
    """

    @functools.wraps(handler)
    def checked(strategy: str, params: dict[str, Any] | None = None, user: str | None = None) -> Any:
        _require("strategy", strategy, app._strategies)
        asked, address = params or {}, _ADDRESS.get()
        check_text(asked, "client_id")
        if not asked.get("client_id") and address:
            asked = {**asked, "client_id": somebody_at(address)}
        return handler(strategy, asked, user) or {"message": app._strategies[strategy].why_nothing()}

    return checked


def _train_all(handler: Callable[..., Any], app: MONAILabelApp) -> Callable[..., Any]:
    """``POST /train/``: the body holds one entry per trainer; OHIF's bundled panel sends ``{}``."""

    @functools.wraps(handler)
    def checked(params: dict[str, Any] | None = None, run_sync: bool | None = False) -> Any:
        if misplaced := [key for key in params or {} if key not in (*app._trainers, *FROM_THE_HOST)]:
            raise InputError(
                "POST /train/ takes settings by trainer, and this is none",
                where=misplaced[0],
                remedy=f"Send them to POST /train/{next(iter(app._trainers))}, or in an object of that name.",
            )
        for trainer in app._trainers.values():
            _check_training(trainer, (params or {}).get(trainer.name), app)
        return handler(params, run_sync)

    return checked


def _train_one(handler: Callable[..., Any], app: MONAILabelApp) -> Callable[..., Any]:
    @functools.wraps(handler)
    def checked(
        model: str, params: dict[str, Any] | None = None, run_sync: bool | None = False, enqueue: bool | None = False
    ) -> Any:
        _check_training(_require("trainer", model, app._trainers), params, app)
        # The host looks for a process, which a training that was asked for a moment ago has not got yet.
        if not (run_sync or enqueue) and asked_for():
            raise HTTPException(status_code=429, detail="A training is running already; wait for its end, or stop it.")
        return handler(model, params, run_sync, enqueue)

    return checked


def _stop(handler: Callable[..., Any], app: MONAILabelApp) -> Callable[..., Any]:
    """``DELETE /train/``: answer when the process is gone, not when it was told to go.

    The host only sends the signal. A training of some gigabytes needs a moment to end, and until then its progress
    reads "running" and it holds its files and its device. Slicer shows the last line of ``details``, and fails where
    there is none.
    """

    @functools.wraps(handler)
    def checked() -> Any:
        running = list(processes("train").values())
        app.auto_train.stopped_by_hand()
        answer = handler()
        try:
            for process in running:
                process.wait(LONGEST_DEATH_S)
        except subprocess.TimeoutExpired:
            logger.warning("the stopped training (process %d) still has not ended", process.pid)
        if answer is not None and not answer.get("details"):
            answer["details"] = ["stopped before its first step"]
        return answer

    return checked


def _check_training(trainer: TrainSamAdapt, params: Any, app: MONAILabelApp) -> None:
    if params is not None and not isinstance(params, dict):
        raise InputError(f"{params!r} is no JSON object", where=trainer.name, remedy="Send the settings as an object.")
    trainer.check(params or {}, app.datastore())


def _require(kind: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise InputError(f"there is no {kind} {name!r}", where=kind, remedy=closest(name, list(known)))
    return known[name]


def _host() -> str | None:
    """Where ``monailabel start_server`` listens; None where something else has started the server."""
    return getattr(Main().args_parser().parse_known_args(sys.argv[1:])[0], "host", None)


def _warn_if_public() -> None:
    """``monailabel start_server`` listens on every interface unless told otherwise, and asks nobody for a password."""
    host = _host()
    if host is not None and host not in origins.LOOPBACK:
        logger.warning(
            "This server listens on %s without any password: everyone who can reach this machine can read the images "
            "and change the labels. Start it with --host 127.0.0.1, or put it behind a proxy that asks who is there.",
            host,
        )
