"""What the tests of this folder share: one running server, and tiny models without one."""

from types import SimpleNamespace

import pytest
import requests

from samadapt import recipes
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import read_volume
from samadapt.server.models import PLAIN
from serving import Server, make_volumes
from tiny import BACKBONES

LABELS = ("bright", "dark")


class TinyModels:
    """``Models`` with a tiny backbone; ``train`` publishes a model that has learned nothing much."""

    def __init__(self, folder):
        self.cache = SliceCache(folder / "cache", gib=1)
        self._plain = SimpleNamespace(
            model=recipes.build(recipes.PLAIN, LABELS, BACKBONES["per_head"]()), version=PLAIN
        )
        self._current = self._plain
        self.volume = read_volume
        self.before = []

    def train(self, name="v0001"):
        model = recipes.build("autosam_linear", LABELS, BACKBONES["per_head"]()).eval()
        model.describe(trained=True)
        self._current = SimpleNamespace(model=model, version=name)

    def trained(self):
        return self._current is not self._plain

    def version(self):
        return self._current.version

    def current(self):
        return self._current

    prompted = current

    def plain(self):
        return self._plain

    def earlier(self, count):
        return self.before[-count:]


@pytest.fixture
def serving(tmp_path):
    """``Models`` with a tiny backbone."""
    return TinyModels(tmp_path)


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
