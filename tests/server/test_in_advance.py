"""Series of a real PACS that nobody has opened: some are fetched and examined while nobody waits, and only some."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple

import pytest
from dicomweb_client.api import DICOMwebClient
from pydicom.uid import generate_uid

from pacs import pacs
from phantoms import KINDS, octants, write_phantom
from samadapt.activelearning.registry import strategy
from samadapt.config import AppConfig
from samadapt.data.volume import read_volume
from samadapt.errors import UnavailableError
from samadapt.project import Project
from samadapt.server import ahead, in_advance
from samadapt.server.dicom_datastore import SafeDicomDatastore
from samadapt.server.in_advance import SeriesInAdvance
from samadapt.server.outlook import Outlook
from waiting import wait_until

__all__ = ["pacs"]
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = {"label_info": [{"name": "liver", "idx": 2}, {"name": "spleen", "idx": 5}]}


class Site:
    """Six series in a PACS, one of them with a hole, and the parts of a server that look at them by themselves."""

    def __init__(self, pacs, serving, folder):
        self.serving = serving
        self.uids = [generate_uid() for _ in range(6)]
        self.holed = min(self.uids, key=in_advance._shuffled)
        for number, uid in enumerate(self.uids):
            series = write_phantom(folder / str(number), KINDS["axial"], SeriesInstanceUID=uid)
            if uid == self.holed:
                sorted(series.iterdir())[2].unlink()
            pacs.upload(series)
        self.store = SafeDicomDatastore(DICOMwebClient(pacs.url), {"Modality": "CT"}, str(folder / "cache"))
        self.outlook = Outlook(AppConfig(), Project(self.store.folder), serving, lambda: self.store)
        self.chosen = SeriesInAdvance(self.store, self.outlook.upcoming, self.outlook.refused)
        self.busy = []
        self.ahead = ahead.AheadOfNeed(
            serving,
            self.chosen.images,
            self.chosen.image_path,
            lambda: bool(self.busy),
            self.outlook.wanted,
            self.outlook.look,
            self.outlook.unreadable,
        )

    def here(self):
        return {uid for uid in self.uids if self.store.local_image(uid)}

    def examined(self):
        return {case["id"] for case in self.outlook.worklist()["cases"]}

    def label(self, uid, folder):
        mask = octants(read_volume(self.store.image_path(uid)).geometry.shape)
        (folder / "label.bin").write_bytes(mask.ravel(order="F").tobytes())
        self.store.save_label(uid, str(folder / "label.bin"), "final", dict(NAMES))


@pytest.fixture
def site(pacs, serving, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(ahead, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(in_advance, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(in_advance, "AT_MOST", 2)
    serving.train()
    made = Site(pacs, serving, tmp_path)
    yield made
    made.busy.append("the test is over")


def test_some_series_that_nobody_has_opened_are_fetched_and_examined(site, tmp_path):
    """The worklist and the strategies know of them; what makes no volume is passed over; a label makes room for one."""
    expected = sorted(set(site.uids) - {site.holed}, key=in_advance._shuffled)
    assert site.here() == set()
    site.ahead.start()
    wait_until(lambda: site.examined() == set(expected[:2]))
    assert site.here() == set(expected[:2])
    assert list(site.outlook.refused()) == [site.holed]
    found = site.outlook.propose(strategy("entropy"), "ann")
    assert found["id"] in expected[:2]
    assert "drawn at random" not in found["reason"]
    site.label(found["id"], tmp_path)
    wait_until(lambda: len(site.examined()) == 2)
    assert site.here() == set(expected[:3])


def test_nothing_is_fetched_while_somebody_waits_or_the_disk_is_nearly_full(site, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as nearly_full:
        nearly_full.setattr(shutil, "disk_usage", lambda path: usage(1, 1, in_advance.LEAST_FREE - 1))
        assert site.chosen.images() == []
    time.sleep(2 * in_advance.ASK_SECONDS)
    assert len(site.chosen.images()) == 2
    site.busy.append("a training")
    site.ahead.start()
    time.sleep(0.5)
    assert site.here() == set()
    site.busy.clear()
    wait_until(site.here)


def test_a_pacs_that_is_away_is_asked_again_later(site, monkeypatch):
    fetched = []

    def fetch(image):
        fetched.append(image)
        if len(fetched) == 1:
            raise UnavailableError("away")
        return SeriesInAdvance.image_path(site.chosen, image)

    monkeypatch.setattr(ahead, "COME_AGAIN_SECONDS", 0.5)
    monkeypatch.setattr(site.ahead, "_path_of", fetch)
    site.ahead.start()
    wait_until(lambda: len(site.examined()) == 2)
    assert fetched.count(fetched[0]) >= 2
