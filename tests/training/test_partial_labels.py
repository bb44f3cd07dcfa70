"""Labels of some slices, or of some classes: nothing else is learned from them or measured on them."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import find_cases
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.data.window import Window
from samadapt.errors import InputError, StateError
from samadapt.model import read_info
from samadapt.project import Project
from samadapt.training import gate, train
from samadapt.training.slices import SliceSampler, partly_labelled, prepare, read_case, unknown_classes
from samadapt.training.synthetic import SyntheticSlices
from tiny import BACKBONES, SIZE, write_studies

LABELS = LabelMap(("bright", "dark"))
WINDOW = Window("percentile", 0.5, 99.5)
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])
LABELLED = [0, 2, 3]
"""Of six slices; 1 to 4 show the structures."""

pytestmark = pytest.mark.usefixtures("tiny_backbone")


def submitted(folder, said, change=lambda mask: None, cases=5):
    """Studies as the server leaves them: ``said`` came with every label, whose mask was changed in place."""
    write_studies(folder, cases)
    names = [{"name": name, "idx": index} for name, index in LABELS.to_dict().items()]
    objects = {}
    for path in sorted((folder / "labels" / "final").iterdir()):
        mask = np.asarray(nib.load(path).dataobj).copy()
        change(mask)
        nib.save(nib.Nifti1Image(mask, AFFINE), path)
        final = {"ext": ".nii.gz", "info": {"label_info": names, **said}}
        objects[path.name[:-7]] = {"image": {"ext": ".nii.gz", "info": {}}, "labels": {"final": final}}
    (folder / "datastore_v2.json").write_text(json.dumps({"objects": objects}))
    return folder


def prepared_of(studies, folder, planes="acquisition"):
    return prepare(find_cases(studies), LABELS, WINDOW, 1, SIZE, folder, planes=planes)


def trained(studies, monkeypatch, **settings):
    """Parameters, result and file header after a few steps whose number and checks do not depend on the time."""
    monkeypatch.setattr("samadapt.training.loop.VALIDATION_SHARE", math.inf)
    values = {"max_steps": "6", "max_train_minutes": "60", "image_size": "64", **settings}
    result = train(find_cases(studies), LABELS, AppConfig.from_strings(values), Project(studies))
    return load_file(result.model), result, read_info(result.model)


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def scribble(mask):
    for n in set(range(6)) - set(LABELLED):
        mask[..., n] = 1
        mask[:10, :, n] = 2


def erase(mask):
    for n in set(range(6)) - set(LABELLED):
        mask[..., n] = 0


# Slices


def test_what_is_drawn_on_unlabelled_slices_has_no_effect_at_all(tmp_path, monkeypatch):
    """Not on one bit of the model, nor on its scores. Where these slices count, it has."""
    runs = {}
    for said in ({"labelled_slices": LABELLED}, {}):
        for change in (scribble, erase):
            folder = submitted(tmp_path / f"{change.__name__}{len(said)}", said, change)
            runs[change, len(said)] = trained(folder, monkeypatch)
    for n, equal in ((1, True), (0, False)):
        (one, first, about), (other, second, also) = runs[scribble, n], runs[erase, n]
        assert same(one, other) is equal
        if equal:
            assert first.dice == pytest.approx(second.dice, nan_ok=True, abs=0)
            assert [r["loss"] for r in about.training["rounds"]] == [r["loss"] for r in also.training["rounds"]]
            assert first.remarks == second.remarks
            assert any("5 of 5 labelled cases" in text and "15 of 30 slices" in text for text in first.remarks)


def test_an_ignored_segment_has_the_same_effect_as_slices_that_are_not_listed(tmp_path, monkeypatch):
    def ignore(mask):
        for n in set(range(6)) - set(LABELLED):
            mask[..., n] = 9

    names = [{"name": "bright", "idx": 1}, {"name": "dark", "idx": 2}, {"name": "Ignore", "idx": 9}]
    drawn = trained(submitted(tmp_path / "drawn", {"label_info": names}, ignore), monkeypatch)
    listed = trained(submitted(tmp_path / "listed", {"labelled_slices": LABELLED}, scribble), monkeypatch)
    assert same(drawn[0], listed[0])


def test_a_folder_of_labels_may_mean_that_empty_slices_are_unlabelled(tmp_path, monkeypatch):
    studies = tmp_path / "studies"
    write_studies(studies, 5)
    drawn = []
    load = SliceSampler.load
    monkeypatch.setattr(SliceSampler, "load", lambda self, draw: drawn.append(draw.index) or load(self, draw))
    trained(studies, monkeypatch, unlabelled_slices="ignore", max_steps="12")
    assert set(drawn) == {1, 2, 3, 4}
    drawn.clear()
    trained(studies, monkeypatch, max_steps="12")
    assert set(drawn) == {0, 1, 2, 3, 4, 5}


def test_prepared_slices_say_what_is_labelled(tmp_path):
    case = prepared_of(submitted(tmp_path / "studies", {"labelled_slices": LABELLED}, scribble, 1), tmp_path / "s")[0]
    assert list(case.learned_from) == LABELLED
    assert case.slices_of == {1: [2, 3], 2: [2, 3]}
    assert case.areas.keys() == {1, 2}
    height = round(SIZE * 30 / 36)  # the frame is square, the slice is not
    for index in range(6):
        content = case.label(index)[:height]
        assert bool((content == IGNORE).all()) is (index not in LABELLED)
        assert not case.label(index)[height + 1 :].any()


def test_planes_from_the_side_show_the_labelled_slices_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("samadapt.data.geometry.FEWEST_SLICES", 6)
    studies = submitted(tmp_path / "studies", {"labelled_slices": LABELLED}, scribble, 1)
    for path in studies.rglob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    first, *others = prepared_of(studies, tmp_path / "slices", planes="all")
    assert list(first.learned_from) == LABELLED
    assert len(others) == 2
    for case in others:
        assert list(case.learned_from) == list(range(len(case)))
        for index in range(len(case)):
            bands = case.label(index)[: SIZE * 6 // max(36, 30)]
            assert (bands == IGNORE).any(dim=1).sum() > 0
            assert ((bands == IGNORE).any(dim=1) == (bands[:, :32] == IGNORE).all(dim=1)).all()


def test_what_a_label_covers_is_part_of_what_is_prepared(tmp_path):
    """The same files with another statement are other slices."""
    studies = submitted(tmp_path / "studies", {}, cases=1)
    before = prepared_of(studies, tmp_path / "slices")[0]
    record = json.loads((studies / "datastore_v2.json").read_text())
    record["objects"]["case_0"]["labels"]["final"]["info"]["labelled_slices"] = LABELLED
    (studies / "datastore_v2.json").write_text(json.dumps(record))
    after = prepared_of(studies, tmp_path / "slices")[0]
    assert list(before.learned_from) == list(range(6))
    assert list(after.learned_from) == LABELLED
    assert after.view_key == before.view_key
    assert after.key != before.key
    assert partly_labelled([before]) == []


def test_a_case_without_a_labelled_slice_is_not_drawn_from(tmp_path):
    cases = prepared_of(submitted(tmp_path / "studies", {}, cases=2), tmp_path / "slices")
    cases[0] = dataclasses.replace(cases[0], learned_from=[], slices_of={}, areas={})
    sampler = SliceSampler(cases, SIZE, 4, seed=0)
    assert {draw.case.id for n in range(30) for draw in sampler.draws(n)} == {"case_1"}


def test_a_slice_that_is_not_there_names_the_case(tmp_path):
    studies = submitted(tmp_path / "studies", {"labelled_slices": [6]}, cases=1)
    with pytest.raises(InputError, match=r"case_0.*no slice 6"):
        read_case(find_cases(studies)[0], LABELS)


def test_nothing_labelled_at_all_is_refused(tmp_path, monkeypatch):
    def empty(mask):
        mask[:] = 0

    studies = submitted(tmp_path / "studies", {"labelled_slices": "nonempty"}, empty)
    with pytest.raises(StateError, match="bright, dark"):
        trained(studies, monkeypatch)


def test_augmented_labels_carry_what_is_not_labelled(tmp_path):
    def ignore(mask):
        mask[:12, :, 2] = 255

    studies = submitted(tmp_path / "studies", {"label_info": None}, ignore, 1)
    sampler = SliceSampler(prepared_of(studies, tmp_path / "slices"), SIZE, 16, seed=0)
    draws = [draw for n in range(10) for draw in sampler.draws(n) if draw.index == 2]
    labels = [sampler.load(draw)[1] for draw in draws]
    assert len(labels) > 5
    assert all(set(label.unique().tolist()) <= {0, 1, 2, IGNORE} for label in labels)
    assert all((label == IGNORE).sum() > 300 for label in labels)


# Synthesis


def test_synthetic_slices_are_not_made_on_unlabelled_ones(tmp_path):
    banks = []
    for change in (erase, scribble):
        folder = submitted(tmp_path / change.__name__, {"labelled_slices": LABELLED}, change, 3)
        banks.append(SyntheticSlices(prepared_of(folder, tmp_path / f"slices of {change.__name__}"), seed=0))
        assert {index for _, index in banks[-1].backgrounds} == {0}
        assert {index for _, index in banks[-1].exemplars} == {2, 3}
    for n in range(10):
        assert all(map(torch.equal, banks[0].pair(n), banks[1].pair(n)))
        assert set(banks[0].pair(n)[1].unique().tolist()) <= {0, 1, 2}


def test_synthetic_slices_know_what_their_background_knows(tmp_path):
    cases = prepared_of(submitted(tmp_path / "studies", {}, cases=3), tmp_path / "slices")
    cases[1] = dataclasses.replace(cases[1], unknown=(2,))
    bank = SyntheticSlices(cases, seed=0)
    partly = {(case.id, index) for case, index in bank.backgrounds if case.unknown}
    assert {case for case, _ in partly} == {"case_1"}
    assert {bank.unknown_on(n) for n in range(30)} == {(), (2,)}
    bank.backgrounds = [source for source in bank.backgrounds if source[0].unknown]
    assert {bank.unknown_on(n) for n in range(30)} == {(2,)}


# Classes


def forget_dark(mask):
    mask[mask == 2] = 0


def test_whether_a_class_that_was_not_looked_for_is_drawn_has_no_effect(tmp_path, monkeypatch):
    said = {"labelled_classes": ["bright"]}
    runs = [
        trained(submitted(tmp_path / f"{len(changes)}", said, *changes), monkeypatch)
        for changes in ((), (forget_dark,))
    ]
    assert same(runs[0][0], runs[1][0])
    for _, result, _ in runs:
        assert math.isnan(result.dice["dark"])
        assert not math.isnan(result.dice["bright"])
        assert any("5 cases do not speak of every structure" in remark for remark in result.remarks)


def test_an_unknown_class_is_not_taught_to_be_background(tmp_path, monkeypatch):
    """Three cases of five do not speak of ``dark``; the others show it."""
    runs = []
    for value in ("background", "ignore"):
        studies = submitted(tmp_path / value, {}, forget_dark)
        record = json.loads((studies / "datastore_v2.json").read_text())
        for n in range(3):
            record["objects"][f"case_{n}"]["labels"]["final"]["info"]["label_info"] = [{"name": "bright", "idx": 1}]
        (studies / "datastore_v2.json").write_text(json.dumps(record))
        runs.append(trained(studies, monkeypatch, absent_classes=value))
    assert not same(runs[0][0], runs[1][0])


def test_unknown_classes_of_a_batch(tmp_path):
    cases = prepared_of(submitted(tmp_path / "studies", {}, cases=2), tmp_path / "slices")
    draws = SliceSampler(cases, SIZE, 8, seed=0).draws(0)
    assert unknown_classes(draws, LABELS) is None
    cases[1] = dataclasses.replace(cases[1], unknown=(2,))
    draws = SliceSampler(cases, SIZE, 8, seed=0).draws(0)
    found = unknown_classes(draws, LABELS)
    assert found.tolist() == [[False, False, draw.case.id == "case_1"] for draw in draws]
    assert 0 < found[:, 2].sum() < 8


# Scores


def test_held_out_cases_count_where_they_are_labelled(tmp_path, monkeypatch):
    """A model that is right on labelled slices and wrong elsewhere is right."""
    studies = submitted(tmp_path / "studies", {"labelled_slices": LABELLED, "labelled_classes": ["bright"]}, cases=1)
    cases = find_cases(studies)
    model = recipes.build("lora", LABELS, BACKBONES["per_head"]())
    found = np.asarray(nib.load(cases[0].label).dataobj).copy()
    scribble(found)
    found[found == 2] = 0
    sure = SimpleNamespace(overlap=np.ones(2))
    monkeypatch.setattr(gate, "examine", lambda *args, **words: (found, sure))
    scores, _ = gate.measure_cases(model, cases, LABELS)
    assert scores[cases[0].id] == pytest.approx({"bright": 1.0, "dark": math.nan}, nan_ok=True)
    whole = [dataclasses.replace(case, coverage=type(case.coverage)()) for case in cases]
    assert gate.measure_cases(model, whole, LABELS)[0][cases[0].id]["bright"] < 0.9
