"""What may replace a published model: figures on the same held-out cases, or cross-validation where there are none."""

from __future__ import annotations

import dataclasses
import math

import nibabel as nib
import numpy as np
import pytest

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import Case, find_cases
from samadapt.data.coverage import Coverage
from samadapt.data.labels import LabelMap
from samadapt.data.slices import take_slice
from samadapt.data.window import Window
from samadapt.errors import StateError
from samadapt.files import sha256_of
from samadapt.model import AdaptedModel, read_info
from samadapt.project import Project
from samadapt.training import crossval, gate, train
from samadapt.training.crossval import CrossValidation, make_folds
from samadapt.training.gate import Measured, judge, paired
from samadapt.training.slices import prepare
from samadapt.versions import Versions
from tiny import BACKBONES, write_studies

LABELS = LabelMap(("bright", "dark"))
NAN = math.nan

pytestmark = pytest.mark.usefixtures("tiny_backbone")


@pytest.fixture
def studies(tmp_path):
    write_studies(tmp_path / "studies", 5)
    return tmp_path / "studies"


def settings_for(steps: int, **others) -> AppConfig:
    texts = {"max_steps": str(steps), "max_train_minutes": "5", "image_size": "64"}
    return AppConfig.from_strings(texts | others)


def poison(case: Case) -> None:
    """Bright for dark and the reverse, and all at another place."""
    image = nib.load(case.label)
    label = np.asarray(image.dataobj)
    wrong = np.roll(np.array([0, 2, 1], np.uint8)[label], 12, axis=1)
    nib.save(nib.Nifti1Image(wrong, image.affine), case.label)


# ---- figures


def test_pairs_are_compared_class_by_class():
    own = {"a": {"x": 0.8, "y": NAN}, "b": {"x": NAN, "y": NAN}, "c": {"x": 0.5, "y": 0.0}}
    other = {"a": {"x": 0.6, "y": NAN}, "b": {"x": NAN, "y": NAN}, "c": {"x": 0.7, "y": NAN}}
    assert paired(own, other) == [(0.8, 0.6), (0.25, 0.85)]  # y is not in c: nothing found is right there


@pytest.fixture
def published(tmp_path):
    """A project with v0001 in service, whose manifest is as given."""

    def make(**training) -> Project:
        backbone = BACKBONES["per_head"]()
        backbone.weights_sha256 = "0" * 64
        model = recipes.build("lora_late", LABELS, backbone)
        model.describe(trained=True, training=training)
        project = Project(tmp_path / "project")
        model.save(project.next_model())
        assert Versions(project).publish(project.models / "v0001.safetensors", "", "one", None)
        return project

    return make


HELD_OUT = [Case("a", None), Case("b", None)]


@pytest.mark.parametrize(("better", "may"), [(0.1, True), (0.0, True), (-0.001, False)])
def test_equal_may_and_worse_may_not_and_both_figures_are_told(published, monkeypatch, better, may):
    old = {"a": {"bright": 0.5, "dark": 0.5}, "b": {"bright": 0.7, "dark": NAN}, "c": {"bright": 0.6, "dark": 0.6}}
    new = {case: {name: value + better for name, value in scores.items()} for case, scores in old.items()}
    monkeypatch.setattr(gate, "measure_cases", lambda *args: (old, {}))
    verdict = judge(Measured(new), [*HELD_OUT, Case("c", None)], LABELS, AppConfig(), published())
    assert verdict.published is may
    assert verdict.current == "v0001"
    assert f"held-out Dice {0.6 + better:.3f}, v0001 has 0.600 on the same 3 cases" in verdict.reason
    assert f"difference {better:+.3f}, 95 % interval {better:+.3f} to {better:+.3f}" in verdict.reason
    assert verdict.figures["held_out"]["difference"]["mean"] == pytest.approx(better)


@pytest.mark.parametrize(
    ("bright", "dark", "may"),
    [
        ((0.8, 0.3), (0.0, 1.0), False),  # the mean rises, but who labels "bright" would have to begin anew
        ((0.8, 0.3), (0.0, NAN), False),  # "dark" is nowhere: that it is no longer found there does not outweigh it
        ((0.8, 0.65), (0.3, 0.9), True),
        ((0.8, 0.8), (0.3, 0.3), True),
        ((NAN, NAN), (0.3, 0.3), True),
    ],
)
def test_one_structure_is_not_given_up_for_a_better_mean(published, monkeypatch, bright, dark, may):
    old, new = ({"a": {"bright": b, "dark": d}} for b, d in zip(bright, dark, strict=True))
    monkeypatch.setattr(gate, "measure_cases", lambda *args: (old, {}))
    verdict = judge(Measured(new), HELD_OUT[:1], LABELS, AppConfig(), published())
    assert verdict.published is may
    if not may:
        assert "bright (0.800 by v0001, 0.300 now)" in verdict.reason


def test_too_few_cases_are_said_to_give_no_interval(published, monkeypatch):
    monkeypatch.setattr(gate, "measure_cases", lambda *args: ({"a": {"bright": 0.5, "dark": 0.5}}, {}))
    new = Measured({"a": {"bright": 0.4, "dark": 0.4}})
    assert (
        "difference -0.100; fewer than 3 cases give no interval"
        in judge(new, HELD_OUT[:1], LABELS, AppConfig(), published()).reason
    )


def crossed(dice: float, cases: int = 2) -> CrossValidation:
    return CrossValidation(cases, {str(n): {"bright": dice} for n in range(max(2, cases))}, 18.0)


def kept(figure: CrossValidation) -> dict:
    return {"cross_validation": {**dataclasses.asdict(figure), "dice": figure.dice, "method": figure.method}}


@pytest.mark.parametrize(
    ("before", "after", "may"),
    [
        (crossed(0.50, 2), crossed(0.40, 3), True),  # a third case may be harder
        (crossed(0.50, 2), crossed(0.27, 3), False),
        (crossed(0.06, 2), crossed(0.02, 3), True),  # nothing can be said of so little
        (crossed(0.60, 1), crossed(0.30, 2), True),  # another patient is harder than the other half of the same one
        (crossed(0.60, 1), crossed(0.03, 2), False),
        (crossed(0.50, 2), None, True),
    ],
)
def test_without_held_out_cases_labels_that_teach_clearly_less_are_refused(published, before, after, may):
    verdict = judge(Measured({}, after), [], LABELS, AppConfig(), published(**kept(before)))
    assert verdict.published is may
    if after is not None:
        assert f"{after.dice:.3f}, cross-validated over" in verdict.reason
        assert f"v0001 has {before.dice:.3f}" in verdict.reason
    if not may:
        assert "look for a wrong label" in verdict.reason


def test_a_name_more_does_not_end_the_comparison_of_what_both_know(published):
    own = CrossValidation(3, {str(n): {"bright": 0.1, "new": 0.9} for n in range(3)}, 18.0)
    verdict = judge(Measured({}, own), [], LabelMap(("bright", "new")), AppConfig(), published(**kept(crossed(0.9, 3))))
    assert not verdict.published
    assert "Dice 0.100, cross-validated over 3 cases" in verdict.reason
    assert "v0001 has 0.900" in verdict.reason


def test_a_published_model_without_a_figure_gives_way_and_this_is_said(published):
    verdict = judge(Measured({}, crossed(0.4)), [], LABELS, AppConfig(), published())
    assert verdict.published
    assert "v0001 has no cross-validated figure" in verdict.reason


BOTH = {"a": {"bright": 0.5, "dark": 0.5}, "b": {"bright": 0.7, "dark": 0.7}}
"""Of the published model, which does not know "new"."""


def with_new(change: float, new: float, seen: float) -> tuple[dict, dict]:
    """A candidate's figures, those of ``BOTH`` changed, and the other's; case a shows "new" where ``seen`` is 0."""
    return {case: {**{n: s + change for n, s in scores.items()}, "new": new} for case, scores in BOTH.items()}, {
        case: {**scores, "new": seen if case == "a" else NAN} for case, scores in BOTH.items()
    }


@pytest.mark.parametrize(
    ("change", "new", "seen", "may"),
    [
        (-0.1, NAN, NAN, False),  # a name that nobody meant must not let a worse model pass
        (-0.1, 0.0, NAN, False),
        (0.0, 0.0, NAN, True),  # what it finds of "new" where nobody had drawn it then says nothing
        (-0.1, 0.8, 0.0, False),  # what it finds of "new" pays for nothing that it has lost
        (0.0, 0.8, 0.0, True),
    ],
)
def test_a_model_of_other_structures_is_compared_too(published, monkeypatch, change, new, seen, may):
    own, other = with_new(change, new, seen)
    monkeypatch.setattr(gate, "measure_cases", lambda *args: (other, {}))
    verdict = judge(Measured(own), HELD_OUT, LabelMap(("bright", "dark", "new")), AppConfig(), published())
    assert verdict.published is may
    assert "v0001 does not know new" in verdict.reason


def judged(monkeypatch, project, labels, own, other) -> gate.Verdict:
    """On cases of these names, whose figures are given."""
    monkeypatch.setattr(gate, "measure_cases", lambda *args: (other, {}))
    return judge(Measured(own), [Case(name, None) for name in own], LabelMap(labels), AppConfig(), project)


def test_a_label_with_a_mistyped_name_lets_no_worse_model_pass(published, monkeypatch):
    """In case a "brigth" is drawn where the published model, rightly, finds bright, and the candidate nothing."""
    names = ("bright", "brigth")
    own = {"a": {"bright": NAN, "brigth": 0.0}, "b": {"bright": 0.72, "brigth": NAN}}
    other = {"a": {"bright": 0.0, "brigth": 0.0}, "b": {"bright": 0.90, "brigth": NAN}}
    project = published()
    verdict = judged(monkeypatch, project, names, own, other)
    assert not verdict.published
    assert "held-out Dice 0.720, v0001 has 0.900 on the same 1 case" in verdict.reason
    own, other = ({case: {"bright": scores["bright"]} for case, scores in one.items()} for one in (own, other))
    assert not judged(monkeypatch, project, ("bright",), own, other).published


def test_where_all_names_are_others_a_person_decides(published, monkeypatch):
    own, other = {"a": {"bright": NAN, "brigth": 0.9}}, {"a": {"bright": 0.0, "brigth": 0.0}}
    project = published()
    verdict = judged(monkeypatch, project, ("bright", "brigth"), own, other)
    assert not verdict.published
    assert "the held-out cases show brigth, which v0001 does not know (it knows bright, dark)" in verdict.reason
    assert "`samadapt models promote`" in verdict.reason
    verdict = judge(Measured({}, crossed(0.9)), [], LabelMap(("heart",)), AppConfig(), project)
    assert not verdict.published
    assert "heart" in verdict.reason
    assert "`samadapt models promote`" in verdict.reason


def test_what_is_found_where_nothing_is_counts_against_a_model(published, monkeypatch):
    """A healthy patient is held out beside a sick one."""
    other = {"sick": {"bright": 0.6, "dark": NAN}, "healthy": {"bright": NAN, "dark": NAN}}
    own = {"sick": {"bright": 0.7, "dark": NAN}, "healthy": {"bright": 0.0, "dark": NAN}}
    project = published()
    verdict = judged(monkeypatch, project, LABELS.names, own, other)
    assert not verdict.published
    assert "where there are none" in verdict.reason
    assert judged(monkeypatch, project, LABELS.names, other, own | {"sick": other["sick"]}).published


@pytest.mark.parametrize("held_out", [HELD_OUT, []])
def test_a_structure_that_no_label_shows_any_more_is_not_lost_without_a_person(published, monkeypatch, held_out):
    """All labels of "dark" were submitted again under another name, and the rest got better."""
    monkeypatch.setattr(gate, "measure_cases", lambda *args: (BOTH, {}))
    better = {case: {"bright": 0.9, "dark": NAN} for case in BOTH}
    project = published(drawn=["bright", "dark"], **kept(crossed(0.5)))
    for drawn, may in {("bright", "drak"): False, ("bright", "Dark"): True}.items():
        measured = Measured(better, crossed(0.9), drawn=drawn)
        verdict = judge(measured, held_out, LabelMap(("bright", "dark", "drak")), AppConfig(), project)
        assert verdict.published is may
        if not may:
            assert "no label shows dark any more, which v0001 has learned" in verdict.reason
            assert "`samadapt models promote`" in verdict.reason


@pytest.fixture
def served(published, tmp_path):
    """A project whose versions, one after the other in service, noted these figures of case a."""
    label = tmp_path / "label.nii.gz"
    label.write_bytes(b"a label")

    def make(*figures: tuple[float, float]) -> tuple[Project, Case]:
        notes = [noted(label, dict(zip(LABELS.names, one, strict=True))) for one in figures]
        project = published(**notes[0])
        for number, note in enumerate(notes[1:], start=1):
            add_version(project, f"training {number}", note)
        return project, Case("a", None, label)

    return make


def noted(label, scores) -> dict:
    return {"held_out_by_case": {"a": scores}, "label_sha256": {"a": sha256_of(label)}}


def add_version(project: Project, name: str, note: dict) -> None:
    model = AdaptedModel.load(project.published())
    model.describe(training=note)
    file, before = project.next_model(), project.published().stem
    model.save(file)
    assert Versions(project).publish(file, "", name, before)


LATER = {"a": {"bright": 0.6, "dark": 0.5}}
NOW = {"a": {"bright": 0.5, "dark": 0.7}}


def drifted(monkeypatch, project, case) -> gate.Verdict:
    monkeypatch.setattr(gate, "measure_cases", lambda *args: (LATER, {}))
    return judge(Measured(NOW), [case], LABELS, AppConfig(), project)


def test_a_structure_is_not_given_up_step_by_step(served, monkeypatch):
    project, case = served((0.75, 0.3), (0.6, 0.5))
    verdict = drifted(monkeypatch, project, case)
    assert not verdict.published
    assert "bright (0.750 by v0001, 0.500 now)" in verdict.reason
    assert verdict.current == "v0002"


def test_a_label_that_was_drawn_anew_is_compared_with_the_present_model_alone(served, monkeypatch):
    project, case = served((0.75, 0.3), (0.6, 0.5))
    case.label.write_bytes(b"another label")
    assert drifted(monkeypatch, project, case).published


@pytest.mark.parametrize(("then", "may"), [((0.85, 0.9), False), ((0.7, 0.7), True)])
def test_where_the_labels_to_judge_by_were_exchanged_a_person_decides(served, monkeypatch, then, may):
    """A round of shuffled labels may hit the held-out cases, too; the candidate has learned to agree with them."""
    project, case = served(then)
    assert drifted(monkeypatch, project, case).published  # by the same labels
    case.label.write_bytes(b"another label")
    verdict = drifted(monkeypatch, project, case)
    assert verdict.published == may
    if not may:
        assert all(word in verdict.reason for word in ("have changed", "a (0.875 then, 0.550 now)", "promote"))


def test_who_promotes_a_version_has_weighed_what_it_loses(served, monkeypatch):
    project, case = served((0.75, 0.3), (0.6, 0.5), (0.55, 0.5))
    Versions(project).promote("v0002", "somebody", AppConfig())
    assert drifted(monkeypatch, project, case).published


def test_a_model_is_measured_by_name_whatever_its_own_numbers(studies):
    cases = [dataclasses.replace(case, values={1: "bright", 2: "dark"}) for case in find_cases(studies)]
    model = AdaptedModel.load(train(cases, LABELS, settings_for(1), Project(studies)).model)
    in_order, _ = gate.measure_cases(model, cases[:2], LABELS)
    otherwise, _ = gate.measure_cases(model, cases[:2], LabelMap(("new", "dark", "Bright")))
    for case, scores in in_order.items():
        assert otherwise[case]["dark"] == pytest.approx(scores["dark"], nan_ok=True)
        assert otherwise[case]["Bright"] == pytest.approx(scores["bright"], nan_ok=True)
        assert math.isnan(otherwise[case]["new"])


def test_what_is_expected_of_a_whole_volume_is_not_held_against_a_part_of_it(studies):
    case, other = find_cases(studies)[:2]
    model = AdaptedModel.load(train([case], LABELS, settings_for(1), Project(studies)).model)
    partly = dataclasses.replace(case, coverage=Coverage(slices=(1,)))
    _, expected = gate.measure_cases(model, [partly, other], LABELS)
    whole = gate.measure_cases(model, [other], LABELS)[1][other.id]
    assert all(math.isnan(value) for value in expected[case.id].values())
    assert expected[other.id] == pytest.approx(whole, nan_ok=True)
    assert not all(math.isnan(value) for value in whole.values())


def damage(model) -> None:
    model.write_bytes(b"x" * 100)


@pytest.mark.parametrize("spoil", [damage, lambda model: model.unlink()], ids=["damaged", "gone"])
def test_a_lost_model_is_replaced_only_by_one_that_is_no_worse_than_the_one_before(studies, spoil):
    cases, project = find_cases(studies), Project(studies)
    good = train(cases, LABELS, settings_for(40), project)
    again = project.models / "v0002.safetensors"
    again.write_bytes(good.model.read_bytes())
    Versions(project).promote("v0002", "test", AppConfig())
    spoil(again)
    for case in (case for case in cases if case.id != "case_3"):
        poison(case)
    refused = train(cases, LABELS, settings_for(8, recipe="lora"), project)
    assert not refused.published
    assert "v0001 has" in refused.reason


def test_a_training_replaces_a_damaged_model_that_nothing_was_before(studies):
    cases, project = find_cases(studies), Project(studies)
    damage(train(cases, LABELS, settings_for(1), project).model)
    result = train(cases, LABELS, settings_for(1), project)
    assert result.published
    assert "v0001 is damaged" in result.reason
    assert project.published() == result.model


# ---- clicks


def test_clicks_are_not_measured_where_nobody_has_labelled(studies, monkeypatch):
    """Half of each object is unlabelled; a model that finds all of it has found just what is labelled."""
    cases = [dataclasses.replace(case, values={1: "bright", 2: "ignore"}) for case in find_cases(studies)[:2]]
    whole = {}
    for case in cases:
        image = nib.load(case.label)
        label = np.asarray(image.dataobj).copy()
        whole[case.image] = label == 1
        label[(label == 1) & (np.cumsum(label == 1, axis=0) > 5)] = 2
        nib.save(nib.Nifti1Image(label, image.affine), case.label)

    def find_all(model, volume, axis, index, prompts, cache=None):
        return take_slice(whole[volume.path], axis, index)

    monkeypatch.setattr("samadapt.evaluation.click_simulation.segment_slice", find_all)
    model = recipes.build("lora_late", LABELS, BACKBONES["per_head"]())
    scores = gate.compare_clicks(model, cases, LABELS, AppConfig(), lambda done, total: None)
    assert (scores.adapted, scores.plain, scores.objects) == (1.0, 1.0, 2)


# ---- folds


def prepared_cases(studies, tmp_path, count):
    cases = find_cases(studies)[:count]
    return cases, prepare(cases, LABELS, Window("percentile", 0.5, 99.5), 1, 64, tmp_path / "slices")


@pytest.mark.parametrize(("count", "folds"), [(1, 2), (2, 2), (3, 3), (5, 3)])
def test_no_slice_is_learned_from_and_measured_on_in_one_fold(studies, tmp_path, count, folds):
    cases, prepared = prepared_cases(studies, tmp_path, count)
    made = make_folds(prepared, cases)
    assert len(made) == folds
    measured = []
    for fold in made:
        learned = {(case.id, index) for case in fold.learning for index in case.learned_from}
        drawn = {(case.id, index) for case in fold.learning for indices in case.slices_of.values() for index in indices}
        checked = {(case.id, index) for case in fold.checking for index in case.learned_from}
        assert learned
        assert drawn <= learned
        assert not learned & checked
        measured += checked
    assert sorted(measured) == [(case.id, index) for case in prepared for index in range(len(case))]


def test_a_patient_is_left_out_with_all_cases(studies, tmp_path):
    cases, prepared = prepared_cases(studies, tmp_path, 4)
    cases = [dataclasses.replace(case, patient=f"p{n // 2}") for n, case in enumerate(cases)]
    assert [fold.name for fold in make_folds(prepared, cases)] == ["case_0, case_1", "case_2, case_3"]


# ---- through a training


def test_a_training_whose_labels_teach_clearly_less_is_refused(studies, monkeypatch):
    """From the figures of the folds (here given) to what people are shown."""
    cases, project = find_cases(studies), Project(studies)
    monkeypatch.setattr(crossval, "cross_validate", lambda folds, count, *rest: crossed(1.0 / count, count))
    first = train(cases[:2], LABELS, settings_for(2), project)
    assert "Dice 0.500, cross-validated over 2 cases, with a tenth of the time each: a lower bound" in first.remarks
    manifest = read_info(first.model).training
    assert manifest["cross_validation"]["dice"] == 0.5
    assert set(manifest["label_sha256"]) == {"case_0", "case_1"}
    second = train(cases[:3], LABELS, settings_for(2), project)
    assert not second.published
    assert "look for a wrong label" in second.reason
    assert project.published() == first.model
    assert project.status()["refused"] == project.status()["message"] == second.reason
    assert [version.verdict for version in Versions(project).all()] == ["published", "refused"]


def test_a_training_after_all_labels_of_a_structure_were_renamed_is_refused(studies):
    cases, project = find_cases(studies)[:2], Project(studies)
    first = train(cases, LABELS, settings_for(1, max_train_minutes="1"), project)
    assert read_info(first.model).training["drawn"] == ["bright", "dark"]
    renamed = [dataclasses.replace(case, values={1: "bright", 2: "drak"}) for case in cases]
    settings = settings_for(1, max_train_minutes="1")
    second = train(renamed, LabelMap(("bright", "dark", "drak")), settings, project)
    assert "no label shows dark any more, which v0001 has learned" in second.reason
    assert project.published() == first.model
    Versions(project).promote(second.model.stem, "somebody", settings)
    assert train(renamed, LabelMap(("bright", "dark", "drak")), settings, project).published  # a person has decided


def test_short_trainings_are_not_cross_validated_and_this_is_said(studies):
    result = train(find_cases(studies)[:1], LABELS, settings_for(1, max_train_minutes="1"), Project(studies))
    assert result.cross_validation is None
    assert "not cross-validated: the training is shorter than 120 s" in "\n".join(result.remarks)


def test_folds_measure_what_an_untrained_model_learns(studies):
    """The folds share the steps as documented, and leave nothing behind."""
    project = Project(studies)
    result = train(find_cases(studies)[:1], LABELS, settings_for(10), project)
    assert set(result.cross_validation.scores) == {"case_0, odd blocks of slices", "case_0, even blocks of slices"}
    assert 0 <= result.cross_validation.dice <= 1
    assert list((project.training / "fold").iterdir()) == []


def test_shuffled_labels_are_refused_on_the_held_out_case(studies):
    """From an untrained start: one that goes on from the published model would keep its best round."""
    cases, project = find_cases(studies), Project(studies)
    first = train(cases, LABELS, settings_for(40), project)
    for case in (case for case in cases if case.id != "case_3"):
        poison(case)
    second = train(cases, LABELS, settings_for(8, recipe="lora"), project)
    assert not second.published
    assert "not published, it is worse: held-out Dice" in second.reason
    assert project.published() == first.model


def test_held_out_cases_are_never_learned_from_even_if_nothing_else_is_labelled(studies):
    cases, project = find_cases(studies), Project(studies)
    project.root.mkdir(parents=True)
    project.ledger.write_text('{"case case_3": "held-out"}')
    with pytest.raises(StateError, match="held out"):
        train([case for case in cases if case.id == "case_3"], LABELS, settings_for(2), project)
