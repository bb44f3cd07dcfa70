"""The DICOMweb server as a child process of the label server, which starts it again where it ends before its time."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import md5
from pathlib import Path
from urllib.parse import urlsplit

from samadapt.data.dicom import dicom_files
from samadapt.errors import StateError
from samadapt.project import FOLDER

logger = logging.getLogger(__name__)

TRIES = 5
"""So often it is started again; a time of ``LONG_LIFE_S`` without an end makes it so many again."""

LONG_LIFE_S = 300.0
_BREATH_S = 1.0  # Ctrl-C reaches both processes: time for this one to end, too

LIBRARY = Path(__file__).resolve().parents[2]


def holds_dicom(folder: Path) -> bool:
    """Whether there is any DICOM file in or below a folder; looks until it has found one."""
    return next(dicom_files(folder), None) is not None


ADDRESS = "SAMADAPT_DICOMWEB"
"""Environment variable: where the images of a folder are served over DICOMweb, for a server whose store is the folder.
"""


CHILD = "SAMADAPT_DICOMWEB_CHILD"
"""Environment variable: the DICOMweb server that the label server has to watch over, a ``Child`` as JSON."""


@dataclass(frozen=True)
class Child:
    """A DICOMweb server that runs.

    Attributes:
        address: of its DICOMweb root.
        process: its id.
        words: the command that starts it again at the same address.
    """

    address: str
    process: int
    words: tuple[str, ...]

    def variables(self) -> dict[str, str]:
        """What tells the label server to watch over it, for its environment."""
        return {CHILD: json.dumps(asdict(self))}


def start_for_volumes(folder: Path) -> dict[str, str]:
    """Serve a folder's volumes, converted to DICOM, as ``start`` does; returns the label server's settings for it."""
    child = start(folder, "--volumes")
    return {ADDRESS: child.address, **child.variables()}


def start(folder: Path, *options: str) -> Child:
    """Serve ``folder`` over DICOMweb on a free loopback port until this process ends.

    It survives that this process becomes another program (``exec``). It answers at once, and goes on indexing.

    Raises:
        StateError: it did not start.
    """
    words = [sys.executable, "-m", "samadapt.dicomweb", str(folder), "--parent", str(os.getpid()), *options]
    process = _run(words)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        raise StateError(
            f"the DICOMweb server ended with code {process.wait()}",
            where=folder,
            remedy="Its reason stands above; the folder must be writable.",
        )
    return Child(address, process.pid, (*words, "--port", str(urlsplit(address).port)))


def watch() -> None:
    """Start the DICOMweb server that this process's environment names again whenever it ends (in a thread)."""
    if described := os.environ.get(CHILD):
        child = Child(**json.loads(described))
        threading.Thread(target=_keep_alive, args=(child,), name="dicomweb-child", daemon=True).start()


def _keep_alive(child: Child) -> None:
    process, tries, born, running = child.process, TRIES, time.monotonic(), None
    while (code := _end_of(process)) is not None and code not in (0, -signal.SIGINT):  # those are told to end
        time.sleep(_BREATH_S)
        tries = TRIES if time.monotonic() - born > LONG_LIFE_S else tries
        if not tries:
            logger.critical(
                "the DICOMweb server has ended again (code %d) and is left alone after %d tries: OHIF shows no images. "
                "Its reason stands above; start samadapt serve again.",
                code,
                TRIES,
            )
            return
        tries -= 1
        logger.error("the DICOMweb server has ended (code %d); it is started again at %s", code, child.address)
        running = _run(child.words)  # kept: subprocess itself would wait for a process that nobody refers to
        process, born = running.pid, time.monotonic()


def _end_of(process: int) -> int | None:
    """Exit code of a child process, once it has ended, negative for a signal; None where it is no child of ours."""
    try:
        _, status = os.waitpid(process, 0)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status)


def _run(words: Sequence[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(LIBRARY), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, text=True)


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
