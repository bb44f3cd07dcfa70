"""A real server in a subprocess, on a free loopback port, and small volumes and labels for it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import requests

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "hippocampus_mr"


class Server:
    """``monailabel start_server --app apps/samadapt`` as a person starts it."""

    def __init__(self, studies, *conf, log=None, **variables):
        """``studies``: a folder, or a DICOMweb store's address; then ``log`` says where the log goes."""
        self.variables = variables
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.studies = Path(studies)
        self.folder = (log or self.studies).parent
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / f"server-{self.port}.log"
        self.words = [sys.executable, "-m", "monailabel.main", "start_server"]
        self.words += ["--app", str(ROOT / "apps" / "samadapt"), "--studies", str(studies)]
        self.words += ["--host", "127.0.0.1", "--port", str(self.port)]
        for key, value in conf:
            self.words += ["--conf", key, value]
        self.process = None
        self.environment = {}

    def start(self, seconds=120):
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT / "lib"), **self.variables}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log, env=environment, cwd=self.folder)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                requests.get(f"{self.url}/info/", timeout=10).raise_for_status()
                return self
            except requests.RequestException:
                time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self):
        self.process.terminate()
        self.process.wait(30)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def infer(self, model, image, params, **request):
        """The raw reply, for status codes that the client turns into exceptions."""
        body = params if isinstance(params, str) else json.dumps(params)
        return requests.post(f"{self.url}/infer/{model}", params={"image": image}, data={"params": body}, **request)


class ServeCommand(Server):
    """The same by ``samadapt serve``."""

    def __init__(self, studies, *conf, **variables):
        super().__init__(studies, *conf, **variables)
        self.words = [sys.executable, "-m", "samadapt", "serve", "--studies", str(studies), "--port", str(self.port)]
        for key, value in conf:
            self.words += ["--conf", f"{key}={value}"]


class PacsServer(Server):
    """The same over a DICOMweb server; what it keeps lies in ``folder``."""

    def __init__(self, url, folder, *conf):
        super().__init__(folder / "studies", *conf)
        self.studies.mkdir(parents=True)
        self.words[self.words.index("--studies") + 1] = url
        self.environment = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache")}


def make_volumes(folder, count, *, labels=False):
    """Small volumes with an oblique grid: from hippocampus_mr where that is at hand, else made here."""
    folder.mkdir(parents=True, exist_ok=True)
    if DATA.is_dir():
        for image in sorted((DATA / "images").glob("*.nii.gz"))[:count]:
            shutil.copyfile(image, folder / image.name)
        return folder
    generator = np.random.default_rng(0)
    affine = np.array([[0.8, 0.1, 0, -20], [-0.1, 0.8, 0, 5], [0, 0, 1.5, 7], [0, 0, 0, 1]])
    for case in range(count):
        image = nibabel.Nifti1Image(generator.normal(100, 20, (34 + case, 40, 24)).astype(np.float32), affine)
        nibabel.save(image, folder / f"case_{case:03}.nii.gz")
    return folder


def label_file(path, image_path, boxes):
    """A label on the grid of ``image_path`` with one block of voxels for each ``value: (low, high)``."""
    image = nibabel.load(image_path)
    mask = np.zeros(image.shape[:3], np.uint8)
    for value, (low, high) in boxes.items():
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value
    nibabel.save(nibabel.Nifti1Image(mask, image.affine), path)
    return path
