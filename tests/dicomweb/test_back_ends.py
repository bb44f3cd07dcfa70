"""The same questions to both DICOMweb back ends, asked by an independent client."""

from __future__ import annotations

import numpy as np
from dicomweb_client.api import DICOMwebClient
from pydicom.uid import generate_uid

from make_dicom import write_stack
from pacs import pacs

__all__ = ["pacs"]


def test_what_is_stored_is_found_and_read_again(pacs, tmp_path):
    volume = np.arange(4 * 6 * 5, dtype=np.int16).reshape(4, 6, 5)
    study = generate_uid()
    write_stack(tmp_path / "series", volume, [(0, 0, z) for z in range(4)], StudyInstanceUID=study)
    assert pacs.upload(tmp_path / "series") == 4
    client = DICOMwebClient(pacs.url)
    (series,) = client.search_for_series(study_instance_uid=study)
    read = client.retrieve_series(study, series["0020000E"]["Value"][0])
    ordered = sorted(read, key=lambda instance: instance.ImagePositionPatient[2])
    assert (np.stack([instance.pixel_array for instance in ordered]) == volume).all()
