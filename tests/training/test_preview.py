"""The quick model before the long training: the head alone, published if better, never in the way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.window import Window
from samadapt.model import read_info
from samadapt.project import Project
from samadapt.training import preview, train
from samadapt.training.gate import measure_cases
from samadapt.training.slices import prepare
from tiny import BACKBONES, SIZE, write_studies

LABELS = LabelMap(("bright", "dark"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def studies(tmp_path):
    write_studies(tmp_path / "studies", 5)
    return tmp_path / "studies"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 30)


@pytest.fixture
def config(tiny_backbone):
    return AppConfig.from_strings({"max_steps": "40", "max_train_minutes": "5", "image_size": str(SIZE)})


@pytest.mark.parametrize("layout", BACKBONES)
def test_the_head_learns_and_each_slice_is_encoded_once(studies, tmp_path, layout, monkeypatch):
    model = recipes.build("lora_late", LABELS, BACKBONES[layout]())
    cases = [case for case in find_cases(studies) if case.label]
    prepared = prepare(cases, LABELS, Window("percentile", 0.5, 99.5), 1, SIZE, tmp_path / "slices")
    encoded, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda images: encoded.append(len(images)) or embed(images))
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    cache = SliceCache(tmp_path / "cache", gib=1)
    monkeypatch.setattr(preview, "SECONDS", 600.0)  # on a busy machine the steps do not fit into ten
    for _ in range(2):
        done = preview.refit_head(model, prepared[:4], prepared[4:], tmp_path / "state", cache, lambda progress: None)
    assert done.step == 30
    assert 0 < sum(encoded) <= sum(map(len, prepared))
    changed = {name for name, p in model.trainable().items() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)
    assert all(p.requires_grad for p in model.trainable().values())
    assert list((tmp_path / "state").iterdir()) == []


def test_it_is_published_first_and_gives_way_to_the_better_one(studies, config, monkeypatch):
    monkeypatch.setattr("samadapt.training.run.NOT_FOUND", 0.0)  # so few steps find little
    project, serving = Project(studies), {}

    def watch(record):
        serving.setdefault(record["message"].split(":")[0], project.published())

    result = train(find_cases(studies), LABELS, config, project, watch)
    first = serving["training"]
    assert first is not None
    assert first.stem == "v0001"
    assert not read_info(first).answers_prompts
    assert all(not tensor.any() for name, tensor in load_file(first).items() if "lora_B" in name)
    assert result.model.stem == "v0002"
    assert project.published() in (first, result.model)
    assert "v0001 has" in result.reason


class Killed(BaseException):
    pass


def test_a_training_goes_on_although_its_preview_is_in_service(studies, config, monkeypatch):
    monkeypatch.setattr("samadapt.training.run.NOT_FOUND", 0.0)
    cases, project, said = find_cases(studies), Project(studies), []

    def cut_short(record):
        if record["epoch"] >= 3:
            raise Killed

    with pytest.raises(Killed):
        train(cases, LABELS, config, project, cut_short)
    assert project.published().stem == "v0001"
    result = train(cases, LABELS, config, project, lambda record: said.append(record["message"]))
    assert any("went on from step" in message for message in said)
    assert read_info(result.model).training["parent"] is None
    assert result.model.stem == "v0002"


def test_what_cannot_be_compared_is_not_replaced_by_a_preview(studies, config):
    cases = find_cases(studies)[:2]
    first = train(cases, LABELS, config, Project(studies))
    assert first.model.stem == "v0002"
    second = train(cases, LABELS, config, Project(studies))
    assert second.model.stem == "v0003"


def test_one_that_finds_nothing_is_not_published(studies, config, monkeypatch):
    measured, serving = [], {}

    def nothing_at_first(model, *rest):
        measured.append(measure_cases(model, *rest))
        first = {case: dict.fromkeys(scores, 0.0) for case, scores in measured[-1][0].items()}
        return measured[-1] if len(measured) > 1 else (first, {})

    monkeypatch.setattr("samadapt.training.run.measure_cases", nothing_at_first)
    project = Project(studies)

    def watch(record):
        serving.setdefault(record["message"].split(":")[0], project.published())

    result = train(find_cases(studies), LABELS, config, project, watch)
    assert "preview finds nothing yet, so it is not published" in serving
    assert serving["training"] is None
    assert result.model.stem == "v0001"


def test_short_trainings_have_none(studies, config):
    short = dataclasses.replace(config, max_train_minutes=0.5)
    assert train(find_cases(studies), LABELS, short, Project(studies)).model.stem == "v0001"
