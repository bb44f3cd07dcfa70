"""What is proposed to whom, on a real datastore with a tiny model."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samadapt import recipes
from samadapt.activelearning.registry import NAMES, strategy
from samadapt.activelearning.strategy import Candidate, Pool
from samadapt.config import AppConfig
from samadapt.data.volume import read_volume
from samadapt.inference.examine import examine
from samadapt.project import Project
from samadapt.server.datastore import SafeDatastore
from samadapt.server.outlook import AHEAD, ALL_LABELLED, Outlook
from samadapt.server.strategies import all_strategies
from tiny import BACKBONES, write_studies

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ("bright", "dark")
INFO = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(LABELS, start=1)]}


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "studies"
    write_studies(folder, 4)
    shutil.move(folder / "labels", tmp_path / "labels")
    return folder


@pytest.fixture
def store(studies):
    return SafeDatastore(str(studies))


def outlook_of(studies, store, serving, **conf):
    return Outlook(AppConfig.from_strings(conf), Project(studies), serving, lambda: store)


@pytest.fixture
def outlook(studies, store, serving):
    return outlook_of(studies, store, serving)


def label(store, tmp_path, image):
    store.save_label(image, str(tmp_path / "labels" / "final" / f"{image}.nii.gz"), "final", INFO)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "revisit"])
@pytest.mark.parametrize("looked", [False, True])
def test_every_strategy_gives_everybody_a_case_of_their_own(name, looked, outlook, store, serving, tmp_path):
    label(store, tmp_path, "case_3")
    if looked:
        serving.train()
        outlook._needs |= strategy(name).needs
        for image in store.list_images():
            outlook.look(image, lambda: None)
    answers = [outlook.propose(strategy(name), client) for client in ("ann", "bob", None)]
    assert {answer["id"] for answer in answers} == {"case_0", "case_1", "case_2"}
    for answer in answers:
        assert answer["reason"]
        assert answer["chosen_by"] == name
        assert all(0 <= index < 6 for index in answer["slices"])
        assert len(set(answer["slices"])) == len(answer["slices"])
    assert outlook.propose(strategy(name), "eve") is None
    assert "3 images" in outlook.why_nothing(strategy("first"))


def test_ohif_s_name_means_the_configured_strategy(outlook):
    assert all_strategies("last", outlook)["random"]({}, None)["chosen_by"] == "last"


def test_an_unreadable_image_is_skipped_and_reported(studies, outlook):
    (studies / "case_0.nii.gz").write_bytes(gzip.compress(b"no image"))
    answer = outlook.propose(strategy("first"), "ann")
    assert answer["id"] == "case_1"
    assert list(answer["skipped"]) == ["case_0"]


def test_any_number_of_unreadable_images_is_skipped(studies, store, outlook):
    for number in range(2 * AHEAD):
        (studies / f"a_{number}.nii.gz").write_bytes(b"no image")
    answer = outlook.propose(strategy("first"), "ann")
    assert answer["id"] == "case_0"
    assert len(answer["skipped"]) == 2 * AHEAD


def test_only_the_next_few_of_many_are_ranked(studies, outlook, monkeypatch):
    """A ranking of all thousands would take seconds."""
    for number in range(30):
        os.link(studies / "case_0.nii.gz", studies / f"more_{number:02}.nii.gz")
    asked, first = [], strategy("first")
    rank = type(first).rank
    monkeypatch.setattr(type(first), "rank", lambda self, pool, count: asked.append(count) or rank(self, pool, count))
    given = [outlook.propose(first, client)["id"] for client in ("ann", "bob", "eve")]
    assert given == ["case_0", "case_1", "case_2"]
    assert asked == [AHEAD, AHEAD, AHEAD]


@pytest.mark.parametrize("name", ["typiclust", "kcenter", "probcover", "auto"])
def test_those_who_ask_at_once_get_cases_of_different_kinds(name, studies, outlook, monkeypatch):
    """Twelve kinds of eight cases each, and nobody has labelled yet: six people work on six kinds."""
    kinds = [f"{kind:02}" for kind in range(12)]
    for number in range(8):
        for kind in kinds:
            os.link(studies / "case_0.nii.gz", studies / f"{kind}-{number}.nii.gz")
    for number in range(4):
        (studies / f"case_{number}.nii.gz").unlink()
    for seed in range(5):
        random = np.random.default_rng(seed)
        centres = {kind: random.normal(size=8) for kind in kinds}
        points = {
            f"{kind}-{number}": centre + 0.12 * random.normal(size=8)
            for kind, centre in centres.items()
            for number in range(8)
        }
        monkeypatch.setattr(
            outlook, "_candidate", lambda image, points=points: Candidate(image, descriptor=points[image])
        )
        given = [outlook.propose(strategy(name), f"{seed} {client}")["id"] for client in range(6)]
        assert len({case.split("-")[0] for case in given}) == 6
        for case in given:
            outlook.leases.end(case)


def test_auto_asks_for_a_patient_of_whom_nothing_is_labelled_or_with_somebody(studies, store, serving, tmp_path):
    patients = {"case_0": "Ann", "case_1": "Ann", "case_2": "Bob", "case_3": "Ann"}
    (studies / "patients.json").write_text(json.dumps(patients))
    outlook = outlook_of(studies, store, serving)
    label(store, tmp_path, "case_3")
    assert outlook.propose(strategy("auto"), "eve")["id"] == "case_2"
    assert {outlook.propose(strategy("auto"), client)["id"] for client in ("joe", "kim")} == {"case_0", "case_1"}


def test_what_somebody_has_is_no_label(outlook, store, tmp_path):
    """Neither for revisit nor for the reasons."""
    label(store, tmp_path, "case_0")
    for client in ("ann", "bob"):
        assert "only 1 of 4 labels" in outlook.propose(strategy("auto"), client)["reason"]
    assert outlook.propose(strategy("revisit"), "eve")["id"] == "case_0"


def test_the_classes_take_turns_among_those_who_ask_at_once(outlook, store, serving):
    serving.train()
    for image in store.list_images():
        outlook.look(image, lambda: None)
    reasons = [outlook.propose(strategy("claspe"), client)["reason"] for client in ("ann", "bob")]
    assert "unsure of bright" in reasons[0]
    assert "unsure of dark" in reasons[1]


@pytest.mark.parametrize("weights", [(b"one", b"other"), (None, b"one")])
def test_descriptors_of_other_weights_are_not_mixed_in(weights, studies, store, serving, tmp_path):
    files = [tmp_path / f"weights_{n}.pth" if data else None for n, data in enumerate(weights)]
    for file, data in zip(files, weights, strict=True):
        if file:
            file.write_bytes(data)
    first, second = (outlook_of(studies, store, serving, **({"weights": str(file)} if file else {})) for file in files)
    first.look("case_1", lambda: None)
    assert first._candidate("case_1").descriptor is not None
    assert second._candidate("case_1").descriptor is None


def test_descriptors_stay_when_a_weights_file_moves(studies, store, serving, tmp_path):
    for name in ("here.pth", "there.pth"):
        (tmp_path / name).write_bytes(b"the same")
    outlook_of(studies, store, serving, weights=str(tmp_path / "here.pth")).look("case_1", lambda: None)
    moved = outlook_of(studies, store, serving, weights=str(tmp_path / "there.pth"))
    assert moved._candidate("case_1").descriptor is not None


def test_a_label_that_comes_later_is_seen(outlook, store, serving, tmp_path):
    """Studies are looked through again once something in them has changed."""
    label(store, tmp_path, "case_3")
    serving.train()
    for image in ("case_3", "case_2"):
        outlook.look(image, lambda: None)
    assert outlook._candidate("case_3").label_dice is not None
    assert outlook._candidate("case_2").label_dice is None
    label(store, tmp_path, "case_2")
    outlook.look("case_2", lambda: None)
    assert outlook._candidate("case_2").label_dice is not None


def test_everything_labelled_says_so(outlook, store, tmp_path):
    for image in list(store.list_images()):
        label(store, tmp_path, image)
    assert outlook.propose(strategy("auto"), "ann") is None
    assert outlook.why_nothing(strategy("first")) == ALL_LABELLED


def test_revisit_says_what_it_waits_for(outlook, store, tmp_path):
    assert outlook.propose(strategy("revisit"), "ann") is None
    assert "no image has a final label yet" in outlook.why_nothing(strategy("revisit"))
    label(store, tmp_path, "case_3")
    assert outlook.propose(strategy("revisit"), "ann")["id"] == "case_3"
    assert outlook.propose(strategy("revisit"), "bob") is None
    assert "the 1 images with a label" in outlook.why_nothing(strategy("revisit"))


def test_no_two_people_at_one_case_even_after_a_restart(studies, store, serving):
    first = outlook_of(studies, store, serving).propose(strategy("first"), "ann")
    again = outlook_of(studies, store, serving).propose(strategy("first"), "bob")
    assert first["id"] != again["id"]


def test_a_lease_of_no_time_is_none(studies, store, serving):
    outlook = outlook_of(studies, store, serving, lease_minutes="0")
    assert outlook.propose(strategy("first"), "ann")["id"] == outlook.propose(strategy("first"), "bob")["id"]


def test_the_worklist_orders_what_has_been_examined_and_names_the_rest(outlook, serving):
    serving.train()
    for image in ("case_2", "case_1"):
        outlook.look(image, lambda: None)
    listed = outlook.worklist()
    assert listed["model_version"] == "v0001"
    assert {case["id"] for case in listed["cases"]} == {"case_1", "case_2"}
    assert all({*case["dice"], *case["not_found"]} == set(LABELS) for case in listed["cases"])
    means = [case["mean"] if case["mean"] is not None else -1 for case in listed["cases"]]
    assert means == sorted(means)
    assert listed["not_examined_yet"] == ["case_0", "case_3"]


def test_a_new_version_looks_anew(outlook, serving):
    serving.train()
    outlook.look("case_1", lambda: None)
    assert outlook.quality("case_1") is not None
    serving.train("v0002")
    assert outlook.quality("case_1") is None


def test_bald_asks_earlier_versions_and_only_once_somebody_wants_it(outlook, serving):
    serving.train()
    serving.earlier = lambda count: pytest.fail("nobody has asked for bald")
    outlook.look("case_1", lambda: None)
    del serving.earlier
    serving.before = [recipes.build("autosam_linear", LABELS, BACKBONES["per_head"]()).eval()]
    for number, parameter in enumerate(serving.before[0].trainable().values()):
        parameter.data += 0.5 * (-1) ** number
    serving.before[0].describe(trained=True)
    outlook.propose(strategy("bald"), "ann")
    outlook.look("case_1", lambda: None)
    with_earlier = outlook._candidate("case_1").spread
    serving.before = []
    serving.train("v0002")
    outlook.look("case_1", lambda: None)
    assert with_earlier.max() > 0
    assert not np.allclose(with_earlier, outlook._candidate("case_1").spread)


def test_the_configured_strategy_s_needs_are_gathered_before_anybody_asks(studies, store, serving):
    serving.train()
    outlook = outlook_of(studies, store, serving, strategy="bald")
    outlook.look("case_1", lambda: None)
    assert outlook._candidate("case_1").spread is not None


def test_a_strategy_that_nobody_has_asked_for_yet_changes_what_is_wanted(outlook, store, serving):
    serving.train()
    before = outlook.wanted()
    outlook.propose(strategy("entropy"), "ann")
    assert outlook.wanted() == before
    outlook.propose(strategy("disagreement"), "ann")
    assert outlook.wanted() != before
    outlook.look("case_1", lambda: None)
    assert outlook._survey.missing("case_1", Path(store.image_path("case_1")), "v0001", {"disagreement"}) == frozenset()


def test_a_full_cache_keeps_nobody_from_looking_and_gets_nothing(outlook, serving, monkeypatch):
    monkeypatch.setattr(serving.cache, "filled", lambda: 0.95)
    serving.train()
    outlook.look("case_1", lambda: None)
    assert outlook.quality("case_1") is not None
    assert outlook._candidate("case_1").descriptor is not None
    assert serving.cache.bytes_used() == 0


def test_revisit_proposes_labelled_cases(outlook, store, serving, tmp_path):
    label(store, tmp_path, "case_3")
    serving.train()
    outlook.look("case_3", lambda: None)
    assert outlook.propose(strategy("revisit"), "ann")["id"] == "case_3"


@pytest.mark.parametrize("asked", [True, False])
def test_a_label_that_somebody_was_asked_to_check_and_left_as_it_was_comes_last(asked, outlook, store, tmp_path):
    for image in ("case_2", "case_3"):
        label(store, tmp_path, image)
    if asked:
        store.update_image_info("case_3", {"strategy": {"revisit": {"ts": time.time(), "client_id": "ann"}}})
    swapped = nib.load(tmp_path / "labels" / "final" / "case_3.nii.gz")
    other_order = np.array([0, 2, 1], np.uint8)[np.asarray(swapped.dataobj).astype(int)]
    nib.save(nib.Nifti1Image(other_order, swapped.affine), tmp_path / "again.nii.gz")
    info = {"label_info": [{"name": name.upper(), "idx": n} for n, name in enumerate(LABELS[::-1], start=1)]}
    store.save_label("case_3", str(tmp_path / "again.nii.gz"), "final", info)
    assert store.is_confirmed("case_3") == asked
    assert any("checked" in remark for remark in store.last_saved.remarks) == asked
    pool = [replace(outlook._candidate(image), label_dice=dice) for image, dice in (("case_2", 0.9), ("case_3", 0.1))]
    ranking = strategy("revisit").rank(Pool([], pool), 2)
    assert [one.id for one in ranking] == (["case_2", "case_3"] if asked else ["case_3", "case_2"])
    assert ("checked" in ranking[-1].reason) == asked

    other_order[0, 0, 0] = (other_order[0, 0, 0] + 1) % 3
    nib.save(nib.Nifti1Image(other_order, swapped.affine), tmp_path / "again.nii.gz")
    store.save_label("case_3", str(tmp_path / "again.nii.gz"), "final", info)
    assert not store.is_confirmed("case_3")


@pytest.mark.parametrize("said", ["in the label", "in the settings"])
def test_revisit_does_not_hold_against_a_label_what_nobody_looked_for(said, studies, store, serving, tmp_path):
    """Only one structure was looked for, and the model agrees on it; what else it finds says nothing of the label."""
    serving.train()
    mask, _ = examine(serving.current().model, read_volume(studies / "case_3.nii.gz"))
    one, other = np.unique(mask)[-1], np.unique(mask)[-2]
    assert other > 0
    file = tmp_path / "part.nii.gz"
    affine = nib.load(studies / "case_3.nii.gz").affine
    nib.save(nib.Nifti1Image(np.where(mask == one, one, 0).astype(np.uint8), affine), file)
    info = {"label_info": [{"name": LABELS[one - 1], "idx": int(one)}]}
    in_label = said == "in the label"
    store.save_label("case_3", str(file), "final", info | ({"labelled_classes": "named"} if in_label else {}))
    outlook = outlook_of(studies, store, serving, **({} if in_label else {"absent_classes": "ignore"}))
    outlook.look("case_3", lambda: None)
    assert outlook._candidate("case_3").label_dice == 1


def test_what_comes_next_is_encoded_first(outlook, store, tmp_path):
    label(store, tmp_path, "case_0")
    outlook.propose(strategy("last"), "ann")
    assert outlook.upcoming() == ["case_3", "case_2", "case_1", "case_0"]
