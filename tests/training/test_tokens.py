"""Cached tokens: the same as computed anew, kept over processes, and gone with what they were made from."""

from __future__ import annotations

import pytest
import torch

from samadapt import recipes
from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap
from samadapt.data.window import Window
from samadapt.training.slices import Draw, SliceSampler, prepare
from samadapt.training.tokens import TokenCache
from tiny import BACKBONES, SIZE, write_studies

LABELS = LabelMap(("bright", "dark"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prepared(tmp_path):
    write_studies(tmp_path / "studies", 2)
    cases = [case for case in find_cases(tmp_path / "studies") if case.label]
    return prepare(cases, LABELS, Window("percentile", 0.5, 99.5), 1, SIZE, tmp_path / "slices")


@pytest.fixture
def sampler(prepared):
    return SliceSampler(prepared, SIZE, batch_size=4, seed=0, copies=2)


@pytest.fixture(params=BACKBONES)
def model(request):
    return recipes.build("lora_late", LABELS, BACKBONES[request.param]())


def count_calls(model, monkeypatch) -> list[int]:
    """Sizes of the batches that run through the frozen part from now on."""
    calls, tokens = [], model.tokens
    monkeypatch.setattr(model, "tokens", lambda images: calls.append(len(images)) or tokens(images))
    return calls


def test_cached_equals_live_within_half_precision(model, sampler, prepared, tmp_path):
    cache = TokenCache(model, sampler, tmp_path / "tokens", prepared)
    draws = [*sampler.draws(0), Draw(prepared[1], 2, None)]
    for _ in ("computed", "read"):
        tokens, labels = cache.batch(draws)
        images, expected_labels = (torch.stack(part) for part in zip(*map(sampler.load, draws), strict=True))
        assert torch.equal(labels, expected_labels)
        with torch.no_grad():
            torch.testing.assert_close(model.embed_tokens(tokens), model.embed(images), atol=5e-3, rtol=0)


def test_every_draw_runs_once_also_in_the_next_process(model, sampler, prepared, tmp_path, monkeypatch):
    calls = count_calls(model, monkeypatch)
    draws = [draw for number in range(20) for draw in sampler.draws(number)]
    for _ in range(2):
        cache = TokenCache(model, sampler, tmp_path / "tokens", prepared)
        for draw in draws:
            cache.batch([draw])
    assert sum(calls) == len(set(draws)) <= 2 * sum(map(len, prepared))


def test_a_draw_that_comes_twice_in_a_batch_is_computed_once(model, sampler, prepared, tmp_path, monkeypatch):
    calls = count_calls(model, monkeypatch)
    draw = sampler.draws(0)[0]
    tokens, labels = TokenCache(model, sampler, tmp_path / "tokens", prepared).batch([draw, draw])
    assert calls == [1]
    assert len(tokens) == len(labels) == 2
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_a_damaged_file_is_computed_anew(model, sampler, prepared, tmp_path, damage):
    cache = TokenCache(model, sampler, tmp_path / "tokens", prepared)
    draws = sampler.draws(0)
    expected = cache.batch(draws)
    for path in (tmp_path / "tokens").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    for _ in ("computed", "read"):
        assert all(torch.equal(a, b) for a, b in zip(cache.batch(draws), expected, strict=True))


def test_a_full_cache_still_answers(model, sampler, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("samadapt.training.tokens.LARGEST", 1)
    cache = TokenCache(model, sampler, tmp_path / "tokens", prepared)
    first, later = cache.batch(sampler.draws(0)), cache.batch(sampler.draws(1))
    kept = {path.name for path in (tmp_path / "tokens").rglob("*.safetensors")}
    assert len(kept) == len({(draw.index, draw.copy) for draw in sampler.draws(0)})
    assert all(torch.equal(a, b) for a, b in zip(cache.batch(sampler.draws(0)), first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cache.batch(sampler.draws(1)), later, strict=True))


def test_tokens_of_other_cases_and_other_recipes_are_removed(model, sampler, prepared, tmp_path):
    TokenCache(model, sampler, tmp_path / "tokens", prepared).batch(sampler.draws(0))
    before = set((tmp_path / "tokens").iterdir())
    TokenCache(model, sampler, tmp_path / "tokens", prepared[:1])
    assert len(set((tmp_path / "tokens").iterdir()) & before) == 1
    other = recipes.build("lora", LABELS, BACKBONES["per_head"]())
    other.describe(weights_sha256="1" * 64)
    TokenCache(other, sampler, tmp_path / "tokens", prepared)
    assert not set((tmp_path / "tokens").iterdir()) & before
