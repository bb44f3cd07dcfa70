"""OHIF's page carries the add-on on every route of the viewer; the host's own file stays as it is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import monailabel.endpoints.ohif as host
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from samadapt.server import ohif

APP = Path(__file__).resolve().parents[2] / "apps" / "samadapt"
BUNDLE = Path(host.__file__).parent / "static" / "ohif"
ADD_ON = sorted((APP / "ohif").glob("*.js"))


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(host, "get_ohif", host.get_ohif)  # put back afterwards
    server = FastAPI()
    server.include_router(host.router)
    ohif.install(server, APP)
    return TestClient(server)


@pytest.mark.parametrize("route", ["", "index.html", "monai-label?StudyInstanceUIDs=1.2", "viewer"])
def test_every_route_of_the_viewer_loads_the_add_on(client, route):
    before = (BUNDLE / "index.html").read_bytes()
    reply = client.get(f"/ohif/{route}")
    (script,) = re.findall(r'<script type="module" src="(/samadapt/ohif/[^"]+)"></script></head>', reply.text)
    assert reply.headers["content-type"].startswith("text/html")
    assert "javascript" in client.get(script).headers["content-type"]
    assert (BUNDLE / "index.html").read_bytes() == before


def test_other_files_of_the_viewer_are_served_as_they_are(client):
    assert client.get("/ohif/app-config.js").content == (BUNDLE / "app-config.js").read_bytes()


def test_nothing_outside_the_add_on_is_served(client):
    assert client.get("/samadapt/ohif/panel.css").status_code == 200
    for path in ("..%2fmain.py", "%2e%2e/main.py", "../main.py", "missing.js"):
        assert client.get(f"/samadapt/ohif/{path}").status_code == 404


def test_browsers_ask_whether_files_have_changed(client):
    for path in ("/ohif/", "/samadapt/ohif/main.js"):
        assert client.get(path).headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("file", ADD_ON, ids=lambda file: file.name)
def test_the_add_on_never_makes_markup_of_text(file):
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", file.read_text())


@pytest.mark.parametrize("file", ADD_ON, ids=lambda file: file.name)
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_add_on_is_valid(file):
    subprocess.run(["node", "--check", file], check=True)
