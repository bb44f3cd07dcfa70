"""Versions: what is in service, the way back, and a history that no kill can spoil."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samadapt import recipes, versions
from samadapt.config import AppConfig
from samadapt.data.labels import LabelMap
from samadapt.data.volume import read_volume
from samadapt.errors import InputError, NotFoundError, StateError
from samadapt.inference.auto import segment
from samadapt.project import Project
from samadapt.server.models import Models
from samadapt.versions import Versions
from tiny import BACKBONES, write_phantom

pytestmark = pytest.mark.usefixtures("tiny_backbone")

CONFIG = AppConfig()


def make_model(project: Project, seed: int):
    """A model file that answers differently from those of other seeds."""
    backbone = BACKBONES["per_head"]()
    backbone.weights_sha256 = "0" * 64
    model = recipes.build("lora_late", LabelMap(("bright", "dark")), backbone)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.3 * torch.randn_like(parameter)
    model.describe(trained=True, training={"cases": ["a"], "verdict": {}})
    path = project.next_model()
    model.save(path)
    return path


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "studies")


@pytest.fixture
def trained(project):
    """Three published versions, v0001 to v0003, and v0004 refused."""
    own = Versions(project)
    before = None
    for number in range(3):
        model = make_model(project, number)
        assert own.publish(model, "published: better", f"training {number}", before)
        before = model.stem
    own.refuse(make_model(project, 9), "not published, it is worse", "training 9")
    return own


def in_service(own):
    return [version.name for version in own.all() if version.in_service]


def test_a_list_says_what_became_of_each(trained):
    assert [version.verdict for version in trained.all()] == ["published"] * 3 + ["refused"]
    assert in_service(trained) == ["v0003"]
    assert trained.get("v0004").reason == "not published, it is worse"


def test_rolling_back_goes_back_one_by_one_and_not_to_what_was_refused(trained):
    assert trained.rollback("me", CONFIG).name == "v0002"
    assert trained.rollback("me", CONFIG).name == "v0001"
    with pytest.raises(StateError, match=r"no version was in service before.*v0004"):
        trained.rollback("me", CONFIG)
    assert in_service(trained) == ["v0001"]
    assert [event["event"] for event in trained.events()][-2:] == ["rolled back", "rolled back"]


def spoil(project, name):
    (project.models / f"{name}.safetensors").write_bytes(b"damaged")


def test_rolling_back_passes_over_what_is_damaged_and_says_so(trained, project):
    spoil(project, "v0002")
    assert trained.rollback("me", CONFIG).name == "v0001"
    assert trained.events()[-1]["reason"] == "instead of v0003; passed over, as damaged: v0002"


def test_where_everything_before_is_damaged_nothing_changes(trained, project):
    for name in ("v0001", "v0002"):
        spoil(project, name)
    with pytest.raises(StateError, match="damaged: v0002, v0001"):
        trained.rollback("me", CONFIG)
    assert in_service(trained) == ["v0003"]


def test_a_promoted_version_can_be_rolled_back(trained):
    assert trained.promote("v0004", "me", CONFIG).in_service
    assert trained.rollback("me", CONFIG).name == "v0003"
    assert trained.get("v0004").verdict == "refused"


def test_the_preview_of_a_training_is_no_version_to_go_back_to(project):
    own = Versions(project)
    first, preview, result = (make_model(project, n) for n in range(3))
    own.publish(first, "", "one", None)
    own.publish(preview, "", "two", "v0001")
    assert own.previous().name == "v0001"
    own.publish(result, "", "two", "v0002")
    assert own.previous().name == "v0001"


def test_a_rollback_restores_byte_identical_predictions_without_a_restart(project, tmp_path):
    write_phantom(tmp_path / "image.nii.gz", seed=1)
    volume = read_volume(tmp_path / "image.nii.gz")
    own, served = Versions(project), Models(CONFIG, project)

    def predict() -> bytes:
        return segment(served.current().model, volume, cache=served.cache).tobytes()

    own.publish(make_model(project, 0), "", "one", None)
    before = predict()
    assert np.frombuffer(before, np.uint8).any()
    own.publish(make_model(project, 1), "", "two", "v0001")
    assert predict() != before
    own.rollback("me", CONFIG)
    assert served.version() == "v0001"
    assert predict() == before


@pytest.mark.parametrize(
    "ask", [lambda own: own.promote("v0002", "bob", CONFIG), lambda own: own.rollback("bob", CONFIG)]
)
def test_of_two_people_who_ask_for_the_same_at_once_one_is_told_so(trained, monkeypatch, ask):
    check = versions._require_loadable

    def while_ann_is_quicker(version, config):
        monkeypatch.setattr(versions, "_require_loadable", check)
        trained.promote("v0002", "ann", CONFIG)

    monkeypatch.setattr(versions, "_require_loadable", while_ann_is_quicker)
    before = len(trained.events())
    with pytest.raises(StateError, match="v0002 is in service already"):
        ask(trained)
    assert [event["by"] for event in trained.events()[before:]] == ["ann"]


def test_names_that_are_none_are_refused(trained):
    for name in ("", "v1", "latest", "../v0001", "v0001.safetensors", "v0001/..", "V0001", "v0001\n"):
        with pytest.raises(InputError, match="no version") as caught:
            trained.promote(name, "me", CONFIG)
        assert not isinstance(caught.value, NotFoundError)
    assert in_service(trained) == ["v0003"]


def test_an_unknown_version_names_the_known_ones(trained):
    with pytest.raises(NotFoundError, match="v0001, v0002, v0003, v0004"):
        trained.promote("v0042", "me", CONFIG)
    with pytest.raises(StateError, match="in service already"):
        trained.promote("v0003", "me", CONFIG)


def test_a_model_that_cannot_be_loaded_is_not_put_in_service(trained, project, monkeypatch):
    damaged = project.models / "v0001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    assert trained.get("v0001").verdict == "damaged"
    with pytest.raises(InputError, match=r"v0001\.safetensors"):
        trained.promote("v0001", "me", CONFIG)

    def other_base(name, weights=None, image_size=None):
        backbone = BACKBONES["per_head"]()
        backbone.weights_sha256 = "1" * 64
        return backbone

    monkeypatch.setattr("samadapt.backbones.load", other_base)
    with pytest.raises(StateError, match=r"v0002 cannot be put in service.*--weights"):
        trained.promote("v0002", "me", CONFIG)
    with pytest.raises(StateError, match="v0002"):
        trained.rollback("me", CONFIG)
    assert in_service(trained) == ["v0003"]


def test_a_training_does_not_replace_what_it_was_not_compared_with(trained, project):
    candidate = make_model(project, 5)
    trained.promote("v0001", "me", CONFIG)
    assert not trained.publish(candidate, "", "one more", "v0003")
    assert in_service(trained) == ["v0001"]


class Killed(BaseException):
    """What a kill is to the code that it hits."""


def test_a_kill_between_any_two_writes_leaves_a_truth_and_a_history(project, monkeypatch):
    """Every write of every step may be the last one; after it the next process goes on."""
    models = [make_model(project, number) for number in range(2)]
    own, moments = Versions(project), random.Random(0)
    write = versions.write_json
    for _ in range(30):
        left = moments.randrange(4)

        def interrupted(path, value):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            write(path, value)

        with monkeypatch.context() as patch:
            patch.setattr("samadapt.versions.write_json", interrupted)
            patch.setattr("samadapt.project.write_json", interrupted)
            current = project.published()
            candidate = models[moments.randrange(2)]
            with contextlib.suppress(Killed):
                own.publish(candidate, "better", str(moments.random()), current.stem if current else None)
        published = project.published()
        if published is None:
            continue
        events = own.events()
        assert events[-1]["version"] == published.stem
        assert in_service(own) == [published.stem]
        assert len({json.dumps(event) for event in events}) == len(events)
    own.refuse(models[0], "worse", "last")
    kept = json.loads(project.history.read_text())
    assert kept == own.events()
    assert len(kept) > 10
    assert not [path.name for path in project.root.rglob("*.tmp.*")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["publish", "promote", "back"]), max_size=12), st.randoms(use_true_random=False))
def test_rolling_back_is_the_undo_of_what_was_put_in_service(tmp_path_factory, steps, pick):
    project = Project(tmp_path_factory.mktemp("studies"))
    project.models.mkdir(parents=True)
    own, undo, current = Versions(project), [], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "_require_loadable", lambda version, config: None)
        for step in steps:
            if step == "publish":
                file = project.next_model()
                file.write_bytes(b"")
                assert own.publish(file, "", f"of {file.stem}", current)
                undo.append(current)
                current = file.stem
            elif step == "promote" and (others := [name for name in own.names() if name != current]):
                undo.append(current)
                current = own.promote(pick.choice(others), "me", CONFIG).name
            elif step == "back" and any(undo):
                current = own.rollback("me", CONFIG).name
                assert current == undo.pop()
            assert project.published() is None or project.published().stem == current


def test_the_name_of_a_deleted_version_is_not_used_again(trained, project):
    own = Versions(project)
    file = project.next_model()
    file.write_bytes(b"")
    own.refuse(file, "worse", "a training")
    file.unlink()
    assert project.next_model().stem == f"v{int(file.stem[1:]) + 1:04d}"
    project.history.write_text("{")
    assert project.next_model() == file  # a training's result is kept all the same


def test_a_damaged_history_is_refused_and_changes_no_model(trained, project):
    project.history.write_text("[{}]")
    with pytest.raises(InputError, match=r"history\.json"):
        trained.rollback("me", CONFIG)
    assert project.published().stem == "v0003"
    project.history.unlink()
    assert trained.events()[-1]["version"] == "v0003"


def test_a_folder_from_before_there_was_a_history(project):
    make_model(project, 0)
    (project.root / "published.json").write_text(json.dumps({"model": "v0001.safetensors", "time": 1.7e9}))
    own = Versions(project)
    assert own.get("v0001").verdict == "published"
    make_model(project, 1)
    assert own.get("v0002").verdict == "unfinished"
    own.promote("v0002", "me", CONFIG)
    assert own.rollback("me", CONFIG).name == "v0001"


def test_earlier_versions_that_know_the_same_labels_may_be_asked(project, trained):
    models = Models(CONFIG, project)
    assert [path.stem for path in trained.before_present()] == ["v0001", "v0002"]
    both = models.earlier(2)
    assert len(both) == 2
    assert all(one is other for one, other in zip(both, models.earlier(2), strict=True))
    (last,) = models.earlier(1)
    older, newer, again = (torch.cat([p.flatten() for p in one.trainable().values()]) for one in (*both, last))
    assert torch.equal(newer, again)
    assert not torch.equal(newer, older)
    trained.rollback("a test", CONFIG)
    assert [path.stem for path in trained.before_present()] == ["v0001"]
    assert len(models.earlier(2)) == 1
    (project.models / "v0001.safetensors").write_bytes(b"damaged")
    assert Models(CONFIG, project).earlier(2) == []


def test_before_any_training_there_are_no_earlier_versions(project):
    assert Models(CONFIG, project).earlier(2) == []
