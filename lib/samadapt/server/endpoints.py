"""What the host has no endpoint for: the worklist, and the pause of trainings that start by themselves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from monailabel.interfaces.app import MONAILabelApp
from pydantic import BaseModel, StrictBool


class Pause(BaseModel):
    """Body of ``POST /samadapt/auto_train``."""

    paused: StrictBool


def router(app: MONAILabelApp) -> APIRouter:
    """Endpoints under ``/samadapt``."""
    found = APIRouter(prefix="/samadapt", tags=["samadapt"])

    @found.get("/worklist", summary="Unlabelled images, worst first by the Dice that is expected of the model's mask")
    def worklist() -> dict[str, Any]:
        return app.outlook.worklist()

    @found.get("/auto_train", summary="Whether trainings start by themselves, and how many labels are new")
    def auto_train() -> dict[str, Any]:
        return app.auto_train.state()

    @found.post("/auto_train", summary="Pause trainings that start by themselves, or let them go on")
    def pause(body: Pause) -> dict[str, Any]:
        app.auto_train.pause(body.paused)
        return app.auto_train.state()

    return found
