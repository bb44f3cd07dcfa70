"""The three models that viewers see: the whole volume by itself, and one object by clicks or a box in 2D or 3D.

Written on the host's bare ``InferTask``: its ``BasicInferTask`` reads the image anew for every click and deep-copies
the network.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from samadapt.data.geometry import turn_to_series
from samadapt.data.labels import LabelMap
from samadapt.data.slices import put_slice
from samadapt.data.volume import Volume, write_mask
from samadapt.errors import InputError
from samadapt.inference.clicks import Prompts, segment_object, segment_slice
from samadapt.inference.examine import examine
from samadapt.inference.quality import quality
from samadapt.server import options
from samadapt.server.labels import LabelSource
from samadapt.server.models import Models

logger = logging.getLogger(__name__)

Request = dict[str, Any]
AS_SERIES = "as_series"
"""In a request, set by the app: the viewer shows the image as a DICOM series; prompts and reply lie on its grid."""

SLICE_AXIS = 2  # viewers' 2D clicks live in a plane of constant k, whatever the acquisition plane was

NOTHING_FOUND = "nothing was found there: click in the middle of the structure, or draw a larger box"
NONE_OF_THEM = "none of them was found in this image; to teach more: submit more labels and train again"
NOTHING_LEARNED = "no label has been learned yet, so the mask is empty: submit labels and train, or use clicks"


class _Task(InferTask):
    """Reads the image, lets the subclass make the mask, writes the mask on the image's own grid."""

    def __init__(self, models: Models, labels: LabelSource, kind: InferType, dimension: int, description: str) -> None:
        super().__init__(type=kind, labels=None, dimension=dimension, description=description)
        self._models = models
        self._labels = labels

    def info(self) -> dict[str, Any]:
        return {**super().info(), "labels": self._labels.indices()}

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Answer one request.

        Returns:
            A mask file on the image's grid, or its series' (the host sends and deletes it), and the reply's ``params``.

        Raises:
            InputError: the image or an option cannot be used.
        """
        started = time.perf_counter()
        volume = self._models.volume(request["image"])
        if request.get(AS_SERIES):
            volume = volume.turned(turn_to_series(volume.geometry))
        form = options.mask_format(request, default_extension=".nii.gz" if volume.geometry.in_space else ".png")
        ready = time.perf_counter()
        mask, params = self.mask(volume, request)
        done = time.perf_counter()
        path = _write(mask, volume, form, params["label_names"])
        ended = time.perf_counter()
        seconds = {"pre": ready - started, "infer": done - ready, "write": ended - done, "total": ended - started}
        return str(path), {**params, "latencies": {name: round(value, 3) for name, value in seconds.items()}}

    @abstractmethod
    def mask(self, volume: Volume, request: Request) -> tuple[np.ndarray, dict[str, Any]]:
        """A uint8 mask (I,J,K) and the reply's ``params`` with at least ``label_names`` (name -> value)."""


class Segmentation(_Task):
    """The whole volume, all classes (or those in ``label_prompt``), without any prompt.

    ``restore_label_idx`` needs no code: our indices are 1..K in the order of the label map, before and after.
    """

    def __init__(self, models: Models, labels: LabelSource) -> None:
        super().__init__(models, labels, InferType.SEGMENTATION, 3, "all learned structures, without a prompt")

    def mask(self, volume: Volume, request: Request) -> tuple[np.ndarray, dict[str, Any]]:
        labels = self._labels.current()
        wanted = options.label_names(request, labels)
        params: dict[str, Any] = {"label_names": self._labels.indices()}
        if labels is None or not self._models.trained():
            logger.warning(NOTHING_LEARNED)
            return np.zeros(volume.geometry.shape, np.uint8), {
                **params,
                "model_version": None,
                "message": NOTHING_LEARNED,
            }
        served = self._models.current()
        learned = served.model.info.labels
        positions = {name: learned.find(name) for name in wanted or labels.names}
        if missing := [name for name, position in positions.items() if position is None]:
            params["message"] = f"not learned yet: {', '.join(missing)}"
        classes = [learned.names[position - 1] for position in positions.values() if position is not None]
        found, examination = examine(served.model, volume, cache=self._models.cache)
        mask = _renumbered(found, learned, labels, classes)
        if classes and not mask.any():
            params["message"] = "; ".join(
                filter(None, [params.get("message"), f"{', '.join(classes)}: {NONE_OF_THEM}"])
            )
        worth = quality(learned.names, examination, served.model.info.training.get("calibration", {}))
        return mask, {**params, "model_version": served.version, "quality": worth.to_dict()}


class Clicks(_Task):
    """One object by clicks and/or a box, as value 1.

    A click on a structure that is in no label map is fine: prompts are about this object, not about its class.
    """

    def __init__(self, models: Models, labels: LabelSource, dimension: int) -> None:
        reach = "in the clicked slice" if dimension == 2 else "in the volume"
        super().__init__(models, labels, InferType.DEEPGROW, dimension, f"one object {reach}, by clicks or a box")

    def mask(self, volume: Volume, request: Request) -> tuple[np.ndarray, dict[str, Any]]:
        shape = volume.geometry.shape
        prompts = Prompts(
            foreground=options.points(request, "foreground", shape),
            background=options.points(request, "background", shape),
            box=options.box(request, shape),
        )
        if not prompts.foreground and prompts.box is None:
            raise InputError(
                "there is neither a foreground click nor a box",
                where="foreground",
                remedy="Click on the structure, or give roi as [i0, i1, j0, j1, k0, k1].",
            )
        served = self._models.prompted()
        mask = np.zeros(shape, np.uint8)
        if self.dimension == 2:
            index = _clicked_slice(prompts, options.slice_index(request, shape[SLICE_AXIS]))
            found = segment_slice(
                served.model, volume, SLICE_AXIS, index, _on_slice(prompts, index), self._models.cache
            )
            put_slice(mask, SLICE_AXIS, index, found)
        else:
            mask[segment_object(served.model, volume, prompts, self._models.cache)] = 1
        params = {"label_names": {str(request.get("label") or "object"): 1}, "model_version": served.version}
        return mask, params if mask.any() else {**params, "message": NOTHING_FOUND}


class OneDeviceBatchInfer(BatchInferTask):
    """The host's batch inference; its default of several GPUs divides by zero on a machine without any."""

    def __call__(self, request: Request, datastore: Any, infer: Any) -> dict[str, Any]:
        return super().__call__({**request, "multi_gpu": False}, datastore, infer)


def _clicked_slice(prompts: Prompts, given: int | None) -> int:
    """The slice that the viewer says, else that of the last click, else the middle of the box."""
    if given is not None:
        return given
    if prompts.foreground:
        return prompts.foreground[-1][SLICE_AXIS]
    assert prompts.box is not None
    return (prompts.box[4] + prompts.box[5]) // 2


def _on_slice(prompts: Prompts, index: int) -> Prompts:
    """The prompts that concern one slice; a box concerns every slice.

    Raises:
        InputError: none is left.
    """
    here = Prompts(
        foreground=[point for point in prompts.foreground if point[SLICE_AXIS] == index],
        background=[point for point in prompts.background if point[SLICE_AXIS] == index],
        box=prompts.box,
    )
    if not here.foreground and here.box is None:
        raise InputError(
            f"no foreground click lies on slice {index}",
            where="slice",
            remedy="Click on that slice, or leave slice out.",
        )
    return here


def _renumbered(mask: np.ndarray, own: LabelMap, wanted: LabelMap, kept: Collection[str]) -> np.ndarray:
    """A mask in one label map's indices, in another's; names that are not in ``kept`` become background."""
    table = np.zeros(len(own.names) + 1, np.uint8)
    for value, name in enumerate(own.names, start=1):
        table[value] = (wanted.find(name) or 0) if name in kept else 0
    return table[mask]


def _write(mask: np.ndarray, volume: Volume, form: options.MaskFormat, indices: dict[str, int]) -> Path:
    handle, name = tempfile.mkstemp(suffix=form.extension)
    os.close(handle)
    names = {value: label for label, value in indices.items()}
    try:
        write_mask(name, mask.astype(form.dtype), volume.geometry, names=names, compress=form.compress)
    except BaseException:
        Path(name).unlink()
        raise
    return Path(name)
