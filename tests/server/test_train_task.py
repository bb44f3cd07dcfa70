"""The server's trainer, apart from what a real server shows."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest

from samadapt.config import AppConfig
from samadapt.data.labels import LabelMap
from samadapt.errors import ConfigError, InputError, NotFoundError, StateError
from samadapt.project import Project
from samadapt.server.train import TrainSamAdapt, _print_news


@pytest.fixture
def task(tmp_path):
    labels = SimpleNamespace(current=lambda: LabelMap(("liver",)))
    return TrainSamAdapt("samadapt", AppConfig.from_strings({"blocks": "late"}), Project(tmp_path), labels)


LABELLED = SimpleNamespace(get_labeled_images=lambda: ["one"])


def test_a_request_may_name_a_recipe_for_one_training(task):
    assert task.config()["recipe"][0] == AppConfig().recipe
    config = task.check({"recipe": "samed", "max_steps": "7", "model": "samadapt"}, LABELLED)
    assert (config.recipe, config.max_steps, config.blocks) == ("samed", 7, "late")
    assert task.check({}, LABELLED).recipe == AppConfig().recipe


def test_viewers_are_offered_the_recipes_that_the_server_s_settings_fit(tmp_path):
    labels = SimpleNamespace(current=lambda: LabelMap(("liver",)))
    task = TrainSamAdapt("samadapt", AppConfig.from_strings({"recipe": "s_sam"}), Project(tmp_path), labels)
    offered = task.config()["recipe"]
    assert offered[0] == "s_sam"
    assert {"lora_late", "samed", "sam_lst", "autosam_cnn", "cheap_lunch", "unet", "peft/dora"} < set(offered)
    assert "ft/lite_medsam/decoder/lora" in offered
    assert "ft/mobile_sam/decoder/lora" not in offered
    for recipe in offered:
        assert task.check({"recipe": recipe}, LABELLED).recipe == recipe
    assert task.check({"recipe": offered}, LABELLED).recipe == "s_sam"  # the whole choice: its first
    assert list(task.info()["recipes"]) == offered


def test_a_recipe_that_does_not_fit_the_server_s_blocks_is_not_offered(task):
    assert "autosam_cnn" not in task.config()["recipe"]
    assert "samed" in task.config()["recipe"]


@pytest.mark.parametrize(("recipe", "part"), [("autosam_cnn", "blocks"), ("ft/mobile_sam/decoder/lora", "backbone")])
def test_a_recipe_that_the_server_s_settings_do_not_fit_is_refused(task, recipe, part):
    with pytest.raises(ConfigError, match=part):
        task.check({"recipe": recipe}, LABELLED)


def test_blocks_that_the_encoder_does_not_have_are_refused_before_the_training(tmp_path):
    labels = SimpleNamespace(current=lambda: LabelMap(("liver",)))
    task = TrainSamAdapt("samadapt", AppConfig.from_strings({"blocks": "99"}), Project(tmp_path), labels)
    with pytest.raises(ConfigError, match="blocks"):
        task.check({}, LABELLED)


def test_settings_in_an_object_of_the_trainer_s_name_are_not_passed_over(task):
    with pytest.raises(ConfigError, match="samadapt"):
        task.check({"samadapt": {"recipe": "s_sam"}}, LABELLED)


def test_the_host_hands_the_trainer_s_own_object_on_beside_what_is_in_it(task):
    request = {"model": "samadapt", "samadapt": {"max_steps": 5}, "max_steps": 5}  # of POST /train/
    with pytest.raises(StateError, match="no image is labelled"):
        task(request, SimpleNamespace(get_labeled_images=lambda: []))


def test_a_viewer_may_put_a_version_in_service_in_place_of_a_training(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("samadapt.versions._require_loadable", lambda version, config: None)
    project = Project(tmp_path)
    project.models.mkdir(parents=True)
    for name in ("v0001", "v0002"):
        (project.models / f"{name}.safetensors").write_bytes(b"")
    project.publish(project.models / "v0002.safetensors")
    assert task.config()["promote"] == ["none", "v0002", "v0001"]
    nothing_labelled = SimpleNamespace(get_labeled_images=list)
    done = task({"model": "samadapt", "promote": "v0001"}, nothing_labelled)
    assert done["in_service"]
    assert task.stats()["in_service"] == "v0001"
    assert "v0001 is in service now, instead of v0002" in capsys.readouterr().out
    with pytest.raises(StateError, match="set promote to none"):  # the option is still set in the viewer
        task.check({"promote": "v0001"}, LABELLED)
    with pytest.raises(NotFoundError, match=r"v0001, v0002"):
        task.check({"promote": "v0003"}, LABELLED)
    with pytest.raises(InputError, match="no version"):
        task.check({"promote": "../v0002"}, LABELLED)
    assert task.check({"promote": ["none", "v0002", "v0001"]}, LABELLED).max_steps  # the whole choice: to train


def test_why_a_candidate_was_refused_is_shown(task, tmp_path):
    reason = "not published, it is worse: held-out Dice 0.200, v0001 has 0.500"
    Project(tmp_path).write_status(state="done", message=reason, refused=reason, started=1.0, seconds=2.0)
    assert task.stats()["message"] == task.stats()["refused"] == reason


def test_a_training_has_ended_when_the_next_one_can_start(task, tmp_path, monkeypatch):
    """Its last record is there before its process is gone; who trains again at once would be refused."""
    Project(tmp_path).write_status(state="done", message="published", started=time.time(), epoch=20, total_epochs=20)
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - 60))
    host = [{"status": "RUNNING", "start_ts": started}]
    monkeypatch.setattr("samadapt.server.train.tasks", lambda kind: host)
    assert task.stats()["state"] == "running"
    assert "total_time" not in task.stats()
    host[0]["status"] = "DONE"
    assert task.stats()["state"] == "done"
    assert "total_time" in task.stats()


def test_progress_can_be_sent_when_a_structure_could_not_be_measured(task, tmp_path):
    """A reply with NaN is a 500 of ``GET /info/``, and no viewer could connect any more."""
    nan = float("nan")
    Project(tmp_path).write_status(
        state="done", message="done", started=1.0, seconds=2.0, loss=nan, best_metric=nan, dice={"liver": 0.5, "x": nan}
    )
    stats = task.stats()
    json.dumps(stats, allow_nan=False)
    assert stats["eval"]["metrics"] == {"liver": 0.5, "x": None}


def test_a_training_ends_when_its_server_is_gone(monkeypatch, capsys):
    report = _print_news()
    record = {"message": "training", "loss": 0.5, "seconds": 3}
    report(record)
    report(record)
    assert capsys.readouterr().out.count("training, loss 0.500") == 1
    monkeypatch.setattr(os, "getppid", lambda: -1)
    with pytest.raises(SystemExit, match="server is gone"):
        report(record)
