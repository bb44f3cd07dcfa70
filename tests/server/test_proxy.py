"""OHIF's way to the PACS, and who may talk to the server at all: a real server before a real PACS."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pydicom import dcmread
from pydicom.uid import generate_uid

from make_dicom import write_stack
from pacs import BACK_ENDS, MARKS, make
from serving import Server

SERIES = generate_uid()


def raw(server, path, method="GET", **headers):
    """Status of a request whose path no client tidies up."""
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", "Content-Length: 0"]
    headers = {"Host": f"127.0.0.1:{server.port}", **headers}
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, [])) for name in BACK_ENDS])
def served(request, tmp_path_factory):
    """A server over a PACS with one series."""
    folder = tmp_path_factory.mktemp("proxy")
    volume = np.random.default_rng(0).integers(-500, 500, (4, 6, 5), dtype=np.int16)
    tags = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": SERIES, "PatientID": "Be"}
    write_stack(folder / "series", volume, [(0, 0, z) for z in range(4)], **tags)
    pacs = make(request.param).start()
    pacs.upload(folder / "series")
    cache = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache")}
    server = Server(pacs.url, log=folder / "log", **cache).start()
    server.pacs, server.files = pacs, sorted((folder / "series").iterdir())
    yield server
    server.stop()
    pacs.stop()


@pytest.mark.e2e
def test_what_ohif_asks_for_comes_through_unchanged(served):
    through = DICOMwebClient(f"{served.url}/proxy/dicom/wado")
    files = {read.SOPInstanceUID: read for read in map(dcmread, served.files)}
    assert {one.SOPInstanceUID for one in through.retrieve_series("1.2.3", SERIES)} == set(files)
    assert len(through.retrieve_series_metadata("1.2.3", SERIES)) == 4
    instance, read = next(iter(files.items()))
    frames = f"studies/1.2.3/series/{SERIES}/instances/{instance}/frames/1"
    asked = {"Accept": 'multipart/related; type="application/octet-stream"; transfer-syntax=*'}
    answer = requests.get(f"{served.url}/proxy/dicom/wado/{frames}", headers=asked, timeout=30)
    direct = requests.get(f"{served.pacs.url}/{frames}", headers=asked, timeout=30)
    assert answer.headers["Content-Type"].split("boundary")[0] == direct.headers["Content-Type"].split("boundary")[0]
    assert read.pixel_array.tobytes() in answer.content


@pytest.mark.e2e
def test_the_query_comes_through(served):
    search = f"{served.url}/proxy/dicom/qido/studies"
    assert len(requests.get(f"{search}?PatientID=B*&limit=5", timeout=30).json()) == 1
    assert requests.get(f"{search}?PatientID=X*", timeout=30).json() == []


def images_of(server):
    return requests.get(f"{server.url}/info/", timeout=30).json()["datastore"]["total"]


@pytest.mark.e2e
def test_instances_are_stored_through_it(served, tmp_path):
    tags = {"StudyInstanceUID": "1.2.9", "SeriesInstanceUID": generate_uid()}
    write_stack(tmp_path / "new", np.zeros((2, 4, 4), np.int16), [(0, 0, 0), (0, 0, 1)], **tags)
    before = images_of(served)
    DICOMwebClient(f"{served.url}/proxy/dicom/stow").store_instances([dcmread(p) for p in (tmp_path / "new").iterdir()])
    assert len(DICOMwebClient(served.pacs.url).search_for_instances("1.2.9")) == 2
    assert images_of(served) == before + 1  # at once, although lists are kept for a while


@pytest.mark.e2e
@pytest.mark.parametrize(
    "path",
    [
        "../system",
        "%2e%2e/system",
        "..%2fsystem",
        "studies/../../system",
        "studies/%2e%2e/%2e%2e/system",
        "studies/..%2f..%2fsystem",
        "studies/%252e%252e/%252e%252e/system",
        "studies/..%5c..%5csystem",
        "system",
        "studies//../../status",
        "studies/1.2.3%00/series",
        "studies/1.2.3%3f/series",
        "",
    ],
)
@pytest.mark.parametrize("op", ["wado/", "qido/", "stow/", ""])
def test_nothing_else_of_the_pacs_is_reached(served, op, path):
    status, body = raw(served, f"/proxy/dicom/{op}{path}")
    assert status in (400, 404), body[:300]
    assert b"Orthanc" not in body
    assert b"left_out" not in body


@pytest.mark.e2e
def test_pages_of_other_origins_may_neither_change_nor_read(served):
    own = {"Origin": served.url}
    foreign = {"Origin": "https://evil.example"}
    for path in ("/activelearning/first", "/train/", "/samadapt/auto_train", "/proxy/dicom/stow/studies"):
        assert raw(served, path, "POST", **foreign)[0] == 403, path
    assert raw(served, "/activelearning/first", "POST", **own)[0] != 403
    read = requests.get(f"{served.url}/info/", headers=foreign, timeout=30)
    assert not [name for name in read.headers if name.lower().startswith("access-control")]
    assert raw(served, "/info/", Host=f"evil.example:{served.port}")[0] == 403
    assert raw(served, "/info/", Host=f"localhost:{served.port}")[0] == 200


@pytest.mark.e2e
def test_the_app_is_not_exchanged_and_the_log_is_read_here_only(served):
    status, body = raw(served, "/reload", "POST")
    assert status == 403
    assert b"Restart" in body
    assert raw(served, "/logs/?lines=2&text=true")[0] in (200, 404)  # 404: this start keeps no log file


@pytest.mark.e2e
def test_images_load_and_progress_shows_while_an_inference_runs(served):
    """The slow part is real: the first inference loads the model's weights, and reads the series."""
    request = {"params": {"image": SERIES}, "data": {"params": '{"foreground": [[2, 3, 1]]}'}, "timeout": 120}
    waits = []
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(requests.post, f"{served.url}/infer/samadapt_click", **request)
        began = time.monotonic()
        while not slow.done():
            asked = time.monotonic()
            assert requests.get(f"{served.url}/info/", timeout=30).ok
            assert requests.get(f"{served.url}/proxy/dicom/qido/studies", timeout=30).ok
            waits.append(time.monotonic() - asked)
        lasted = time.monotonic() - began
    print(f"an inference of {lasted:.2f} s, answers within {max(waits):.2f} s")
    assert slow.result().status_code == 200
    assert len(waits) > 1
    assert max(waits) < 0.7 * lasted


class Slow(BaseHTTPRequestHandler):
    """A PACS without studies that hangs as soon as ``hangs`` is set."""

    hangs = False

    def do_GET(self):
        if self.hangs:
            time.sleep(3)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *arguments):
        pass


@pytest.mark.e2e
def test_a_pacs_that_is_away_or_hangs_is_named(tmp_path):
    hanging = HTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=hanging.serve_forever, daemon=True).start()
    variables = {
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(tmp_path / "cache"),
        "MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT": "0.5",
    }
    address = f"http://127.0.0.1:{hanging.server_port}/dicom-web"
    server = Server(address, ("embed_ahead", "false"), log=tmp_path / "log", **variables).start()
    try:
        Slow.hangs = True
        slow = requests.get(f"{server.url}/proxy/dicom/qido/studies", timeout=30)
        assert slow.status_code == 504
        hanging.shutdown()
        hanging.server_close()
        away = requests.get(f"{server.url}/proxy/dicom/qido/studies", timeout=30)
        assert away.status_code == 502
        for answer in (slow, away):
            assert answer.json()["where"] == address
            assert answer.json()["remedy"]
    finally:
        server.stop()
