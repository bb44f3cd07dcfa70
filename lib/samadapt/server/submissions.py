"""Labels as a browser sends and reads them, those that an image ever had, and how far the fetch of a series is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, File, Form, Response, UploadFile
from monailabel.config import settings as host
from monailabel.endpoints import datastore, infer
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import DefaultLabelTag
from pydantic import BaseModel

from samadapt.data.coverage import ALL, NONEMPTY, SLICES, Coverage
from samadapt.data.labels import values_from_label_info, values_in
from samadapt.data.volume import write_mask
from samadapt.errors import InputError, NotFoundError
from samadapt.server.datastore import Version
from samadapt.server.dicom_datastore import SafeDicomDatastore

FINAL = DefaultLabelTag.FINAL.value
LARGEST = 255


class Restorer(BaseModel):
    """Body of ``POST /samadapt/label/restore``: who wants it, and which label they know of (as in a submission)."""

    client_id: str | None = None
    author: str | None = None
    based_on: str | None = None


def install(server: FastAPI, app: MONAILabelApp) -> None:
    """Add the endpoints to a server that has started."""
    server.include_router(router(app), prefix=host.MONAI_LABEL_API_STR)
    if isinstance(app.datastore(), SafeDicomDatastore):  # the host's converter goes by position (``output=dicom_seg``)
        infer.DICOMWebDatastore = SafeDicomDatastore
        infer.nifti_to_dicom_seg = app.datastore().seg_file


def router(app: MONAILabelApp) -> APIRouter:
    """``/samadapt/label``, what is below it, and ``/samadapt/series``; all of them run in threads."""
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

    @made.get("/label", summary="What is known of the label that counts")
    def stored_label(image: str, person: Any = user) -> dict[str, Any]:
        version = app.datastore().latest_label(image)
        return {"image": image, "label": version and _described(app, image, version)}

    @made.get("/label/mask", summary="Voxels of a label, on the grid that the viewer shows, as raw NRRD")
    def mask(image: str, version: str | None = None, person: Any = user) -> Response:
        return Response(_mask_file(app, image, _one(app, image, version)), media_type="application/octet-stream")

    @made.get("/label/versions", summary="All labels an image ever had")
    def versions(image: str, person: Any = user) -> dict[str, Any]:
        known = app.datastore().label_versions(app.datastore().known_id(image))
        return {"image": image, "versions": [version.to_dict() for version in known]}

    @made.post("/label/restore", summary="Let an earlier label count again, as the newest")
    def restore(image: str, version: str, body: Restorer, person: Any = annotator) -> dict[str, Any]:
        label = app.datastore().restore_label(image, version, body.model_dump(exclude_unset=True))
        return {**app.on_save_label(image, label), "image": image, "label": label}

    @made.get("/series/{image}", summary="How far the fetch of a series is")
    def progress(image: str, person: Any = user) -> dict[str, Any]:
        store = app.datastore()
        return _told(store.progress(image) if isinstance(store, SafeDicomDatastore) else store.known_id(image))

    @made.post("/series/{image}", summary="Fetch a series in the background")
    def fetch(image: str, person: Any = user) -> dict[str, Any]:
        store = app.datastore()
        return _told(store.start_fetching(image) if isinstance(store, SafeDicomDatastore) else store.known_id(image))

    return made


def _one(app: MONAILabelApp, image: str, name: str | None) -> Version:
    """A version by its name, or the label that counts."""
    if name is not None:
        return app.datastore().label_version(image, name)
    latest = app.datastore().latest_label(image)
    if latest is None:
        raise NotFoundError("the image has no label", where="image", remedy="Submit one first.")
    return latest


def _described(app: MONAILabelApp, image: str, version: Version) -> dict[str, Any]:
    """A version with its slices, counted as the viewer does."""
    store = app.datastore()
    voxels, grid = store.version_mask(image, version)
    drawn = np.flatnonzero(np.moveaxis(voxels, grid.acquisition_axis, 0).any(axis=(1, 2)))
    covered = Coverage.from_info(version.info).or_else(store.assumed).slices or ALL
    labelled = drawn.tolist() if covered == NONEMPTY else covered
    if isinstance(covered, tuple) and store.known_id(image) != image:  # named by its series
        labelled = sorted(store.in_series(image, list(covered)))
    return {**version.to_dict(), "slices": drawn.tolist(), SLICES: labelled}


def _mask_file(app: MONAILabelApp, image: str, version: Version) -> bytes:
    """uint8, uncompressed, i fastest; ``label_names`` in its header is value -> name."""
    voxels, grid = app.datastore().version_mask(image, version)
    if voxels.max(initial=0) > LARGEST:
        raise InputError(
            f"the label has values above {LARGEST}, which viewers cannot show",
            where=f"label of {image}",
            remedy="Submit it with smaller values; their names stay.",
        )
    entries, known = version.info.get("label_info"), app.label_source.indices()
    values = values_from_label_info(entries) if entries else {value: name for name, value in known.items()}
    present = values_in(voxels)
    names = {value: name for value, name in values.items() if value in present}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "label.nrrd"
        write_mask(path, voxels.astype(np.uint8), grid, names=names, compress=False)
        return path.read_bytes()


def _told(progress: Any) -> dict[str, Any]:
    """``progress``: None where nobody has asked for the series; a plain id where there is nothing to fetch."""
    if progress is None or isinstance(progress, str):
        return {"state": "ready" if progress else "absent", "done": 0, "total": 0, "reason": None}
    reason = str(progress.error) if progress.error else None
    return {"state": progress.state, "done": progress.done, "total": progress.total, "reason": reason}
