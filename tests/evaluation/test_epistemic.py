"""MONAI Label's score, beside its own definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from samadapt import recipes
from samadapt.activelearning.strategy import Candidate, Pool
from samadapt.data.geometry import Geometry
from samadapt.data.volume import Volume
from samadapt.evaluation.epistemic import LEAST, PASSES, Epistemic, mean_entropy
from tiny import BACKBONES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def volume():
    values = np.random.default_rng(0).normal(100, 20, (1, 10, 9, 4)).astype(np.float32)
    return Volume(values, Geometry((10, 9, 4), np.diag([-1.0, -1, 3, 1])), "MR", None)


def model_that_says(logits):
    """A model whose head gives the same logits (K+1,) everywhere, or what ``logits`` makes of the embedding."""
    model = recipes.build("autosam_linear", ["a", "b"], BACKBONES["per_head"]())
    model.describe(trained=True)
    say = logits if callable(logits) else lambda e: torch.tensor(logits).view(1, -1, 1, 1).expand(len(e), -1, 16, 16)
    model.class_logits = say
    return model


def test_the_score_is_the_entropy_of_the_foreground_classes_over_all_voxels(volume):
    shares = [0.5, 0.3, 0.2]
    wanted = -(0.3 * math.log(0.3) + 0.2 * math.log(0.2))  # the background is left out, as MONAI Label does
    model = model_that_says([math.log(share) for share in shares])
    assert mean_entropy(model, volume, seed=0) == pytest.approx(wanted, rel=1e-5)


def test_a_sure_model_scores_near_nothing_and_an_empty_rest_lowers_the_score(volume):
    sure = mean_entropy(model_that_says([20.0, 0.0, 0.0]), volume, seed=0)
    assert 0 <= sure < 0.002
    half = model_that_says(
        lambda e: torch.stack(
            [torch.tensor([20.0, 0, 0]).view(3, 1, 1).expand(3, 16, 16), torch.zeros(3, 16, 16)] * (len(e) // 2)
        )
    )
    doubtful = mean_entropy(model_that_says([0.0, 0.0, 0.0]), volume, seed=0)
    assert mean_entropy(half, volume, seed=0) == pytest.approx((sure + doubtful) / 2, rel=1e-4)


def test_only_a_probability_of_nothing_is_replaced_and_in_the_pass_that_gave_it(volume):
    small = 1e-7
    model = model_that_says([0.0, math.log(small), math.log(small)])
    assert mean_entropy(model, volume, seed=0) == pytest.approx(-2 * small * math.log(small), rel=1e-3)

    passes = itertools.cycle([[0.0, 0.0, -200.0]] + [[200.0, 0.0, 0.0]] * (PASSES - 1))
    mean = (0.5 + (PASSES - 1) * LEAST) / PASSES  # of class a: found in one pass, exactly 0 in the others
    wanted = -mean * math.log(mean) - LEAST * math.log(LEAST)
    model = model_that_says(lambda e: torch.tensor(next(passes)).view(1, 3, 1, 1).expand(len(e), 3, 16, 16))
    assert mean_entropy(model, volume, seed=0) == pytest.approx(wanted, rel=1e-5)


def test_dropout_makes_passes_differ_and_the_seed_decides_it(volume):
    def one_channel(embeddings):
        said = F.pad(embeddings[:, :1] * 5, (0, 0, 0, 0, 0, 2))
        return F.interpolate(said, size=(16, 16))

    model = model_that_says(one_channel)
    assert mean_entropy(model, volume, seed=1) == mean_entropy(model, volume, seed=1)
    assert mean_entropy(model, volume, seed=1) != mean_entropy(model, volume, seed=2)


def test_the_largest_comes_first_and_without_a_model_the_first_by_id():
    pool = Pool([Candidate(name) for name in "cab"], [])
    scores = {"a": 0.1, "b": 0.7, "c": 0.3}
    assert [one.id for one in Epistemic(scores.__getitem__).rank(pool, 2)] == ["b", "c"]
    assert [one.id for one in Epistemic(None).rank(pool, 5)] == ["a", "b", "c"]
