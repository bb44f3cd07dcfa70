"""Training on small phantoms with small random backbones: splits, resume, publishing, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samadapt import recipes
from samadapt.adapters import Ladder
from samadapt.config import AppConfig
from samadapt.data.cases import Case, find_cases
from samadapt.data.labels import LabelMap
from samadapt.data.volume import read_label, read_volume
from samadapt.data.window import Window
from samadapt.errors import InputError, StateError
from samadapt.files import sha256_of, write_json
from samadapt.inference.auto import segment
from samadapt.model import AdaptedModel, read_info
from samadapt.project import Project
from samadapt.training import checkpoint, train
from samadapt.training.crossval import CrossValidation
from samadapt.training.ledger import Ledger
from samadapt.training.loop import Trainer
from samadapt.training.slices import SliceSampler, few_slices, prepare, read_case
from samadapt.versions import Versions
from tiny import BACKBONES, write_studies

LABELS = LabelMap(("bright", "dark"))
TESTS = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "studies"
    write_studies(folder, 5)
    return folder


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch):
    def load(name, weights=None, image_size=None):
        backbone = BACKBONES["per_head"]()
        backbone.weights_sha256 = "0" * 64 if weights is None else sha256_of(weights)
        return backbone

    monkeypatch.setattr("samadapt.backbones.load", load)


def settings_for(steps: int) -> AppConfig:
    return AppConfig.from_strings({"max_steps": str(steps), "max_train_minutes": "5", "image_size": "64"})


# ---- the ledger

ids = st.lists(st.text("abcdefgh", min_size=1, max_size=3), unique=True, max_size=30)


@settings(max_examples=50, deadline=None)
@given(first=ids, second=ids)
def test_a_case_never_changes_sides(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("ledger") / "ledger.json"
    one = [Case(name, Path(name)) for name in first]
    both = one + [Case(name, Path(name)) for name in second if name not in first]
    training, held_out = Ledger(path).split(one)
    later_training, later_held_out = Ledger(path).split(both)
    assert {c.id for c in training} <= {c.id for c in later_training}
    assert {c.id for c in held_out} <= {c.id for c in later_held_out}
    assert {c.id for c in both} == {c.id for c in later_training} ^ {c.id for c in later_held_out}
    assert len(later_held_out) == len(both) // 4


def test_one_patient_is_on_one_side(tmp_path):
    cases = [Case(f"c{n}", Path("x"), patient=f"p{n // 2}") for n in range(16)]
    training, held_out = Ledger(tmp_path / "ledger.json").split(cases)
    assert held_out
    assert not {c.patient for c in training} & {c.patient for c in held_out}


@settings(max_examples=100, deadline=None)
@given(
    rounds=st.lists(
        st.dictionaries(st.sampled_from("abcdefghijkl"), st.none() | st.sampled_from("PQR"), max_size=12), max_size=5
    )
)
def test_no_case_changes_sides_when_its_patient_becomes_known_or_unknown(tmp_path_factory, rounds):
    path = tmp_path_factory.mktemp("ledger") / "ledger.json"
    roles = {}
    for labelled in rounds:
        cases = [Case(name, Path(name), patient=patient) for name, patient in labelled.items()]
        training, held_out = Ledger(path).split(cases)
        assert sorted(case.id for case in [*training, *held_out]) == sorted(labelled)
        for role, members in (("train", training), ("held-out", held_out)):
            for case in members:
                assert roles.setdefault(case.id, role) == role


def test_a_new_case_is_held_out_where_the_one_that_was_has_lost_its_label(tmp_path):
    """Else nothing would be compared until the eighth case."""
    path = tmp_path / "ledger.json"
    assert [case.id for case in Ledger(path).split([Case(name, Path("x")) for name in "abcd"])[1]] == ["d"]
    assert Ledger(path).split([Case(name, Path("x")) for name in "abc"])[1] == []
    assert [case.id for case in Ledger(path).split([Case(name, Path("x")) for name in "abcef"])[1]] == ["e"]
    assert [case.id for case in Ledger(path).split([Case(name, Path("x")) for name in "abcdef"])[1]] == ["d", "e"]


def test_a_patient_that_becomes_known_shares_the_role_of_the_case_that_is_there(tmp_path):
    path = tmp_path / "ledger.json"
    Ledger(path).split([Case(name, Path("x")) for name in "abcd"])
    later = [Case("d", Path("x"), patient="P"), Case("e", Path("x"), patient="P")]
    assert [case.id for case in Ledger(path).split(later)[1]] == ["d", "e"]


@pytest.mark.parametrize("patient", [None, "somebody else"])
def test_a_held_out_image_under_another_name_is_held_out(tmp_path, patient):
    cases = [Case(name, tmp_path / f"{name}.png") for name in "abcd"]
    for case in cases:
        case.image.write_bytes(case.id.encode())
    path = tmp_path / "ledger.json"
    assert [case.id for case in Ledger(path).split(cases)[1]] == ["d"]
    copied = Case("copied", tmp_path / "copied.png", patient=patient)
    copied.image.write_bytes(b"d")
    assert [case.id for case in Ledger(path).split([*cases, copied])[1]] == ["d", "copied"]
    assert [case.id for case in Ledger(path).split([*cases[:3], copied])[1]] == ["copied"]
    renamed = Case("renamed", cases[0].image.rename(tmp_path / "renamed.png"))
    assert Ledger(path).split([*cases[1:3], renamed])[1] == []


def test_held_out_images_that_are_renumbered_stay_held_out(tmp_path):
    """Somebody removes the first image, and every other one takes the name before its own."""
    path, files = tmp_path / "ledger.json", [tmp_path / f"{name}.png" for name in "abcdefgh"]
    for file in files:
        file.write_bytes(file.name.encode())
    held_out = Ledger(path).split([Case(file.stem, file) for file in files])[1]
    held_out_images = [case.image.read_bytes() for case in held_out]
    assert held_out_images == [b"d.png", b"h.png"]
    files[0].unlink()
    for before, after in itertools.pairwise(files):
        after.rename(before)
    for _ in range(2):
        training, held_out = Ledger(path).split([Case(file.stem, file) for file in files[:-1]])
        assert [case.image.read_bytes() for case in held_out] == held_out_images
        assert len(training) == 5


def test_an_image_is_read_again_only_if_its_file_has_changed(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("samadapt.training.ledger.sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    cases = [Case(name, tmp_path / f"{name}.png") for name in "ab"]
    for case in cases:
        case.image.write_bytes(b"image of " + case.id.encode())
    for _ in range(2):
        Ledger(tmp_path / "ledger.json").split(cases)
    assert read == ["a.png", "b.png"]
    cases[0].image.write_bytes(b"another image")
    for _ in range(2):
        Ledger(tmp_path / "ledger.json").split(cases)
    assert read == ["a.png", "b.png", "a.png"]


def test_a_patient_whose_name_is_written_otherwise_is_the_same(tmp_path):
    path = tmp_path / "ledger.json"
    cases = [Case(f"c{n}", Path("x"), patient=f"Patient{n}") for n in range(4)]
    assert [case.id for case in Ledger(path).split(cases)[1]] == ["c3"]
    later = Case("later", Path("x"), patient="patient3")
    assert [case.id for case in Ledger(path).split([*cases[:3], later])[1]] == ["later"]
    both = [Case("x1", Path("x"), patient="New"), Case("x2", Path("x"), patient="NEW")]
    assert len(Ledger(path).split([*cases, *both])[0]) == 5
    assert not [name for name in json.loads(path.read_text()) if name == "patient NEW"]


SHOWN = {"a": "lesion", "b": "lesion", "c": "lesion", "d": "", "e": "", "f": "lesion", "g": "lesion", "h": "lesion"}


def split_by_one(path, cases) -> list[str]:
    """Ids of the cases that are held out, where each comes with a training of its own."""
    for count in range(1, len(cases) + 1):
        held_out = Ledger(path).split(cases[:count], lambda case: SHOWN[case.id].split())[1]
    return [case.id for case in held_out]


def test_the_next_patient_who_shows_what_no_held_out_case_shows_is_held_out(tmp_path):
    assert split_by_one(tmp_path / "ledger.json", [Case(name, Path("x")) for name in SHOWN]) == ["d", "f", "h"]


def test_what_nobody_could_learn_any_more_is_not_held_out(tmp_path):
    """The first patients who show a structure are there to learn from."""
    cases = [Case(name, Path("x")) for name in "abcdefgh"]
    shown = dict.fromkeys("abcd", "liver") | dict.fromkeys("efgh", "liver new")
    held_out = Ledger(tmp_path / "ledger.json").split(cases, lambda case: shown[case.id].split())[1]
    assert [case.id for case in held_out] == ["d", "f", "h"]


def test_never_more_than_half_of_the_patients_are_held_out_for_what_they_show(tmp_path):
    cases = [Case(f"c{number:02}", Path("x")) for number in range(12)]
    shown = {case.id: {f"s{number}"} for number, case in enumerate(cases)}
    shown |= {case.id: {f"s{number}" for number in range(12)} for case in cases[:3]}
    training, held_out = Ledger(tmp_path / "ledger.json").split(cases, lambda case: shown[case.id])
    assert len(training) == len(held_out) == 6


def empty_label(studies, case):
    path = studies / "labels" / "final" / f"{case}.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)


def test_held_out_cases_that_show_nothing_are_told_and_decide_nothing(studies, monkeypatch):
    """case_3, the fourth, is a healthy patient; case_4 is not."""
    empty_label(studies, "case_3")
    crossed = CrossValidation(3, {str(n): {"bright": 0.4} for n in range(3)}, 18.0)
    monkeypatch.setattr("samadapt.training.crossval.cross_validate", lambda *args: crossed)
    project = Project(studies)
    for answers in (False, True):
        result = train(find_cases(studies)[:4], LABELS, settings_for(1), project)
        assert read_info(result.model).answers_prompts == answers  # nothing to click on: as it was
        assert any("no held-out case shows bright, dark" in remark for remark in result.remarks)
        assert result.cross_validation == crossed
        assert result.clicks.objects == 0
        promoted = AdaptedModel.load(result.model)
        promoted.describe(answers_prompts=True)
        promoted.save(project.models / "v0009.safetensors")
        if not answers:
            Versions(project).promote("v0009", "somebody", AppConfig())
    assert "the held-out cases show none of the structures" in result.reason
    assert "Dice 0.400" in result.reason
    last = read_info(train(find_cases(studies), LABELS, settings_for(1), project).model).training
    assert last["held_out"] == ["case_3", "case_4"]


def test_the_ledger_says_why(tmp_path):
    path = tmp_path / "ledger.json"
    cases = [Case(name, Path("x"), label=Path("y")) for name in "abc"]
    cases += [Case(name, Path("x"), label=Path("y"), patient="p") for name in ("d1", "d2")]
    Ledger(path).split(cases)
    told = {one.case: one for one in Ledger(path).explain([*cases[1:], Case("e", Path("x"), label=Path("y"))])}
    assert list(told) == ["a", "b", "c", "d1", "d2", "e"]
    assert [one.role for one in told.values()] == ["train", "train", "train", "held-out", "held-out", None]
    assert told["a"].why == "decided earlier; no such image is here now"
    assert told["b"].why == "it is number 2, one in 4 is held out"
    assert told["d1"].why == "patient p is number 4, one in 4 is held out, with 1 more of the same patient"
    assert told["e"].why == "the next training decides"
    assert json.loads(path.read_text()).keys().isdisjoint({"case e"})


def test_labelled_cases_of_which_none_is_held_out_are_told(tmp_path):
    path = tmp_path / "ledger.json"
    cases = [Case(name, Path("x"), label=Path("y")) for name in "abcd"]
    assert not Ledger(path).nothing_held_out(cases)  # the first training will hold one out
    Ledger(path).split(cases[:3])
    assert not Ledger(path).nothing_held_out(cases)  # so will the next
    write_json(path, dict.fromkeys(["case a", "case b", "case c", "case d"], "train"))
    assert Ledger(path).nothing_held_out(cases)
    assert not Ledger(path).nothing_held_out(cases[:3])  # too few to hold any out


@pytest.mark.parametrize("text", ['{"case a": "maybe"}', '{"case a": ["train"]}', '{"case a": {}}', "[]", "{"])
def test_a_damaged_ledger_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"ledger\.json"):
        Ledger(path)
    assert path.read_text() == text


@pytest.mark.parametrize("gone", ["the file", "one line"])
def test_a_ledger_that_is_lost_is_restored_from_what_models_were_trained_on(studies, gone):
    write_studies(studies.parent / "more", 6)
    cases, project = find_cases(studies.parent / "more"), Project(studies)
    train(cases[:5], LABELS, settings_for(1), project)
    roles = json.loads(project.ledger.read_text())
    roles = {name: role for name, role in roles.items() if name.startswith("case ")}
    assert [name for name, role in roles.items() if role == "held-out"] == ["case case_3"]
    if gone == "the file":
        project.ledger.unlink()
    else:
        project.ledger.write_text(json.dumps({name: role for name, role in roles.items() if name != "case case_3"}))
    result = train(cases[1:], LABELS, settings_for(1), project)  # drawn anew, case_4 would be the fourth
    manifest = read_info(result.model).training
    assert manifest["held_out"] == ["case_3"]
    assert any("ledger.json had lost" in remark and "case_3" in remark for remark in result.remarks)
    assert json.loads(project.ledger.read_text()).items() >= roles.items()


def test_what_a_training_notes_is_json_where_no_held_out_case_shows_a_structure(studies):
    project = Project(studies)
    train(find_cases(studies), LabelMap(("bright", "dark", "new")), settings_for(1), project)

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    status = json.loads((project.training / "status.json").read_text(), parse_constant=refuse)
    assert status["dice"]["new"] is None


# ---- slices


def test_batches_depend_on_seed_and_number_alone(studies, tmp_path):
    cases = [case for case in find_cases(studies) if case.label]
    prepared = prepare(cases, LABELS, Window("percentile", 0.5, 99.5), 1, 64, tmp_path / "slices")
    first, second = (SliceSampler(prepared, 64, 4, seed=3) for _ in range(2))
    first.batch(0)
    for number in (7, 2):
        assert all(torch.equal(a, b) for a, b in zip(first.batch(number), second.batch(number), strict=True))
    assert not torch.equal(first.batch(7)[0], first.batch(8)[0])


def cubic(studies):
    """The same studies with voxels of 1 mm; 6 slices are enough to be looked at from the side."""
    for path in studies.rglob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([-1.0, -1.0, 1.0, 1.0])), path)


def test_planes_of_a_case_show_the_same_voxels(studies, tmp_path):
    cubic(studies)
    cases = [case for case in find_cases(studies) if case.label]
    words = (cases, LABELS, Window("percentile", 0.5, 99.5), 1, 64, tmp_path / "slices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samadapt.data.geometry.FEWEST_SLICES", 6)
        prepared = prepare(*words, planes="all")
    first = [case for case in prepared if case.id == "case_0"]
    assert [(case.plane, len(case)) for case in first] == [(0, 6), (1, 30), (2, 36)]
    label = read_label(cases[0].label, read_volume(cases[0].image).geometry)
    for case, axis in zip(first, (2, 1, 0), strict=True):
        for number in (1, 2):
            shown = np.flatnonzero((label == number).any(axis=tuple(a for a in range(3) if a != axis)))
            assert len(case.slices_of[number]) == len(shown)
    assert len({case.view_key for case in prepared}) == len(prepared) == 15
    again = prepare(*words, planes="acquisition")
    assert [case.plane for case in again] == [0] * 5
    assert len({path.name.split(".")[0] for path in (tmp_path / "slices").iterdir()}) == 5


def test_a_training_looks_at_all_planes_where_it_is_told_to(studies, monkeypatch):
    cubic(studies)
    monkeypatch.setattr("samadapt.data.geometry.FEWEST_SLICES", 6)
    drawn = set()
    load = SliceSampler.load
    monkeypatch.setattr(SliceSampler, "load", lambda self, d: drawn.add((d.copy, d.case.plane)) or load(self, d))
    config = dataclasses.replace(settings_for(4), planes="all")
    info = read_info(train(find_cases(studies), LABELS, config, Project(studies)).model)
    assert info.planes == "all"
    assert len(info.training["cases"]) == len(set(info.training["cases"])) == 4
    assert {plane for copy, plane in drawn if copy is not None} == {0, 1, 2}
    assert {plane for copy, plane in drawn if copy is None} == {0}


def test_few_slices_of_each_case(studies, tmp_path):
    cases = [case for case in find_cases(studies) if case.label]
    prepared = prepare(cases, LABELS, Window("percentile", 0.5, 99.5), 1, 64, tmp_path / "slices")
    few = [few_slices(case, 1, seed=5) for case in prepared]
    assert all(len(case.learned_from) == 1 for case in few)
    assert all((case.label(case.learned_from[0]) > 0).any() for case in few)
    assert {d.index for n in range(40) for d in SliceSampler(few, 64, 4, 0).draws(n) if d.case is few[0]} == set(
        few[0].learned_from
    )
    assert [case.learned_from for case in few] == [few_slices(case, 1, seed=5).learned_from for case in prepared]
    choices = {tuple(few_slices(prepared[0], 1, seed=seed).learned_from) for seed in range(20)}
    assert len(choices) > 1
    assert few_slices(prepared[0], 100, seed=5).learned_from == sorted(
        {i for s in prepared[0].slices_of.values() for i in s}
    )


def test_a_training_may_see_few_slices_of_each_case(studies, monkeypatch):
    seen = set()
    load = SliceSampler.load
    monkeypatch.setattr(SliceSampler, "load", lambda self, d: seen.add((d.case.id, d.index, d.copy)) or load(self, d))
    config = dataclasses.replace(settings_for(20), slices_per_case=1)
    train(find_cases(studies), LABELS, config, Project(studies))
    learned = {(case, index) for case, index, copy in seen if copy is not None}
    assert len(learned) == len({case for case, _ in learned}) == 4


def test_prepared_slices_follow_the_files(studies, tmp_path):
    """A resubmitted label replaces the prepared slices; the old ones are removed."""
    cases = [case for case in find_cases(studies) if case.label]
    window = Window("percentile", 0.5, 99.5)
    before = prepare(cases, LABELS, window, 1, 64, tmp_path / "slices")
    count = len(list((tmp_path / "slices").iterdir()))
    label = cases[0].label
    label.write_bytes(cases[1].label.read_bytes())
    after = prepare(cases, LABELS, window, 1, 64, tmp_path / "slices")
    assert not np.array_equal(before[0].labels, after[0].labels)
    assert np.array_equal(after[0].labels, after[1].labels)
    assert len(list((tmp_path / "slices").iterdir())) == count


# ---- training


def test_training_learns_publishes_and_reports(studies):
    records = []
    project = Project(studies)
    result = train(find_cases(studies), LABELS, settings_for(60), project, records.append)
    assert result.published
    assert project.published() == result.model
    info = read_info(result.model)
    assert info.trained
    assert len(info.training["cases"]) == 4
    assert len(info.training["held_out"]) == 1
    assert [r["epoch"] for r in records] == sorted(r["epoch"] for r in records)
    assert records[0]["state"] == "running"
    assert project.status()["state"] == "done"
    assert project.status()["best_metric"] == pytest.approx(result.interval.mean)
    losses = [r["loss"] for r in info.training["rounds"]]
    assert losses[-1] < 0.8 * losses[0]
    model = AdaptedModel.load(result.model)
    mask = segment(model, read_volume(studies / "case_0.nii.gz"))
    assert mask.shape == (36, 30, 6)
    assert set(np.unique(mask)) <= {0, 1, 2}


def test_checks_beyond_their_share_of_the_time_are_left_out_except_the_last(studies, monkeypatch):
    monkeypatch.setattr("samadapt.training.loop.VALIDATION_SHARE", 0.0)
    result = train(find_cases(studies), LABELS, settings_for(20), Project(studies))
    checked = [bool(r["dice"]) for r in read_info(result.model).training["rounds"]]
    assert len(checked) > 1
    assert checked == [False] * (len(checked) - 1) + [True]


def test_an_untrained_model_finds_nothing(studies):
    from samadapt import recipes

    model = recipes.build("lora", LABELS, BACKBONES["per_head"]())
    assert not segment(model, read_volume(studies / "case_0.nii.gz")).any()


def test_a_label_that_is_submitted_again_meanwhile_is_measured_as_it_was(studies, monkeypatch):
    """By another viewer, which numbers the segments the other way round and writes another file type."""
    label = studies / "labels" / "final" / "case_3.nii.gz"
    held_out = next(case for case in find_cases(studies) if case.id == "case_3")
    truth, measured = read_case(held_out, LABELS)[1], []

    def submit(record):
        if record.get("step") and label.is_file():
            swapped = np.array([0, 2, 1], np.uint8)[truth]
            nib.save(nib.Nifti1Image(swapped, nib.load(label).affine), label.with_name("case_3.nii"))
            label.unlink()

    monkeypatch.setattr(
        "samadapt.training.gate.read_case", lambda *args: measured.append(read_case(*args)) or measured[-1]
    )
    train(find_cases(studies), LABELS, settings_for(2), Project(studies), submit)
    assert not label.exists()
    assert len(measured) > 1
    assert all(np.array_equal(mask, truth) for _, mask, _ in measured)
    train(find_cases(studies), LABELS, settings_for(1), Project(studies))
    kept = [path.name for path in (studies / ".samadapt" / "training" / "labels").iterdir()]
    assert sorted(kept) == [f"case_{n}.nii{'' if n == 3 else '.gz'}" for n in range(5)]


def test_a_label_that_goes_as_a_training_begins_is_told(studies):
    cases = find_cases(studies)
    cases[1].label.unlink()
    with pytest.raises(StateError, match=r"label of case_1 was replaced.*Train again"):
        train(cases, LABELS, settings_for(1), Project(studies))


def test_a_worse_candidate_is_not_published(studies, monkeypatch):
    project = Project(studies)
    first = train(find_cases(studies), LABELS, settings_for(40), project)
    scores = iter([{"case_3": {"bright": 0.2, "dark": 0.2}}, {"case_3": {"bright": 0.5, "dark": 0.5}}])
    for module in ("run", "gate"):
        monkeypatch.setattr(f"samadapt.training.{module}.measure_cases", lambda *args: (next(scores), {}))
    second = train(find_cases(studies), LABELS, settings_for(2), project)
    assert not second.published
    assert "worse: held-out Dice 0.200, v0001 has 0.500 on the same 1 case" in second.reason
    assert project.published() == first.model
    assert second.model.is_file()
    assert project.status()["refused"] == second.reason
    refused = Versions(project).get("v0002")
    assert (refused.verdict, refused.reason) == ("refused", second.reason)
    assert refused.manifest["parent"] == "v0001"
    assert refused.manifest["verdict"]["current"] == "v0001"


@pytest.mark.parametrize("adapted", [0.3, 0.9])
def test_whoever_follows_clicks_better_answers_them(studies, monkeypatch, adapted):
    """The trained model is the one that has seen a window; the plain one always reaches 0.6."""

    def click(model, volume, truth, axis, index, clicks, left_out):
        assert truth.any()
        assert not left_out.any()
        assert truth.take(index, axis).sum() == max(truth.sum(axis=tuple({0, 1, 2} - {axis})))
        return [adapted if model.info.trained else 0.6]

    monkeypatch.setattr("samadapt.training.gate.simulate_clicks", click)
    info = read_info(train(find_cases(studies), LABELS, settings_for(4), Project(studies)).model)
    assert info.answers_prompts == (adapted > 0.6)
    assert info.training["one_click_dice"] == {"adapted": adapted, "plain": 0.6, "objects": 2}


@pytest.fixture
def own_weights(tmp_path):
    path = tmp_path / "own.pth"
    path.write_bytes(b"weights of a hospital's own")
    return path


def test_a_second_training_on_own_weights_is_compared_with_the_first(studies, own_weights):
    config = dataclasses.replace(settings_for(4), weights=own_weights)
    first, second = (train(find_cases(studies), LABELS, config, Project(studies)) for _ in range(2))
    assert f"{first.model.stem} has" in second.reason


def test_a_training_on_other_weights_starts_anew_and_is_compared(studies, own_weights, monkeypatch):
    """An adapter belongs to the base that it was trained on."""
    first = train(find_cases(studies), LABELS, settings_for(4), Project(studies))
    started = []
    load = AdaptedModel.load_trained
    monkeypatch.setattr(AdaptedModel, "load_trained", lambda self, path: started.append(path) or load(self, path))
    config = dataclasses.replace(settings_for(4), weights=own_weights)
    second = train(find_cases(studies), LABELS, config, Project(studies))
    assert started[0] != first.model
    assert f"{first.model.stem} has" in second.reason


def test_a_model_whose_base_is_gone_gives_way(studies, own_weights):
    config = dataclasses.replace(settings_for(4), weights=own_weights)
    train(find_cases(studies), LABELS, config, Project(studies))
    second = train(find_cases(studies), LABELS, settings_for(4), Project(studies))
    assert second.published
    assert "base weights" in second.reason


def test_what_did_not_fit_is_told_at_the_end(studies):
    """The label of case_2 has a structure that nobody asked for; nothing of ``dark`` is there to be found."""
    cases = find_cases(studies)
    cases[2] = dataclasses.replace(cases[2], values={1: "bright", 2: "spleen"})
    result = train(cases, LabelMap(("bright", "dark", "liver")), settings_for(3), Project(studies))
    remarks = "\n".join(result.remarks)
    assert "case_2" in remarks
    assert "'spleen'" in remarks
    assert Project(studies).status()["remarks"] == result.remarks


def test_nothing_labelled_is_refused(studies):
    cases = [Case(case.id, case.image) for case in find_cases(studies)]
    with pytest.raises(StateError, match="Submit"):
        train(cases, LABELS, settings_for(2), Project(studies))
    assert Project(studies).status()["state"] == "failed"


def test_labels_that_nobody_used_are_refused(studies):
    cases = [Case(c.id, c.image, c.label, {1: "spleen", 2: "liver"}) for c in find_cases(studies)]
    with pytest.raises(StateError, match="bright, dark"):
        train(cases, LABELS, settings_for(2), Project(studies))


def spawn(studies: Path, steps: int) -> subprocess.Popen:
    """A training in a process of its own, to be killed."""
    program = f"""
import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent / "lib")!r}]
import torch; torch.set_num_threads(1)
import samadapt.backbones as b
from tiny import BACKBONES
def load(name, weights=None, image_size=None):
    backbone = BACKBONES["per_head"](); backbone.weights_sha256 = "0" * 64; return backbone
b.load = load
from pathlib import Path
from samadapt.config import AppConfig
from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap
from samadapt.project import Project
from samadapt.training import train
conf = {{"max_steps": "{steps}", "max_train_minutes": "5", "image_size": "64"}}
studies = Path({str(studies)!r})
print(train(find_cases(studies), LabelMap(("bright", "dark")), AppConfig.from_strings(conf), Project(studies)).reason)
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def labels_of(studies: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (studies / "labels" / "final").iterdir()}


def test_killed_at_five_random_moments_it_resumes_and_ends_with_a_model_that_loads(studies):
    project, labels = Project(studies), labels_of(studies)
    moments = random.Random(0)
    steps_seen = []
    for _ in range(5):
        process = spawn(studies, steps=400)
        deadline = time.monotonic() + 120
        while project.status().get("step") is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        status = project.status()
        assert status["state"] in ("interrupted", "done")
        steps_seen.append(status.get("step") or 0)
        assert labels_of(studies) == labels
        if published := project.published():
            AdaptedModel.load(published)
    process = spawn(studies, steps=400)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-2000:]
    assert "published" in out
    AdaptedModel.load(project.published())
    assert labels_of(studies) == labels
    leftovers = [path.name for path in project.root.rglob("*") if ".tmp." in path.name]
    assert leftovers == [] or all(name.startswith(".") for name in leftovers)


def test_a_training_that_ends_early_says_why(studies, monkeypatch):
    monkeypatch.setattr("samadapt.training.loop.PATIENCE", 1)
    monkeypatch.setattr(Trainer, "_validate", lambda trainer: {"bright": 0.5})
    result = train(find_cases(studies), LABELS, settings_for(200), Project(studies))
    assert result.steps < 200
    assert any("before its time was up" in remark for remark in result.remarks)


def test_a_resumed_training_goes_on_where_it_was(studies, monkeypatch):
    monkeypatch.setattr("samadapt.training.loop.PATIENCE", 100)  # or phantoms this easy end it early
    project = Project(studies)
    process = spawn(studies, steps=200)
    checkpoint = project.training / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    from samadapt.training.checkpoint import peek

    done = peek(checkpoint)["step"]
    assert 0 < done < 200
    records = []
    train(find_cases(studies), LABELS, settings_for(210), project, records.append)  # the budget may have changed
    steps = [r["step"] for r in records if r.get("step") is not None]
    assert steps[0] >= done
    assert steps[-1] == 210
    assert any(f"went on from step {done}" in r["message"] for r in records)


class Killed(BaseException):
    pass


def cut_short(record):
    if record["epoch"] >= 3:
        raise Killed


def test_a_training_does_not_go_on_from_a_version_that_was_rolled_back(studies):
    cases, project = find_cases(studies), Project(studies)
    first = train(cases, LABELS, settings_for(2), project)
    second = project.models / "v0002.safetensors"
    second.write_bytes(first.model.read_bytes())
    Versions(project).promote("v0002", "somebody", AppConfig())
    with pytest.raises(Killed):
        train(cases, LABELS, settings_for(20), project, cut_short)
    Versions(project).rollback("somebody", AppConfig())
    result = train(cases, LABELS, settings_for(2), project)
    assert any("another model is in service" in remark for remark in result.remarks)
    manifest = read_info(result.model).training
    assert (manifest["parent"], manifest["steps"]) == ("v0001", 2)


def test_a_resumed_training_keeps_the_statistics_of_norms(studies, monkeypatch):
    """SAM-LST's published form has BatchNorm: its running statistics are as much a result as its weights."""
    model = recipes.build("sam_lst", LABELS, BACKBONES["per_head"](), side=Ladder(reference=True))
    buffers, parameters = model.learned_buffers(), model.trainable()
    assert any("running_mean" in name for name in buffers)
    for buffer in buffers.values():
        buffer += 3
    file, optimizer = studies / "checkpoint.safetensors", torch.optim.AdamW(parameters.values())
    checkpoint.save(file, parameters, buffers, optimizer, {})
    other = recipes.build("sam_lst", LABELS, BACKBONES["per_head"](), side=Ladder(reference=True))
    checkpoint.restore(file, other.trainable(), other.learned_buffers(), optimizer)
    assert all(torch.equal(buffer, other.learned_buffers()[name]) for name, buffer in buffers.items())


def test_an_unfinished_training_that_is_given_up_is_told(studies, monkeypatch):
    project = Project(studies)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "forget", lambda trainer: None)  # as if it had been killed just before its end
        train(find_cases(studies), LABELS, settings_for(3), project)
    other = dataclasses.replace(settings_for(2), recipe="lora")
    assert any(
        "training of 3 steps is given up" in remark
        for remark in train(find_cases(studies), LABELS, other, project).remarks
    )
    assert not any("given up" in remark for remark in train(find_cases(studies), LABELS, other, project).remarks)


def test_a_checkpoint_of_another_training_is_not_used(studies):
    project = Project(studies)
    project.training.mkdir(parents=True)
    (project.training / "checkpoint.safetensors").write_bytes(b"rubbish")
    assert train(find_cases(studies), LABELS, settings_for(2), project).steps == 2


def test_status_of_a_process_that_is_gone_is_interrupted(tmp_path):
    project = Project(tmp_path)
    project.write_status(state="running", epoch=3)
    assert project.status()["state"] == "running"
    path = project.training / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": 2**22 + 1}))
    assert project.status()["state"] == "interrupted"
