"""Encoding ahead: the next sample first, never in anybody's way, anew for a new model, and back after a failure."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from samadapt import recipes
from samadapt.data.slice_cache import SliceCache
from samadapt.data.view import ModelView
from samadapt.data.volume import read_volume
from samadapt.encoding import SliceEncoder
from samadapt.errors import InputError
from samadapt.server import ahead
from tiny import BACKBONES, write_phantom
from waiting import wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


class Serving:
    """``Models`` with a tiny backbone and a version that a test may change."""

    def __init__(self, cache):
        self.cache = cache
        self.name = "plain"
        self.model = recipes.build("lora_late", ("a",), BACKBONES["per_head"]())

    def version(self):
        return self.name

    def current(self):
        return SimpleNamespace(model=self.model, version=self.name)

    prompted = current


@pytest.fixture
def serving(tmp_path):
    return Serving(SliceCache(tmp_path / "cache", gib=1))


@pytest.fixture
def images(tmp_path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("one", "two", "three")}
    for seed, path in enumerate(paths.values()):
        write_phantom(path, seed)
    return paths


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ahead, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(ahead, "LOOK_SECONDS", 0.02)


@pytest.fixture
def training():
    return []


class Told:
    """What the thread has told others."""

    def __init__(self):
        self.looked = []
        self.failed = {}
        self.wanted = 0
        self.look = self.looked.append


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def working(serving, images, training, told):
    return ahead.AheadOfNeed(
        serving,
        lambda: list(images),
        lambda name: str(images[name]),
        lambda: bool(training),
        lambda: (serving.name, told.wanted),
        lambda image, wait: told.look(image),
        told.failed.__setitem__,
    )


def encoded(serving, path) -> int:
    info = serving.model.info
    view = ModelView(read_volume(path), info.window, info.context, info.image_size)
    return sum(SliceEncoder(serving.model, serving.cache).has(view, index) for index in range(len(view)))


def test_every_image_is_encoded_and_looked_at_and_progress_says_so(working, serving, images, told):
    assert working.progress()["images_done"] == 0
    working.start()
    wait_until(lambda: working.progress()["images_done"] == 3)
    assert all(encoded(serving, path) == 6 for path in images.values())
    assert told.looked == ["one", "two", "three"]
    assert told.failed == {}
    assert working.progress() == {
        "images_done": 3,
        "images": 3,
        "image": None,
        "slices_done": 0,
        "slices": 0,
        "cache_full": False,
    }


def test_what_is_on_somebody_s_screen_comes_first(working, serving, images):
    order = []
    working._embed = lambda image, volume: order.append(image)
    working.first("two")
    working.first("three")
    working.start()
    wait_until(lambda: len(order) == 3)
    assert order == ["three", "two", "one"]


def test_it_gives_way_to_requests_and_trainings(working, serving, images, training):
    with working.giving_way():
        working.start()
        time.sleep(0.3)
        assert not any(encoded(serving, path) for path in images.values())
        training.append("one that runs")
    time.sleep(0.3)
    assert not any(encoded(serving, path) for path in images.values())
    training.clear()
    wait_until(lambda: working.progress()["images_done"] == 3)


def test_an_image_that_cannot_be_read_does_not_stop_the_others(working, serving, images, caplog, told):
    images["one"].write_bytes(b"no gzip")
    working.start()
    wait_until(lambda: encoded(serving, images["three"]) == 6)
    assert "one is not encoded ahead" in caplog.text
    assert list(told.failed) == ["one"]


@pytest.mark.parametrize("at_fault", ["model", "label"])
def test_an_image_is_not_to_blame_for_a_damaged_model_or_label(working, monkeypatch, caplog, told, at_fault):
    def damaged(*args):
        raise InputError("damaged", where=at_fault)

    monkeypatch.setattr(working, *(("_embed", damaged) if at_fault == "model" else ("_look", damaged)))
    working.start()
    wait_until(lambda: working.progress()["images_done"] == 3)
    assert "three is not encoded ahead" in caplog.text
    assert told.failed == {}


def test_an_image_with_a_new_label_is_looked_at_again(working, told):
    working.start()
    wait_until(lambda: len(told.looked) == 3)
    working.again("two")
    wait_until(lambda: told.looked[3:] == ["two"])


def test_a_new_version_is_encoded_anew(working, serving, images):
    working.start()
    wait_until(lambda: working.progress()["images_done"] == 3)
    serving.name = "v0001"
    assert working.progress()["images_done"] == 0
    wait_until(lambda: working.progress()["images_done"] == 3)


@pytest.mark.parametrize("change", ["publish", "label", "need"])
def test_what_changes_during_a_look_is_looked_at_once_more(working, serving, told, change):
    def look(image):
        told.looked.append((image, serving.name))
        if told.looked == [("one", "plain")]:
            if change == "publish":
                serving.name = "v0001"
            elif change == "need":
                told.wanted += 1
            else:
                working.again("one")

    told.look = look
    working.start()
    wait_until(lambda: working.progress()["images_done"] == 3)
    assert len(told.looked) == 4
    assert told.looked.count(("one", serving.name)) >= 1
    assert [image for image, _ in told.looked].count("one") == 2


def test_a_new_need_has_all_images_looked_at_anew(working, told):
    working.start()
    wait_until(lambda: len(told.looked) == 3)
    told.wanted += 1
    wait_until(lambda: told.looked[3:] == ["one", "two", "three"])


def test_a_full_cache_is_not_turned_over_but_images_are_looked_at(working, serving, images, monkeypatch, told):
    monkeypatch.setattr(serving.cache, "filled", lambda: 0.95)
    working.first("two")
    working.start()
    wait_until(lambda: working.progress()["images_done"] == 3)
    assert [encoded(serving, path) for path in images.values()] == [0, 6, 0]  # the one on somebody's screen
    assert sorted(told.looked) == ["one", "three", "two"]
    assert working.progress()["cache_full"]


def test_a_full_cache_forgets_the_versions_before(working, serving, images, monkeypatch):
    working.start()
    wait_until(lambda: working.progress()["images_done"] == 3)
    before, old = serving.cache.bytes_used(), serving.model
    monkeypatch.setattr(serving.cache, "filled", lambda: serving.cache.bytes_used() / before)
    serving.model = recipes.build("lora_late", ("a",), BACKBONES["per_head"]())
    for parameter in serving.model.trainable().values():
        parameter.data += 0.1
    serving.name = "v0002"
    wait_until(lambda: working.progress()["images_done"] == 3)
    assert encoded(serving, images["one"]) == 6
    serving.model = old
    assert not any(encoded(serving, path) for path in images.values())
