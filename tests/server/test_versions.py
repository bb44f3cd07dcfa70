"""The versions over HTTP, without a whole server: the endpoints, and the answers to what is wrong."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from samadapt import versions as versions_module
from samadapt.config import AppConfig
from samadapt.errors import SamAdaptError
from samadapt.project import Project
from samadapt.server import versions as endpoints
from samadapt.server.guards import _answer
from samadapt.versions import Versions


@pytest.fixture
def project(tmp_path, monkeypatch):
    """v0001 and v0002 published, v0003 refused; the files are damaged, but nobody loads them here."""
    monkeypatch.setattr(versions_module, "_require_loadable", lambda version, config: None)
    project = Project(tmp_path)
    project.models.mkdir(parents=True)
    for number in (1, 2, 3):
        (project.models / f"v000{number}.safetensors").write_bytes(b"")
    own = Versions(project)
    own.publish(project.models / "v0001.safetensors", "published: the first model", "one", None)
    own.publish(project.models / "v0002.safetensors", "published: better", "two", "v0001")
    own.refuse(project.models / "v0003.safetensors", "not published, it is worse", "three")
    return project


@pytest.fixture
def client(project):
    server = FastAPI()
    server.add_exception_handler(SamAdaptError, _answer)
    endpoints.install(server, project, AppConfig())
    return TestClient(server)


def test_rollback_and_promote(client, project):
    assert client.post("/samadapt/models/rollback").json()["version"] == "v0001"
    assert project.published().stem == "v0001"
    assert client.post("/samadapt/models/v0003/promote").json()["in_service"]
    listed = client.get("/samadapt/models").json()["versions"]
    assert [(item["version"], item["in_service"]) for item in listed] == [
        ("v0001", False),
        ("v0002", False),
        ("v0003", True),
    ]
    events = client.get("/samadapt/models/v0003").json()["events"]
    assert [(event["event"], event["reason"]) for event in events] == [
        ("refused", "not published, it is worse"),
        ("promoted", "instead of v0001"),
    ]
    assert events[-1]["by"] == "testclient, over HTTP"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "v0009", 404),
        ("POST", "v0009/promote", 404),
        ("POST", "v0002/promote", 409),
        ("GET", "latest", 400),
        ("POST", "latest/promote", 400),
        ("GET", "v0001.safetensors", 400),
        ("POST", "v0001%00/promote", 400),
    ],
)
def test_what_is_wrong_is_answered_with_a_remedy(client, project, method, path, status):
    reply = client.request(method, f"/samadapt/models/{path}")
    assert reply.status_code == status
    assert {"error", "what", "where", "remedy"} == set(reply.json())
    assert reply.json()["remedy"]
    assert project.published().stem == "v0002"


@pytest.mark.parametrize("path", ["..%2F..%2Fpublished.json", "%2e%2e%2fv0001", "v0001%2F..%2Fv0002/promote"])
def test_no_path_reaches_a_file(client, path):
    assert client.get(f"/samadapt/models/{path}").status_code in (400, 404, 405)


def test_nothing_to_go_back_to_is_a_conflict(client):
    client.post("/samadapt/models/rollback")
    reply = client.post("/samadapt/models/rollback")
    assert reply.status_code == 409
    assert "v0003" in reply.json()["remedy"]
