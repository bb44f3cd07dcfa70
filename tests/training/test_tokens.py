"""Tokens of a training: the same as computed anew, kept over processes, and shared with inference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from samadapt import recipes
from samadapt.data.cases import find_cases
from samadapt.data.labels import LabelMap
from samadapt.data.slice_cache import SliceCache
from samadapt.data.view import ModelView
from samadapt.data.volume import read_volume
from samadapt.data.window import Window
from samadapt.encoding import SliceEncoder
from samadapt.training.slices import Draw, SliceSampler, prepare
from samadapt.training.tokens import TokenSource
from tiny import BACKBONES, SIZE, write_studies

LABELS = LabelMap(("bright", "dark"))
WINDOW = Window("percentile", 0.5, 99.5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cases(tmp_path):
    write_studies(tmp_path / "studies", 2)
    return [case for case in find_cases(tmp_path / "studies") if case.label]


@pytest.fixture
def prepared(cases, tmp_path):
    return prepare(cases, LABELS, WINDOW, 1, SIZE, tmp_path / "slices")


@pytest.fixture
def sampler(prepared):
    return SliceSampler(prepared, SIZE, batch_size=4, seed=0, copies=2)


@pytest.fixture
def cache(tmp_path):
    return SliceCache(tmp_path / "cache", gib=1)


@pytest.fixture(params=BACKBONES)
def model(request):
    return recipes.build("lora_late", LABELS, BACKBONES[request.param]())


@pytest.fixture
def calls(model, monkeypatch):
    """Sizes of the batches that run through the frozen part."""
    calls, tokens = [], model.tokens
    monkeypatch.setattr(model, "tokens", lambda images: calls.append(len(images)) or tokens(images))
    return calls


def test_cached_equals_live_within_half_precision(model, sampler, prepared, cache):
    draws = [*sampler.draws(0), Draw(prepared[1], 2, None)]
    for _ in ("computed", "read"):
        tokens, labels = TokenSource(model, sampler, cache).batch(draws)
        images, expected_labels = (torch.stack(part) for part in zip(*map(sampler.load, draws), strict=True))
        assert torch.equal(labels, expected_labels)
        with torch.no_grad():
            torch.testing.assert_close(model.embed_tokens(tokens), model.embed(images), atol=5e-3, rtol=0)


def test_every_draw_runs_once_also_in_the_next_process(model, sampler, prepared, cache, calls, tmp_path):
    draws = [draw for number in range(20) for draw in sampler.draws(number)]
    for own in (cache, SliceCache(tmp_path / "cache", gib=1)):
        for draw in draws:
            TokenSource(model, sampler, own).batch([draw])
    assert sum(calls) == len(set(draws)) <= 2 * sum(map(len, prepared))


def test_a_draw_that_comes_twice_in_a_batch_is_computed_once(model, sampler, cache, calls):
    draw = sampler.draws(0)[0]
    tokens, labels = TokenSource(model, sampler, cache).batch([draw, draw])
    assert calls == [1]
    assert len(tokens) == len(labels) == 2
    assert torch.equal(tokens[0], tokens[1])


def test_copies_of_one_slice_differ(model, sampler, prepared, cache):
    source = TokenSource(model, sampler, cache)
    draws = [Draw(prepared[0], 2, copy) for copy in (None, 0, 1)]
    tokens, _ = source.batch(draws)
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[1], tokens[2])


def test_plain_slices_are_those_of_inference(model, sampler, prepared, cases, cache, calls):
    TokenSource(model, sampler, cache).batch([Draw(prepared[1], index, None) for index in (2, 4)])
    assert calls == [2]
    view = ModelView(read_volume(cases[1].image), WINDOW, 1, SIZE)
    found = SliceEncoder(model, cache).embeddings(view, [2, 4])
    assert calls == [2]
    torch.testing.assert_close(found, SliceEncoder(model).embeddings(view, [2, 4]), atol=5e-3, rtol=0)


def test_a_corrected_label_counts_at_once_and_encodes_nothing(model, sampler, prepared, cases, cache, calls, tmp_path):
    draws = [Draw(prepared[0], 2, copy) for copy in (None, 1)]
    _, before = TokenSource(model, sampler, cache).batch(draws)
    swapped = dataclasses.replace(cases[0], values={1: "dark", 2: "bright"})
    again = prepare([swapped], LABELS, WINDOW, 1, SIZE, tmp_path / "slices")
    other = SliceSampler(again, SIZE, batch_size=4, seed=0, copies=2)
    calls.clear()
    _, after = TokenSource(model, other, cache).batch([Draw(again[0], 2, copy) for copy in (None, 1)])
    assert torch.equal(after, torch.tensor([0, 2, 1])[before])
    assert calls == []
