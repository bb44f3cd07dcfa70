"""A folder of volumes that OHIF sees as DICOM series: an image may be named by its id or by its series.

This is the only place that knows both names and both orders of voxels. Who names the series speaks of its grid
(``turn_to_series``: clicks, boxes, slices, raw voxels); who names the image speaks of the file's.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from samadapt.data.coverage import SLICES
from samadapt.data.geometry import Geometry, turn_to_series
from samadapt.dicomweb import converted
from samadapt.dicomweb.child import ADDRESS
from samadapt.dicomweb.converted import Converted
from samadapt.server.datastore import SafeDatastore, Version, in_order_of

logger = logging.getLogger(__name__)


class OfferedDatastore(SafeDatastore):
    """``SafeDatastore`` with the series that its volumes are converted to; labels lie on the grid of the files."""

    def __init__(self, datastore_path: str, **host_options: Any) -> None:
        self._converted = converted.folder_in(Path(datastore_path))
        self._read_at = -1
        self._by_series: dict[str, Converted] = {}
        self._by_case: dict[str, Converted] = {}
        super().__init__(datastore_path, **host_options)

    def begin(self) -> None:
        """Also say where OHIF's list of studies stays empty, and what to do about it."""
        super().begin()
        if ADDRESS not in os.environ:
            logger.warning(
                "OHIF shows no images of a folder that is served like this. To label in OHIF, start the server by: "
                "samadapt serve --studies %s (3D Slicer works with either)",
                self.folder,
            )

    # ---- names

    def series_of(self, image_id: str) -> Converted | None:
        """The series that a case is converted to; None before that."""
        self._read_records()
        return self._by_case.get(image_id)

    def case_of(self, name: str) -> str:
        """The case that a series shows; every other name is left as it is."""
        record = self._named(name)
        return record.case if record else name

    def names_series(self, name: str) -> bool:
        """Whether it is the UID of a series that shows a case, so that the request means the series' grid."""
        return self._named(name) is not None

    def _named(self, name: str) -> Converted | None:
        if name in self._datastore.objects:
            return None
        self._read_records()
        return self._by_series.get(name)

    def _read_records(self) -> None:
        try:
            changed = self._converted.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed != self._read_at:
            known = converted.records(self._converted)
            self._by_series = {record.series: record for record in known}
            self._by_case = {record.case: record for record in known}
            self._read_at = changed

    # ---- reading

    def image_path(self, image_id: str) -> str:
        return super().image_path(self.case_of(image_id))

    def known_id(self, image_id: str) -> str:
        return super().known_id(self.case_of(image_id))

    def get_image_uri(self, image_id: str) -> str:
        return str(super().get_image_uri(self.case_of(image_id)))

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        return str(super().get_label_uri(self.case_of(label_id), label_tag))

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        return dict(super().get_label_info(self.case_of(label_id), label_tag))

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """With the names by which OHIF opens the image, which the next sample's reply takes from here."""
        case = self.case_of(image_id)
        info, record = dict(super().get_image_info(case)), self.series_of(case)
        if record is None:
            return info
        names = {"StudyInstanceUID": record.study, "SeriesInstanceUID": record.series, "PatientID": record.patient}
        return {**info, **names}

    def in_series(self, image_id: str, numbers: list[int]) -> list[int]:
        """Slices across the acquisition axis of an image, as slices of its series; and the other way round.

        Numbers that the image does not have are left as they are.
        """
        turn = turn_to_series(self.geometry_of(self.image_path(image_id)))
        count = turn.turned.shape[2]
        backwards = turn.steps[turn.native.acquisition_axis, 1] < 0
        return [count - 1 - number if backwards and 0 <= number < count else number for number in numbers]

    def in_viewer(self, image_id: str, numbers: list[int]) -> dict[str, Any]:
        return {"series_slices": self.in_series(image_id, numbers)} if self.series_of(image_id) else {}

    def version_mask(self, image_id: str, version: Version) -> tuple[np.ndarray, Geometry]:
        """As the base class's; on the grid of the series where that is named."""
        mask, geometry = super().version_mask(image_id, version)
        if not self.names_series(image_id):
            return mask, geometry
        turn = turn_to_series(geometry)
        return turn.forward(mask), turn.turned

    # ---- changing

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        super().update_image_info(self.case_of(image_id), info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        super().update_label_info(self.case_of(label_id), label_tag, info)

    def remove_image(self, image_id: str) -> None:
        super().remove_image(self.case_of(image_id))

    def remove_label(self, label_id: str, label_tag: str) -> None:
        super().remove_label(self.case_of(label_id), label_tag)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """As the base class's. Where the series is named, raw voxels and numbers of slices are those of its grid."""
        record, info = self._named(image_id), dict(label_info or {})
        if record is None:
            return super().save_label(image_id, label_filename, label_tag, info)
        numbers = info.get(SLICES)
        if isinstance(numbers, list) and all(type(number) is int for number in numbers):
            info[SLICES] = sorted(self.in_series(record.case, numbers))
        return super().save_label(image_id, label_filename, label_tag, info)

    def _shape_shown(self, name: str, geometry: Geometry) -> tuple[int, int, int]:
        return turn_to_series(geometry).turned.shape if self.names_series(name) else geometry.shape

    def _as_stored(self, name: str, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
        return turn_to_series(geometry).back(mask) if self.names_series(name) else mask

    def _in_order(self, name: str, mask: np.ndarray, slices: Any) -> np.ndarray:
        record = self._named(name)
        return super()._in_order(name, mask, slices) if record is None else in_order_of(record.instances, mask, slices)
