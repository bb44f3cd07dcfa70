"""The OHIF that the host serves, with this project's add-on: the page gets one more script tag, the rest is files.

The host answers every client-side route of OHIF with the page of its own package; that file is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse
from monailabel.config import settings as host
from monailabel.endpoints import ohif
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

MOUNT = f"{host.MONAI_LABEL_API_STR}/samadapt/ohif"
FRESH = {"Cache-Control": "no-cache"}  # browsers ask whether a file has changed: an update arrives with the next load
PAGE = "index.html"


class _Fresh(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(FRESH)
        return response


def install(server: FastAPI, app_dir: Path) -> None:
    """Serve the add-on in ``app_dir``/ohif, and OHIF's page with it."""
    server.mount(MOUNT, _Fresh(directory=app_dir / "ohif"), name="samadapt-ohif")
    ohif.get_ohif = _with_add_on(ohif.get_ohif)


def add_tag(page: str) -> str:
    """OHIF's page with the add-on's script as the last thing in its head; unchanged if it has no head."""
    tag = f'<script type="module" src="{MOUNT}/main.js"></script>'
    return page.replace("</head>", f"{tag}</head>", 1)


def _with_add_on(handler: Callable[[str], FileResponse]) -> Callable[[str], Response]:
    @functools.wraps(handler)
    def served(path: str) -> Response:
        response = handler(path)
        if Path(response.path).name != PAGE:
            return response
        return HTMLResponse(add_tag(Path(response.path).read_text(encoding="utf-8")), headers=FRESH)

    return served
