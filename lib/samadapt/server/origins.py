"""Who may talk to this server: its own pages, and programs. No web page of somebody else's.

A browser sends requests to 127.0.0.1 for any page that asks. The host would answer all of them, with permission to
read (CORS with every origin, and credentials).
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from samadapt.errors import SamAdaptError

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
SETTING = "MONAI_LABEL_CORS_ORIGINS"

_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class ForbiddenError(SamAdaptError):
    """A request that nobody may make from there."""

    http_status = 403


class OwnOrigin:
    """ASGI middleware that refuses, with 403 and the reason,

    - changes asked for by pages of another origin than this server's, and than ``origins``;
    - on a server that listens on loopback, requests for another host name (a page's name may be made to point here);
    - ``GET /logs`` from another machine, and ``POST /reload`` altogether.

    Args:
        app: what it guards.
        origins: further pages that may use the server, as ``https://host:port``.
        loopback: whether the server listens on the loopback interface alone.
        prefix: of the API's paths.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str], loopback: bool, prefix: str) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._names = LOOPBACK | {name for origin in self._origins if (name := urlsplit(origin).hostname)}
        self._loopback = loopback
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(refusal.to_dict(), refusal.http_status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ForbiddenError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        path = str(scope["path"]).removeprefix(self._prefix).rstrip("/")
        if self._loopback and urlsplit(f"//{host}").hostname not in self._names:
            return ForbiddenError(
                "this server listens on this machine alone and is not known by that name",
                where=f"Host: {host}",
                remedy=f"Use http://127.0.0.1, or name the address in {SETTING} if a proxy stands before it.",
            )
        if scope["method"] not in _READS and origin and not self._own(origin, host):
            return ForbiddenError(
                "a page of another origin asks for a change",
                where=f"Origin: {origin}",
                remedy=f"Use the viewer that this server offers, or allow that page by {SETTING}.",
            )
        if path == "/reload":
            return ForbiddenError(
                "the app cannot be exchanged while it runs", where="/reload", remedy="Restart the server."
            )
        client = (scope.get("client") or ("",))[0]
        if (path == "/logs" or path.startswith("/logs/")) and client not in LOOPBACK:
            return ForbiddenError(
                "the log, which names patients' images, is shown on the server's machine only",
                where="/logs",
                remedy="Read it there.",
            )
        return None

    def _own(self, origin: str, host: str) -> bool:
        return origin in self._origins or urlsplit(origin).netloc == host


def install(server: FastAPI, origins: Iterable[str], *, loopback: bool, prefix: str) -> None:
    """Guard ``server``; other origins than ``origins`` get no permission to read either."""
    allowed = [origin.rstrip("/") for origin in origins]
    kept = [entry for entry in server.user_middleware if entry.cls is not CORSMiddleware]
    if allowed:
        kept.append(
            Middleware(
                CORSMiddleware,
                allow_origins=allowed,
                allow_credentials=True,
                allow_methods=["*"],
                allow_headers=["*"],
            )
        )
    guard = Middleware(OwnOrigin, origins=allowed, loopback=loopback, prefix=prefix)
    server.user_middleware = [guard, *kept]
