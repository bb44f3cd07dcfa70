"""Labels as a browser sends them, the labels that an image ever had, and how far the fetch of a series is."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, File, Form, UploadFile
from monailabel.config import settings as host
from monailabel.endpoints import datastore, infer
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import DefaultLabelTag

from samadapt.server.dicom_datastore import SafeDicomDatastore

FINAL = DefaultLabelTag.FINAL.value


def install(server: FastAPI, app: MONAILabelApp) -> None:
    """Add the endpoints to a server that has started."""
    server.include_router(router(app), prefix=host.MONAI_LABEL_API_STR)
    if isinstance(app.datastore(), SafeDicomDatastore):  # the host's converter goes by position (``output=dicom_seg``)
        infer.DICOMWebDatastore = SafeDicomDatastore
        infer.nifti_to_dicom_seg = app.datastore().seg_file


def router(app: MONAILabelApp) -> APIRouter:
    """``/samadapt/label``, ``/samadapt/label/versions`` and ``/samadapt/series``; all of them run in threads."""
    made = APIRouter(prefix="/samadapt", tags=["samadapt"])
    annotator = Depends(RBAC(host.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
    user = Depends(RBAC(host.MONAI_LABEL_AUTH_ROLE_USER))

    @made.put("/label", summary="Save a label: an image file, or a volume's raw voxels")
    def save_label(
        background_tasks: BackgroundTasks,
        image: str,
        label: Annotated[UploadFile, File()],
        params: Annotated[str, Form()] = "{}",
        tag: str = FINAL,
        person: Any = annotator,
    ) -> Any:
        return datastore.save_label(background_tasks, image, params, tag, label, person.username)

    @made.get("/label/versions", summary="All labels an image ever had")
    def versions(image: str, person: Any = user) -> dict[str, Any]:
        known = app.datastore().label_versions(app.datastore().known_id(image))
        return {"image": image, "versions": [version.to_dict() for version in known]}

    @made.get("/series/{image}", summary="How far the fetch of a series is")
    def progress(image: str, person: Any = user) -> dict[str, Any]:
        store = app.datastore()
        return _told(store.progress(image) if isinstance(store, SafeDicomDatastore) else store.known_id(image))

    @made.post("/series/{image}", summary="Fetch a series in the background")
    def fetch(image: str, person: Any = user) -> dict[str, Any]:
        store = app.datastore()
        return _told(store.start_fetching(image) if isinstance(store, SafeDicomDatastore) else store.known_id(image))

    return made


def _told(progress: Any) -> dict[str, Any]:
    """``progress``: None where nobody has asked for the series; a plain id where there is nothing to fetch."""
    if progress is None or isinstance(progress, str):
        return {"state": "ready" if progress else "absent", "done": 0, "total": 0, "reason": None}
    reason = str(progress.error) if progress.error else None
    return {"state": progress.state, "done": progress.done, "total": progress.total, "reason": reason}
