"""One running server for all tests of this folder."""

import pytest
import requests

from serving import Server, make_volumes


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all tests of this folder. It starts without any label."""
    folder = tmp_path_factory.mktemp("server")
    running = Server(make_volumes(folder / "studies", 6)).start()
    yield running
    running.stop()


@pytest.fixture
def images(server):
    """Ids of the server's images, sorted."""
    return sorted(requests.get(f"{server.url}/datastore/?output=all", timeout=30).json()["objects"])
