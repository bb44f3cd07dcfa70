"""What is known of every case: computed once, found again, forgotten when it no longer holds."""

from __future__ import annotations

import json
import os

import nibabel as nib
import numpy as np
import pytest
import torch

from samadapt import recipes
from samadapt.activelearning import observe, survey
from samadapt.activelearning.observe import describe, heads_apart, spread_of_answers
from samadapt.activelearning.survey import DESCRIPTORS, OPINIONS, Survey
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import read_volume
from samadapt.evaluation.metrics import dice, mean
from samadapt.inference.examine import Examination, examine
from tiny import BACKBONES, write_phantom

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("bright", "dark")
NEEDS = DESCRIPTORS | OPINIONS


def trained(recipe="lora", labels=LABELS, seed=0):
    model = recipes.build(recipe, labels, BACKBONES["per_head"](), seed=seed)
    model.describe(trained=True)
    return model


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def older():
    return trained("autosam_linear", seed=3)


@pytest.fixture(scope="module")
def plain():
    return recipes.build(recipes.PLAIN, ("object",), BACKBONES["per_head"]())


@pytest.fixture
def image(tmp_path):
    write_phantom(tmp_path / "case.nii.gz", seed=0)
    return tmp_path / "case.nii.gz"


@pytest.fixture
def label():
    random = np.random.default_rng(5)
    return random.integers(0, 3, (36, 30, 6)).astype(np.uint8)


@pytest.fixture
def kept(tmp_path):
    return Survey(tmp_path / "survey")


def same(one, two):
    """Whether two candidates say the same, but for rounding."""
    for field in ("id", "proposed", "disagreement", "label_dice"):
        assert getattr(one, field) == getattr(two, field), field
    for field in ("descriptor", "slice_descriptors", "spread"):
        a, b = getattr(one, field), getattr(two, field)
        assert (a is None) == (b is None), field
        assert a is None or np.array_equal(a, b, equal_nan=True), field
    pairs = zip([one.examination, *one.variants], [two.examination, *two.variants], strict=True)
    assert all(a.to_dict() == b.to_dict() for a, b in pairs)
    return True


def no_more_work(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("computed again")

    for name in ("examine", "describe", "heads_apart", "spread_of_answers", "read_volume"):
        monkeypatch.setattr(survey, name, refuse)


def test_kept_is_what_was_computed(kept, image, model, older, plain, label, tmp_path, monkeypatch):
    cache = SliceCache(tmp_path / "cache", gib=1)
    looked = kept.look(
        "case", image, NEEDS, plain=plain, model=model, version="v1", earlier=[older], cache=cache, label=label
    )
    volume = read_volume(image)
    mask, examination = examine(model, volume, cache=cache)
    assert looked.examination.to_dict() == examination.to_dict()
    assert looked.label_dice == mean(dice(mask, label, model.info.labels).values())
    assert looked.disagreement == heads_apart(model, volume, examination, cache)
    assert np.allclose(looked.spread, spread_of_answers(model, volume, examination, [older], cache), atol=1e-5)
    assert np.array_equal(looked.slice_descriptors, describe(plain, volume, cache), equal_nan=True)
    assert [one.to_dict() for one in looked.variants] == [examine(older, volume, cache=cache)[1].to_dict()]
    no_more_work(monkeypatch)
    again = Survey(tmp_path / "survey")
    assert not again.missing("case", image, "v1", NEEDS)
    assert same(again.candidate("case", image, "v1"), looked)
    assert same(again.look("case", image, NEEDS, plain=plain, model=model, version="v1", label=label), looked)


def test_nothing_is_known_and_nothing_is_written_before_a_look(kept, image, tmp_path):
    candidate = kept.candidate("case", image, "v1", proposed=7.0)
    assert candidate.id == "case"
    assert candidate.proposed == 7.0
    assert candidate.descriptor is candidate.examination is candidate.spread is None
    assert kept.missing("case", image, "v1", NEEDS) == NEEDS
    assert kept.missing("case", image, None, NEEDS) == DESCRIPTORS
    assert not (tmp_path / "survey").exists()


def test_only_what_is_asked_for_is_computed(kept, image, model, plain, monkeypatch):
    no_more_work(monkeypatch)
    monkeypatch.setattr(survey, "describe", describe)
    monkeypatch.setattr(survey, "read_volume", read_volume)
    looked = kept.look("case", image, {"descriptor"}, plain=plain, model=model, version="v1")
    assert looked.descriptor is not None
    assert looked.examination is None
    assert kept.missing("case", image, "v1", NEEDS) == OPINIONS


def test_another_version_forgets_opinions_and_keeps_descriptors(kept, image, model, older, plain):
    first = kept.look("case", image, {"descriptor", "examination"}, plain=plain, model=model, version="v1")
    other = kept.candidate("case", image, "v2")
    assert other.examination is None
    assert np.array_equal(other.descriptor, first.descriptor)
    second = kept.look("case", image, {"examination"}, plain=plain, model=older, version="v2")
    assert second.examination.to_dict() == examine(older, read_volume(image))[1].to_dict()
    assert kept.candidate("case", image, "v1").examination is None
    assert kept.candidate("case", image, None).examination is None


def test_a_changed_image_is_forgotten_whole(kept, image, model, plain):
    first = kept.look("case", image, {"descriptor", "examination"}, plain=plain, model=model, version="v1")
    write_phantom(image, seed=1)
    os.utime(image, ns=(1, image.stat().st_mtime_ns + 1))
    assert kept.missing("case", image, "v1", NEEDS) == NEEDS
    second = kept.look("case", image, {"descriptor"}, plain=plain)
    assert not np.array_equal(second.descriptor, first.descriptor)
    assert kept.candidate("case", image, "v1").examination is None


def test_a_changed_label_is_noticed(kept, image, model, plain, label, tmp_path):
    file = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(label, np.eye(4)), file)
    with_label = {"plain": plain, "model": model, "version": "v1", "label_file": file}
    first = kept.look("case", image, {"label_dice"}, label=label, **with_label)
    assert kept.candidate("case", image, "v1", label_file=file).label_dice == first.label_dice
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    assert kept.candidate("case", image, "v1", label_file=file).label_dice is None
    assert kept.missing("case", image, "v1", {"label_dice", "examination"}, file) == {"label_dice"}
    second = kept.look("case", image, {"label_dice"}, label=np.roll(label, 3, axis=0), **with_label)
    assert second.label_dice != first.label_dice


def test_a_class_that_nobody_looked_for_is_no_disagreement(kept, image, model, plain, label, tmp_path):
    label[label == 2] = 0
    told = {"plain": plain, "model": model, "version": "v1", "label": label}
    every = kept.look("case", image, {"label_dice"}, **told)
    partly = kept.look("partly", image, {"label_dice"}, **told, unknown=("dark",))
    mask, _ = examine(model, read_volume(image))
    assert (mask == 2).any()
    assert partly.label_dice == dice(mask, label, model.info.labels)["bright"] > every.label_dice
    assert kept.look("none", image, {"label_dice"}, **told, unknown=LABELS).label_dice is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"format": "samadapt-survey-1"}'])
def test_a_damaged_record_counts_as_absent(kept, image, model, plain, tmp_path, damage):
    first = kept.look("case", image, {"descriptor", "examination"}, plain=plain, model=model, version="v1")
    next((tmp_path / "survey").glob("*.json")).write_bytes(damage)
    assert kept.missing("case", image, "v1", NEEDS) == NEEDS
    assert kept.candidate("case", image, "v1").descriptor is None
    mended = kept.look("case", image, {"descriptor", "examination"}, plain=plain, model=model, version="v1")
    assert same(mended, first)


@pytest.mark.parametrize("field", ["examination", "spread"])
def test_a_damaged_opinion_counts_as_absent_and_spares_the_others(kept, image, model, plain, tmp_path, field):
    needs = {"examination", "spread"}
    kept.look("case", image, needs, plain=plain, model=model, version="v1")
    path = next((tmp_path / "survey").glob("*.json"))
    record = json.loads(path.read_text())
    record["opinions"][field] = "x"
    path.write_text(json.dumps(record))
    assert kept.missing("case", image, "v1", needs) == {field}


def test_what_another_process_finds_is_seen_at_once(kept, image, plain, tmp_path):
    assert kept.candidate("case", image, None).descriptor is None
    other = Survey(tmp_path / "survey")
    other.look("case", image, {"descriptor"}, plain=plain)
    np.testing.assert_array_equal(
        kept.candidate("case", image, None).descriptor, other.candidate("case", image, None).descriptor
    )


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_damaged_descriptors_count_as_absent(kept, image, plain, tmp_path, cut):
    kept.look("case", image, {"descriptor"}, plain=plain)
    path = next((tmp_path / "survey").glob("*.npy"))
    path.write_bytes(path.read_bytes()[:cut])
    assert kept.missing("case", image, None, DESCRIPTORS) == DESCRIPTORS


@pytest.mark.parametrize("step", ["describe", "examine", "spread_of_answers", "heads_apart"])
def test_what_was_found_before_a_kill_is_kept_and_nothing_half_written(
    kept, image, model, plain, tmp_path, monkeypatch, step
):
    def kill(*_, **__):
        raise KeyboardInterrupt

    needs = {"descriptor", "examination", "spread", "disagreement"}
    with monkeypatch.context() as patch:
        patch.setattr(survey, step, kill)
        with pytest.raises(KeyboardInterrupt):
            kept.look("case", image, needs, plain=plain, model=model, version="v1")
    before = {
        "describe": set(),
        "examine": {"descriptor"},
        "spread_of_answers": {"descriptor", "examination"},
        "heads_apart": {"descriptor", "examination", "spread"},
    }[step]
    assert kept.missing("case", image, "v1", needs) == needs - before
    kept.look("case", image, needs, plain=plain, model=model, version="v1")
    assert not kept.missing("case", image, "v1", needs)
    assert {path.suffix for path in (tmp_path / "survey").iterdir()} == {".json", ".npy"}


def test_a_kill_while_writing_leaves_the_record_of_before(kept, image, model, plain, tmp_path, monkeypatch):
    first = kept.look("case", image, {"descriptor", "examination"}, plain=plain, model=model, version="v1")

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            kept.look("case", image, {"spread"}, plain=plain, model=model, version="v1")
    assert same(kept.candidate("case", image, "v1"), first)
    assert len(list((tmp_path / "survey").iterdir())) == 2


def test_ids_may_be_anything(kept, image, plain, tmp_path):
    for case_id in ("../../etc/passwd", "a/b", "ä 名", "x" * 500):
        kept.look(case_id, image, {"descriptor"}, plain=plain)
        assert kept.candidate(case_id, image, None).descriptor is not None
    assert len(list((tmp_path / "survey").glob("*.json"))) == 4


def test_a_dicom_folder_changes_with_its_files(kept, image, plain, tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    (series / "1.dcm").write_bytes(b"one")
    volume = read_volume(image)
    kept.look("case", series, {"descriptor"}, plain=plain, volume=volume)
    assert not kept.missing("case", series, None, DESCRIPTORS)
    (series / "1.dcm").write_bytes(b"three")
    assert kept.missing("case", series, None, DESCRIPTORS) == DESCRIPTORS


# ---- what is observed


def test_descriptors_belong_to_the_slices_as_stored(plain, tmp_path):
    """The same image, stored upside down, has the same descriptors in reverse order."""
    values = np.random.default_rng(0).normal(100, 20, (20, 24, 7)).astype(np.float32)
    values[:, :, 2] += 80
    stored = {}
    for name, array, step in (("up", values, 3.0), ("down", values[:, :, ::-1], -3.0)):
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, step, 1.0])), path)
        stored[name] = describe(plain, read_volume(path), None)
    assert np.allclose(stored["up"], stored["down"][::-1], atol=1e-4)
    assert not np.allclose(stored["up"][2], stored["up"][4], atol=1e-3)
    assert np.allclose(np.linalg.norm(stored["up"], axis=1), 1, atol=1e-5)


def test_a_long_volume_is_described_by_a_few_slices(plain, tmp_path):
    values = np.random.default_rng(0).normal(100, 20, (12, 12, 90)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "long.nii.gz")
    found = describe(plain, read_volume(tmp_path / "long.nii.gz"), None)
    known = np.flatnonzero(np.isfinite(found).all(axis=1))
    assert found.shape[0] == 90
    assert len(known) == observe.DESCRIBED
    assert max(np.diff([-1, *known, 90])) <= 7


def test_spread_is_mutual_information(image, model, older, monkeypatch):
    """Nothing where both give the same answer, however unsure; one bit where each is sure of another class."""
    volume = read_volume(image)
    _, found = examine(model, volume)
    answers = {id(model): torch.tensor([0.0, 20.0, 0.0]), id(older): torch.tensor([0.0, 0.0, 20.0])}
    monkeypatch.setattr(observe, "_class_logits", lambda one, *_: answers[id(one)].view(3, 1, 1).expand(3, 4, 5))
    assert spread_of_answers(model, volume, found, [model]) == pytest.approx(np.zeros(6), abs=1e-5)
    assert spread_of_answers(model, volume, found, [older]) == pytest.approx(
        np.full(6, np.log(2) / np.log(3)), abs=1e-5
    )
    answers[id(model)] = answers[id(older)] = torch.zeros(3)
    assert spread_of_answers(model, volume, found, [older]) == pytest.approx(np.zeros(6), abs=1e-5)


def test_spread_of_a_long_volume_looks_at_its_most_doubtful_slices(model, tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(100, 20, (12, 12, 60)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, -3.0, 1.0])), tmp_path / "long.nii.gz")
    doubt, areas = np.zeros(60), np.zeros((60, 2), int)
    doubt[:50], doubt[50:] = 0.9, 0.2
    areas[45:] = 9
    found = Examination(2, areas, doubt, np.zeros((60, 2)), np.ones(2))
    looked = np.flatnonzero(spread_of_answers(model, read_volume(tmp_path / "long.nii.gz"), found))
    assert set(range(45, 50)) <= set(looked) <= set(range(45, 60))
    assert len(looked) == observe.COMPARED


def test_versions_with_other_labels_are_not_asked(image, model):
    volume = read_volume(image)
    _, found = examine(model, volume)
    alone = spread_of_answers(model, volume, found)
    assert alone.max() > 0
    assert np.array_equal(spread_of_answers(model, volume, found, [trained(labels=("bright", "other"))]), alone)


def test_a_constant_image_cannot_be_altered(model, tmp_path):
    nib.save(nib.Nifti1Image(np.full((12, 12, 3), 5, np.float32), np.eye(4)), tmp_path / "flat.nii.gz")
    volume = read_volume(tmp_path / "flat.nii.gz")
    assert spread_of_answers(model, volume, examine(model, volume)[1]) is None


def test_heads_that_find_the_same_are_not_apart(image, model, monkeypatch):
    volume = read_volume(image)
    _, found = examine(model, volume)
    assert 0 < heads_apart(model, volume, found) <= 1
    answers = []

    def echo(_, embedding, part):
        answers.append(part)
        return part

    monkeypatch.setattr(observe, "_answer_to_box", echo)
    assert heads_apart(model, volume, found) == 0
    assert answers


def test_a_model_without_prompts_has_no_heads_to_compare(kept, image, older, plain):
    looked = kept.look("case", image, {"disagreement"}, plain=plain, model=older, version="v1")
    assert looked.disagreement is None
    assert not kept.missing("case", image, "v1", {"disagreement"})
