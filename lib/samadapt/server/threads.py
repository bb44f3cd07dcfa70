"""The host's slow handlers in worker threads, so that everybody else is answered meanwhile.

In the host every handler is ``async`` around synchronous work: while one inference runs, no image loads and no
progress is shown. Here inferences, label saves and the choice of the next sample run in threads, of each kind one at
a time, as the host has it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import activelearning, datastore, infer

_CHANGES = frozenset({"PUT", "DELETE"})


def install(server: FastAPI) -> None:
    """Let threads answer the host's slow routes. To be called before the first request."""
    front = APIRouter()
    choosing, storing = threading.Lock(), threading.Lock()
    for route in infer.router.routes:  # one at a time by the app's own lock: a wait for the PACS holds up nobody
        _take_over(front, route, nullcontext())
    for route in activelearning.router.routes:
        _take_over(front, route, choosing)
    for route in datastore.router.routes:
        changes = isinstance(route, APIRoute) and not _CHANGES.isdisjoint(route.methods or ())
        _take_over(front, route, storing if changes else nullcontext())
    server.include_router(front, prefix=settings.MONAI_LABEL_API_STR)
    routes = server.router.routes
    routes.insert(0, routes.pop())  # the first route that matches answers
    server.openapi_schema = None


def _take_over(front: APIRouter, route: Any, lock: AbstractContextManager[Any]) -> None:
    assert isinstance(route, APIRoute)
    front.add_api_route(
        route.path,
        in_thread(route.endpoint, lock),
        methods=sorted(route.methods or ()),
        summary=route.summary,
        tags=route.tags,
        responses=route.responses,
        response_model=None,
        include_in_schema=False,  # the documentation has it already
    )


def in_thread(
    handler: Callable[..., Coroutine[Any, Any, Any]], lock: AbstractContextManager[Any]
) -> Callable[..., Any]:
    """``handler``, a coroutine function that never waits for anything, as a plain function: FastAPI runs that in a
    thread. It is not unwrapped by FastAPI, which would find the coroutine again."""

    def run(**values: Any) -> Any:
        with lock:
            coroutine = handler(**values)
            try:
                coroutine.send(None)
            except StopIteration as done:
                return done.value
            coroutine.close()
            raise RuntimeError(f"{handler.__name__} waits for something; it needs the server's event loop")

    run.__name__ = handler.__name__
    run.__doc__ = handler.__doc__
    run.__signature__ = inspect.signature(handler)  # type: ignore[attr-defined]
    return run
