"""What the host has no endpoint for: the worklist, and the pause of trainings that start by themselves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from monailabel.config import settings as host
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.app import MONAILabelApp
from pydantic import BaseModel, StrictBool


class Pause(BaseModel):
    """Body of ``POST /samadapt/auto_train``."""

    paused: StrictBool


def install(server: FastAPI, app: MONAILabelApp) -> None:
    """Add the endpoints to a server that has started."""
    server.include_router(router(app), prefix=host.MONAI_LABEL_API_STR)
    server.openapi_schema = None  # its documentation is made again, with them


def router(app: MONAILabelApp) -> APIRouter:
    """The endpoints under ``/samadapt``; whoever may train may pause trainings."""
    made = APIRouter(prefix="/samadapt", tags=["samadapt"])
    user = Depends(RBAC(host.MONAI_LABEL_AUTH_ROLE_USER))
    trainer = Depends(RBAC(host.MONAI_LABEL_AUTH_ROLE_ADMIN))

    @made.get("/worklist", summary="Unlabelled images, worst first by the expected Dice", dependencies=[user])
    def worklist() -> dict[str, Any]:
        return dict(app.outlook.worklist())

    @made.get("/auto_train", summary="Trainings that start by themselves: state", dependencies=[user])
    def auto_train() -> dict[str, Any]:
        return dict(app.auto_train.state())

    @made.post("/auto_train", summary="Pause them, or let them go on", dependencies=[trainer])
    def pause(body: Pause) -> dict[str, Any]:
        app.auto_train.pause(body.paused)
        return dict(app.auto_train.state())

    return made
