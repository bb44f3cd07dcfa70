"""The DICOMweb server as a child process of whoever starts the label server."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import md5
from pathlib import Path

from samadapt.data.dicom import dicom_files
from samadapt.errors import StateError
from samadapt.project import FOLDER

LIBRARY = Path(__file__).resolve().parents[2]


def holds_dicom(folder: Path) -> bool:
    """Whether there is any DICOM file in or below a folder; looks until it has found one."""
    return next(dicom_files(folder), None) is not None


ADDRESS = "SAMADAPT_DICOMWEB"
"""Environment variable: where the images of a folder are served over DICOMweb, for a server whose store is the folder.
"""


def start_for_volumes(folder: Path) -> dict[str, str]:
    """Serve a folder's volumes, converted to DICOM, as ``start`` does; returns the label server's setting for it."""
    return {ADDRESS: start(folder, "--volumes")}


def start(folder: Path, *options: str) -> str:
    """Serve ``folder`` over DICOMweb on a free loopback port until this process ends; returns the address.

    It survives that this process becomes another program (``exec``). It answers at once, and goes on indexing.

    Raises:
        StateError: it did not start.
    """
    words = [sys.executable, "-m", "samadapt.dicomweb", str(folder), "--parent", str(os.getpid()), *options]
    path = os.pathsep.join(filter(None, [str(LIBRARY), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        raise StateError(
            f"the DICOMweb server ended with code {process.wait()}",
            where=folder,
            remedy="Its reason stands above; the folder must be writable.",
        )
    return address


def store_folder(folder: Path) -> Path:
    """Where labels and models of a folder with DICOM files are kept."""
    return folder / FOLDER / "dicomweb" / "store"


def host_environment(folder: Path, address: str) -> dict[str, str]:
    """Settings with which MONAI Label keeps labels and models in ``store_folder``, whatever the port of today.

    The host puts them into a folder that is named by a hash of the address, so that name leads to the right one.
    """
    store = store_folder(folder)
    store.mkdir(parents=True, exist_ok=True)
    names = store.with_name("by_address")
    names.mkdir(exist_ok=True)
    for former in names.iterdir():
        if former.is_symlink():
            former.unlink()
    (names / md5(address.encode(), usedforsecurity=False).hexdigest()).symlink_to(store, target_is_directory=True)
    # Two hours is what the host goes on with its list of images for; here asking costs nothing, and files come in.
    return {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(names), "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "10"}
