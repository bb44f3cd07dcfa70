"""Training on synthetic slices beside real ones: how many, always the same, encoded once."""

from __future__ import annotations

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch

from samadapt import recipes
from samadapt.config import AppConfig
from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.window import Window
from samadapt.errors import ConfigError
from samadapt.model import AdaptedModel, read_info
from samadapt.project import Project
from samadapt.training import train
from samadapt.training.slices import SliceSampler, few_slices, prepare
from samadapt.training.synthetic import BANK, RANGES, SyntheticSlices, synthetic_share
from samadapt.training.tokens import TokenSource
from tiny import BACKBONES, SIZE, write_studies

LABELS = LabelMap(("bright", "dark"))
WINDOW = Window("percentile", 0.5, 99.5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def studies(tmp_path):
    write_studies(tmp_path / "studies", 3)
    return tmp_path / "studies"


@pytest.fixture
def cases(studies):
    return find_cases(studies)


@pytest.fixture
def prepared(cases, tmp_path):
    return prepare(cases, LABELS, WINDOW, 1, SIZE, tmp_path / "slices")


@pytest.fixture
def made(monkeypatch):
    """Numbers of the synthetic slices that were made."""
    made, pair = [], SyntheticSlices.pair
    monkeypatch.setattr(SyntheticSlices, "pair", lambda self, index: made.append(index) or pair(self, index))
    return made


def crowded(case):
    """``case`` without its empty slices."""
    shown = sorted({index for indices in case.slices_of.values() for index in indices})
    renumbered = {label: [shown.index(n) for n in indices] for label, indices in case.slices_of.items()}
    return dataclasses.replace(
        case,
        images=case.images[shown],
        labels=case.labels[shown],
        slices_of=renumbered,
        learned_from=range(len(shown)),
        key=f"{case.key} crowded",
    )


def sampler(prepared, bank, copies=2, batch_size=4):
    return SliceSampler(prepared, SIZE, batch_size, 0, copies, bank)


def synthetic(draws):
    return [draw for draw in draws if isinstance(draw.case, SyntheticSlices)]


# ---- the bank


def test_samples_show_the_classes_on_slices_without_them(prepared):
    bank = SyntheticSlices(prepared, seed=0)
    assert bank.remark == ""
    assert {(case.id, index) for case, index in bank.backgrounds} == {(c.id, n) for c in prepared for n in (0, 5)}
    assert all(set(case.label(index).unique().tolist()) == {0, 1, 2} for case, index in bank.exemplars)
    assert {case.id for case, _ in bank.exemplars} == {case.id for case in prepared}
    shown = [set(bank.pair(n)[1].unique().tolist()) for n in range(len(bank))]
    assert set.union(*shown) == {0, 1, 2}


def test_areas_are_the_pixels_of_the_prepared_labels(prepared):
    for case in prepared:
        for label, indices in case.slices_of.items():
            assert case.areas[label] == [int((case.label(index) == label).sum()) for index in indices]


def test_where_no_slice_is_empty_those_that_show_least_serve_and_people_are_told(prepared):
    full = [crowded(case) for case in prepared]
    bank = SyntheticSlices(full, seed=0)
    assert bank.remark
    areas = sorted(int((case.label(n) > 0).sum()) for case in full for n in range(len(case)))
    assert sorted(int((case.label(n) > 0).sum()) for case, n in bank.backgrounds) == areas[:3]


def test_few_slices_of_a_case_are_all_that_samples_are_made_of(prepared):
    few = [few_slices(case, 2, seed=3) for case in prepared]
    bank = SyntheticSlices(few, seed=0)
    allowed = {(case.id, index) for case in few for index in case.learned_from}
    assert {(case.id, index) for case, index in [*bank.exemplars, *bank.backgrounds]} <= allowed


def test_lesions_go_further_than_organs(prepared):
    """The same structures, from the same seed: near their own places, and anywhere in the body."""
    spread = {}
    for name, ranges in RANGES.items():
        bank = SyntheticSlices(prepared, 0, ranges=ranges)
        found = [(bank.pair(n)[1] == 2).nonzero().float().mean(0) for n in range(60)]
        spread[name] = torch.stack(found).nan_to_num(SIZE / 4).std(0).mean()
    assert spread["lesions"] > 1.5 * spread["exemplar"]


@pytest.mark.parametrize("empty", [True, False])
def test_one_exemplar_works(prepared, empty):
    case = prepared[0] if empty else crowded(prepared[0])
    bank = SyntheticSlices([case], 0, choose=lambda slices: [0])
    assert len(bank.exemplars) == 1
    images = [bank.pair(n)[0] for n in range(20)]
    assert all(torch.isfinite(image).all() for image in images)
    assert not any(torch.equal(images[0], image) for image in images[1:])


def test_a_bank_is_known_by_what_it_is_made_of(prepared, cases, tmp_path):
    first, second = (SyntheticSlices(prepared, seed=0) for _ in range(2))
    assert first.key == second.key
    assert all(torch.equal(a, b) for a, b in zip(first.pair(7), second.pair(7), strict=True))
    swapped = [dataclasses.replace(cases[0], values={1: "dark", 2: "bright"}), *cases[1:]]
    corrected = prepare(swapped, LABELS, WINDOW, 1, SIZE, tmp_path / "corrected")
    others = [SyntheticSlices(prepared, 1), SyntheticSlices(prepared[:2], 0), SyntheticSlices(corrected, 0)]
    assert len({bank.view_key for bank in (first, *others)}) == 4


# ---- draws


def test_few_cases_ask_for_more():
    assert [synthetic_share(n) for n in (1, 5, 50)] == pytest.approx([4 / 5, 1 / 2, 1 / 2])
    shares = [synthetic_share(n) for n in range(1, 6)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 5


@pytest.mark.parametrize("count", [1, 3])
def test_the_share_is_kept_over_many_draws(prepared, count):
    bank = SyntheticSlices(prepared[:count], seed=0)
    draws = [draw for number in range(1000) for draw in sampler(prepared[:count], bank).draws(number)]
    assert len(synthetic(draws)) / len(draws) == pytest.approx(synthetic_share(count), abs=0.03)
    assert len(set(synthetic(draws))) == BANK


def test_the_share_can_be_set(studies, tiny_backbone):
    result = train(find_cases(studies), LABELS, config(synthesis="exemplar", synthetic_share="0.25"), Project(studies))
    assert read_info(result.model).recipe.synthetic_share == 0.25


def test_a_set_share_is_kept_over_many_draws(prepared):
    bank = SyntheticSlices(prepared, seed=0, share=0.25)
    draws = [draw for number in range(1000) for draw in sampler(prepared, bank).draws(number)]
    assert len(synthetic(draws)) / len(draws) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("values", [{"recipe": "samed"}, {"recipe": "cheap_lunch", "synthesis": "none"}], ids=str)
def test_a_share_of_nothing_is_refused(values):
    with pytest.raises(ConfigError, match="synthesis"):
        recipes.configured(AppConfig.from_strings({**values, "synthetic_share": "0.5"}))


def test_batches_with_synthetic_slices_depend_on_seed_and_number_alone(prepared):
    first, second = (sampler(prepared, SyntheticSlices(prepared, seed=0)) for _ in range(2))
    first.batch(0)
    numbers = (7, 2)
    assert synthetic([draw for number in numbers for draw in first.draws(number)])
    for number in numbers:
        assert all(torch.equal(a, b) for a, b in zip(first.batch(number), second.batch(number), strict=True))


def test_samples_are_augmented_like_other_slices(prepared):
    bank = SyntheticSlices(prepared, seed=0)
    drawn = [draw for number in range(5) for draw in synthetic(sampler(prepared, bank).draws(number))]
    plain = synthetic(sampler(prepared, bank, copies=0).draws(0))[0]
    assert plain.copy is None
    assert torch.equal(sampler(prepared, bank).load(plain)[0], bank.pair(plain.index)[0])
    # Now and then an augmentation leaves a sample as it is.
    as_they_are = [torch.equal(sampler(prepared, bank).load(draw)[0], bank.pair(draw.index)[0]) for draw in drawn]
    assert sum(as_they_are) < len(as_they_are) / 2


@pytest.mark.parametrize("layout", BACKBONES)
def test_a_frozen_trunk_meets_each_sample_once(prepared, tmp_path, layout, monkeypatch):
    model = recipes.build("lora_late", LABELS, BACKBONES[layout]())
    calls, tokens = [], model.tokens
    monkeypatch.setattr(model, "tokens", lambda images: calls.append(len(images)) or tokens(images))
    bank = SyntheticSlices(prepared, seed=0)
    drawing = sampler(prepared, bank)
    cache = SliceCache(tmp_path / "cache", gib=1)
    draws = [draw for number in range(5) for draw in drawing.draws(number)]
    for _ in range(2):
        found, labels = TokenSource(model, drawing, cache).batch(draws)
        images, expected = (torch.stack(part) for part in zip(*map(drawing.load, draws), strict=True))
        assert torch.equal(labels, expected)
        with torch.no_grad():
            torch.testing.assert_close(model.embed_tokens(found), model.embed(images), atol=5e-3, rtol=0)
    assert synthetic(draws)
    assert sum(calls) == len(set(draws))


# ---- training


def config(**values) -> AppConfig:
    given = {"max_steps": "6", "max_train_minutes": "2", "image_size": str(SIZE)}
    return AppConfig.from_strings(given | values)


@pytest.mark.parametrize(
    "values", [{"recipe": "cheap_lunch"}, {"synthesis": "exemplar"}, {"synthesis": "lesions"}], ids=str
)
def test_a_training_with_synthesis_gives_a_model(studies, tiny_backbone, made, values):
    result = train(find_cases(studies), LABELS, config(**values), Project(studies))
    assert made
    assert result.published
    assert not any("synthe" in remark for remark in result.remarks)
    assert read_info(result.model).recipe.synthesis == values.get("synthesis", "exemplar")
    AdaptedModel.load(result.model)


def test_synthesis_can_be_taken_out_of_a_recipe(studies, tiny_backbone, made):
    train(find_cases(studies), LABELS, config(recipe="cheap_lunch", synthesis="none"), Project(studies))
    assert made == []


def test_missing_backgrounds_are_told_at_the_end(studies, tiny_backbone):
    for path in (studies / "labels" / "final").iterdir():
        label = nib.load(path)
        everywhere = np.repeat(np.asanyarray(label.dataobj)[..., 2:3], label.shape[2], axis=2)
        nib.save(nib.Nifti1Image(everywhere, label.affine), path)
    result = train(find_cases(studies), LABELS, config(synthesis="exemplar"), Project(studies))
    assert any("synthetic" in remark for remark in result.remarks)


def test_the_recipe_decides_unless_it_is_told():
    def chosen(**values):
        return recipes.configured(AppConfig.from_strings(values)).synthesis

    assert chosen() == chosen(recipe="samed") == "none"
    assert chosen(recipe="cheap_lunch") == chosen(recipe="cheap_lunch", synthesis="auto") == "exemplar"
    assert chosen(recipe="samed", synthesis="exemplar") == "exemplar"
    with pytest.raises(ConfigError, match="exemplar"):
        AppConfig.from_strings({"synthesis": "exemplars"})


def test_cheap_lunch_is_samed_with_synthesis():
    told = {"name": "", "summary": "", "synthesis": "none"}
    assert dataclasses.replace(recipes.get("cheap_lunch"), **told) == dataclasses.replace(recipes.get("samed"), **told)
