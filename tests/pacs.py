"""DICOMweb back ends for tests, real ones, each in a process of its own: Orthanc, and the server that comes with us.

Both have the same interface, so that a test that takes the fixture ``pacs`` asks the same of both.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pydicom import dcmread

ORTHANC = next((found for name in ("Orthanc", "/usr/sbin/Orthanc") if (found := shutil.which(name))), None)
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")

BACK_ENDS = ("orthanc", "embedded")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class BackEnd:
    """A server in a process of its own; what it stores lies in a temporary folder, unless it is given one."""

    name = ""

    def __init__(self, folder: Path | None = None) -> None:
        self.port = free_port()
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/dicom-web"
        self.folder = folder or Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._own = folder is None
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self, seconds: float = 60) -> BackEnd:
        """Begin, or go on after ``pause`` with what was stored, at the same address."""
        log = Path(f"{self.folder}.log")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "lib")}
        with open(log, "wb") as output:
            self._process = subprocess.Popen(self.command(), stdout=output, stderr=output, env=environment)
        wait_for(f"{self.url}/studies", self._process, seconds, log)
        return self

    def pause(self) -> None:
        """Be away, and keep what is stored."""
        end(self._process)

    def stop(self) -> None:
        end(self._process)
        Path(f"{self.folder}.log").unlink(missing_ok=True)
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    def upload(self, files: Path | Iterable[Path]) -> int:
        return store(self.url, files)


class Orthanc(BackEnd):
    """Debian's Orthanc with its DICOMweb plugin."""

    name = "orthanc"

    def command(self) -> list[str]:
        settings = {
            "Name": "samadapt-tests",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "HttpPort": self.port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {
                "Enable": True,
                "Root": "/dicom-web/",
                "StudiesMetadata": "Full",
                "SeriesMetadata": "Full",
            },
        }
        written = self.folder / "orthanc.json"
        written.write_text(json.dumps(settings))
        return [str(ORTHANC), str(written)]


class Embedded(BackEnd):
    """``python -m samadapt.dicomweb``."""

    name = "embedded"

    def command(self) -> list[str]:
        words = [sys.executable, "-m", "samadapt.dicomweb", str(self.folder)]
        return [*words, "--port", str(self.port), "--parent", str(os.getpid())]

    def start(self, seconds: float = 60) -> BackEnd:
        """As the base class's, until the folder is indexed."""
        super().start(seconds)
        deadline = time.monotonic() + seconds
        while self.status()["indexing"] and time.monotonic() < deadline:
            time.sleep(0.05)
        return self

    def status(self) -> dict[str, Any]:
        return requests.get(f"{self.root}/status", timeout=10).json()


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float, log: Path) -> None:
    """Until ``url`` answers; a process that ends meanwhile fails with what it has logged."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            requests.get(url, timeout=5).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.1)
    end(process)
    raise RuntimeError(f"{url} did not answer:\n{log.read_text(errors='replace')[-4000:]}")


def end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def store(url: str, files: Path | Iterable[Path]) -> int:
    """STOW every DICOM file of a folder (subfolders included), or those given; the number of them."""
    paths = sorted(path for path in files.rglob("*") if path.is_file()) if isinstance(files, Path) else list(files)
    client = DICOMwebClient(url)
    sent = 0
    for start in range(0, len(paths), 50):
        batch = [dcmread(path) for path in paths[start : start + 50] if _is_dicom(path)]
        if batch:
            client.store_instances(batch)
        sent += len(batch)
    return sent


def _is_dicom(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def make(name: str) -> BackEnd:
    """The back end of that name, not started yet; a test is skipped where it is not installed."""
    if name == "orthanc":
        if ORTHANC is None or not PLUGIN.exists():
            pytest.skip("Orthanc with its DICOMweb plugin is not installed (Debian: orthanc, orthanc-dicomweb)")
        return Orthanc()
    if name == "embedded":
        return Embedded()
    raise ValueError(f"no back end {name!r}")


MARKS = {"orthanc": [pytest.mark.requires_pacs]}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, [])) for name in BACK_ENDS])
def pacs(request: pytest.FixtureRequest) -> Iterator[BackEnd]:
    """An empty PACS that runs, one for each back end: ``from pacs import pacs`` in a test module takes it."""
    running = make(request.param).start()
    yield running
    running.stop()


@pytest.fixture
def orthanc() -> Iterator[BackEnd]:
    """An empty Orthanc that runs; tests that take it carry the marker ``requires_pacs``."""
    running = make("orthanc").start()
    yield running
    running.stop()
