"""The server's trainer, apart from what a real server shows."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from samadapt.config import AppConfig
from samadapt.data.labels import LabelMap
from samadapt.errors import ConfigError
from samadapt.project import Project
from samadapt.server.train import TrainSamAdapt, _print_news


@pytest.fixture
def task(tmp_path):
    labels = SimpleNamespace(current=lambda: LabelMap(("liver",)))
    return TrainSamAdapt("samadapt", AppConfig.from_strings({"blocks": "late"}), Project(tmp_path), labels)


LABELLED = SimpleNamespace(get_labeled_images=lambda: ["one"])


def test_a_request_may_name_a_recipe_for_one_training(task):
    assert task.config()["recipe"] == AppConfig().recipe
    config = task.check({"recipe": "samed", "max_steps": "7", "model": "samadapt"}, LABELLED)
    assert (config.recipe, config.max_steps, config.blocks) == ("samed", 7, "late")
    assert task.check({}, LABELLED).recipe == AppConfig().recipe


@pytest.mark.parametrize(("recipe", "part"), [("autosam_cnn", "blocks"), ("ft/mobile_sam/decoder/lora", "backbone")])
def test_a_recipe_that_the_server_s_settings_do_not_fit_is_refused(task, recipe, part):
    with pytest.raises(ConfigError, match=part):
        task.check({"recipe": recipe}, LABELLED)


def test_a_training_ends_when_its_server_is_gone(monkeypatch, capsys):
    report = _print_news()
    record = {"message": "training", "loss": 0.5, "seconds": 3}
    report(record)
    report(record)
    assert capsys.readouterr().out.count("training, loss 0.500") == 1
    monkeypatch.setattr(os, "getppid", lambda: -1)
    with pytest.raises(SystemExit, match="server is gone"):
        report(record)
