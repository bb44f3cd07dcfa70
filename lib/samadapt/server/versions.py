"""``/samadapt/models``: the versions of the model over HTTP.

They can be listed by whoever may use the server, and put in service by whoever may train. A version that is put in
service answers the next request; no restart is needed. Handlers are no coroutines: loading a model on trial must not
keep the server from answering.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from monailabel.config import settings as host
from monailabel.endpoints.user.auth import RBAC

from samadapt.config import AppConfig
from samadapt.project import Project
from samadapt.terminal import plain
from samadapt.versions import Versions


def install(server: FastAPI, project: Project, config: AppConfig) -> None:
    """Add the endpoints to a server that has started."""
    server.include_router(router(project, config), prefix=host.MONAI_LABEL_API_STR)
    server.openapi_schema = None  # its documentation is made again, with them


def router(project: Project, config: AppConfig) -> APIRouter:
    """The endpoints.

    Args:
        project: whose models.
        config: where base weights may be.
    """
    versions = Versions(project)
    made = APIRouter(prefix="/samadapt/models", tags=["samadapt"])
    user = Depends(RBAC(host.MONAI_LABEL_AUTH_ROLE_USER))
    trainer = Depends(RBAC(host.MONAI_LABEL_AUTH_ROLE_ADMIN))

    @made.get("", summary="All versions, oldest first", dependencies=[user])
    def all_versions() -> dict[str, Any]:
        return {"versions": plain([version.summary() for version in versions.all()])}

    @made.get("/{version}", summary="Everything about one version", dependencies=[user])
    def one_version(version: str) -> dict[str, Any]:
        return dict(plain(versions.get(version).to_dict()))

    @made.post("/rollback", summary="Back to the version that was in service before", dependencies=[trainer])
    def rollback(request: Request) -> dict[str, Any]:
        return dict(plain(versions.rollback(_who(request), config).summary()))

    @made.post("/{version}/promote", summary="Put a version in service", dependencies=[trainer])
    def promote(version: str, request: Request) -> dict[str, Any]:
        return dict(plain(versions.promote(version, _who(request), config).summary()))

    return made


def _who(request: Request) -> str:
    return f"{request.client.host if request.client else 'somebody'}, over HTTP"
