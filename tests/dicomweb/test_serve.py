"""``samadapt serve --studies FOLDER_WITH_DICOM``: no PACS, and labels and models stay through restarts."""

from __future__ import annotations

import gzip
import subprocess
import sys

import nibabel
import numpy as np
import psutil
import pytest
import requests
from monailabel.client import MONAILabelClient
from pydicom.uid import generate_uid

from make_dicom import write_stack
from samadapt.dicomweb import child
from serving import ROOT, ServeCommand
from waiting import wait_until

CT, MR = generate_uid(), generate_uid()
PROXY = "proxy/dicom/qido"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CT and an MR series, and what else lies in such folders."""
    made = tmp_path_factory.mktemp("serve") / "studies"
    noise = np.random.default_rng(0).integers(-500, 500, (6, 20, 16), dtype=np.int16)
    places = [(0, 0, 2.0 * z) for z in range(6)]
    for uid, modality in ((CT, "CT"), (MR, "MR")):
        write_stack(made / modality, noise, places, Modality=modality, SeriesInstanceUID=uid, StudyInstanceUID="1.2.3")
    (made / "notes.txt").write_text("no DICOM")
    return made


def children_of(server):
    return [one for one in psutil.Process(server.process.pid).children() if "samadapt.dicomweb" in one.cmdline()]


def images(server):
    return set(requests.get(f"{server.url}/datastore/?output=all", timeout=30).json()["objects"])


def nifti(content):
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)


@pytest.mark.e2e
def test_a_folder_with_dicom_files_is_served_and_labels_survive_a_new_port(folder, tmp_path):
    server = ServeCommand(folder).start()
    try:
        found = requests.get(f"{server.url}/{PROXY}/series?includefield=all", timeout=30).json()
        assert {one["0020000E"]["Value"][0] for one in found} == {CT, MR}
        next_one = MONAILabelClient(server.url).next_sample("first", {})
        assert next_one["id"] in {CT, MR}
        image = requests.get(f"{server.url}/datastore/image", params={"image": CT}, timeout=60)
        grid = nifti(image.content)
        mask = np.zeros(grid.shape, np.uint8)
        mask[2:5, 3:9, 1:4] = 1
        nibabel.save(nibabel.Nifti1Image(mask, grid.affine), tmp_path / "mask.nii.gz")
        MONAILabelClient(server.url).save_label(
            CT, str(tmp_path / "mask.nii.gz"), params={"label_info": [{"name": "cyst", "idx": 1}]}
        )
        (dicomweb,) = children_of(server)
    finally:
        server.stop()
    wait_until(lambda: not dicomweb.is_running())

    models = child.store_folder(folder) / ".samadapt" / "models"
    models.mkdir(parents=True)
    (models / "v0001.safetensors").write_bytes(b"stays")
    again = ServeCommand(folder).start()
    try:
        assert again.port != server.port
        label = requests.get(f"{again.url}/datastore/label", params={"label": CT, "tag": "final"}, timeout=30)
        assert (nifti(label.content).get_fdata() == mask).all()
        assert (child.store_folder(folder) / ".samadapt" / "models" / "v0001.safetensors").exists()
        (dicomweb,) = children_of(again)
    finally:
        again.kill()
    wait_until(lambda: not dicomweb.is_running())


@pytest.mark.e2e
def test_a_dicomweb_server_that_is_killed_is_started_again_at_the_same_address(folder):
    server = ServeCommand(folder).start()
    try:
        address = f"{server.url}/{PROXY}/series"
        for _ in range(2):
            (dicomweb,) = children_of(server)
            before = requests.get(address, timeout=30).json()
            dicomweb.kill()
            wait_until(lambda: requests.get(address, timeout=30).status_code == 200)
            assert requests.get(address, timeout=30).json() == before
        assert server.log.read_text().count("the DICOMweb server has ended (code -9)") == 2
    finally:
        server.stop()


def test_a_dicomweb_server_that_ends_again_and_again_is_left_alone_in_the_end(monkeypatch, caplog):
    monkeypatch.setattr(child, "_BREATH_S", 0.0)
    words = (sys.executable, "-c", "import sys; sys.exit(3)")
    child._keep_alive(child.Child("http://127.0.0.1:1/dicom-web", subprocess.Popen(words).pid, words))
    told = [record for record in caplog.records if "has ended (code 3)" in record.getMessage()]
    assert len(told) == child.TRIES
    assert "left alone" in caplog.records[-1].getMessage()


def test_the_host_s_own_command_refuses_such_a_folder_and_says_what_to_use(folder):
    words = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(ROOT / "apps" / "samadapt")]
    words += ["--studies", str(folder), "--host", "127.0.0.1", "--port", "0"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=folder.parent)
    assert ended.returncode != 0
    assert f"samadapt serve --studies {folder}" in ended.stdout + ended.stderr
