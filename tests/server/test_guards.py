"""The guards around the host's endpoints, where a real server shows the fault only now and then."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
from fastapi import HTTPException
from monailabel.utils.async_tasks import utils

from samadapt.errors import InputError
from samadapt.server import guards


class SlowToDie(subprocess.Popen):
    """A process that ends half a second after its kill, as one does that has gigabytes to give back."""

    def kill(self):
        threading.Timer(0.5, super().kill).start()


@pytest.fixture
def training(monkeypatch):
    """A process that the host takes for a running training."""
    process = SlowToDie([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setitem(utils.background_tasks, "train", [{"id": "one", "status": "RUNNING"}])
    monkeypatch.setitem(utils.background_processes, "train", {"one": process})
    yield process
    subprocess.Popen.kill(process)
    process.wait()


@pytest.fixture
def stopping():
    """An app that notes that somebody has stopped a training."""
    noted = []
    return SimpleNamespace(auto_train=SimpleNamespace(stopped_by_hand=lambda: noted.append(True)), noted=noted)


def test_a_stopped_training_is_over_when_the_answer_comes(training, stopping):
    answer = guards._stop(lambda: utils.stop_background_task("train"), stopping)()
    assert answer["status"] == "STOPPED"
    assert not psutil.pid_exists(training.pid)
    assert stopping.noted == [True]


def test_a_training_that_does_not_end_is_not_waited_for_for_ever(training, stopping, monkeypatch, caplog):
    monkeypatch.setattr(guards, "LONGEST_DEATH_S", 0.05)
    assert guards._stop(lambda: utils.stop_background_task("train"), stopping)()["status"] == "STOPPED"
    assert "has not ended" in caplog.text


def test_a_second_training_is_refused_before_the_first_has_its_process(monkeypatch):
    monkeypatch.setitem(utils.background_tasks, "train", [{"id": "one", "status": "SUBMITTED"}])
    monkeypatch.setitem(utils.background_processes, "train", {})
    trainer = SimpleNamespace(check=lambda params, datastore: None, name="samadapt")
    app = SimpleNamespace(_trainers={"samadapt": trainer}, datastore=lambda: None)
    started = []
    run = guards._train_one(lambda *arguments: started.append(arguments), app)
    with pytest.raises(HTTPException, match="429"):
        run("samadapt", {})
    utils.background_tasks["train"][0]["status"] = "DONE"
    run("samadapt", {})
    assert len(started) == 1


@pytest.mark.parametrize("client", [5, True, 0, ["ann"], {"name": "ann"}])
def test_who_asks_for_a_case_gives_a_name_or_none(client):
    app = SimpleNamespace(_strategies={"first": None})
    with pytest.raises(InputError, match="client_id"):
        guards._sample(lambda *args: pytest.fail("asked on"), app)("first", {"client_id": client})


def train_all(params):
    trainer = SimpleNamespace(check=lambda params, datastore: None, name="samadapt")
    app = SimpleNamespace(_trainers={"samadapt": trainer}, datastore=lambda: None)
    return guards._train_all(lambda params, run_sync: params, app)(params)


@pytest.mark.parametrize("params", [{"samadap": {"recipe": "s_sam"}}, {"max_step": 5}, {"recipe": "s_sam"}])
def test_what_belongs_to_no_trainer_is_refused_when_all_are_asked_to_train(params):
    with pytest.raises(InputError, match=next(iter(params))) as refused:
        train_all(params)
    assert "/train/samadapt" in str(refused.value)


@pytest.mark.parametrize("params", [None, {}, {"client_id": "me"}, {"samadapt": {"max_steps": 5}, "client_id": "me"}])
def test_what_viewers_send_to_train_all_is_taken(params):
    assert train_all(params) == params
