"""The losses: as before where everything is labelled, blind where nobody has labelled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.losses import DiceCELoss
from torch.nn import functional as F

from samadapt import recipes
from samadapt.data.labels import IGNORE, LabelMap
from samadapt.training.losses import class_loss, prompt_loss
from tiny import BACKBONES, SIZE

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4
labels_of = arrays(np.int64, (2, 6, 7), elements=st.integers(0, CLASSES - 1)).map(torch.from_numpy)
ignored_of = arrays(bool, (2, 6, 7)).map(torch.from_numpy)
seeds = st.integers(0, 2**31)


def logits_of(seed: int, classes: int = CLASSES) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, classes, 6, 7, generator=random)).requires_grad_()


def gradient(logits, labels, unknown=None):
    loss = class_loss(logits, labels, unknown)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


# Classes


@given(labels_of, seeds)
@settings(max_examples=20, deadline=None)
def test_where_everything_is_labelled_the_loss_is_monais(labels, seed):
    logits = logits_of(seed)
    monais = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)(logits, labels[:, None])
    assert torch.equal(class_loss(logits, labels), monais)
    assert torch.equal(class_loss(logits, labels, torch.zeros(2, CLASSES, dtype=torch.bool)), monais)


@given(labels_of, ignored_of, seeds)
@settings(max_examples=50, deadline=None)
def test_what_is_said_of_ignored_pixels_changes_neither_loss_nor_gradients(labels, ignored, seed):
    assume(ignored.any())
    labels = labels.masked_fill(ignored, IGNORE)
    loss, grads = gradient(logits_of(seed), labels)
    other = torch.where(ignored[:, None], logits_of(seed + 1), logits_of(seed)).detach().requires_grad_()
    same_loss, same_grads = gradient(other, labels)
    assert torch.equal(loss, same_loss)
    assert torch.equal(grads, same_grads)
    assert not grads.masked_select(ignored[:, None]).any()
    assert grads.isfinite().all()


@given(labels_of, seeds)
@settings(max_examples=20, deadline=None)
def test_rows_left_out_are_as_rows_that_are_not_there(labels, seed):
    logits = logits_of(seed).detach()
    cut = labels.clone()
    cut[:, 4:] = IGNORE
    torch.testing.assert_close(class_loss(logits, cut), class_loss(logits[:, :, :4], labels[:, :4]))


@pytest.mark.parametrize("unknown", [None, torch.tensor([[False, True, True, False], [False] * 4])])
def test_a_batch_of_which_nothing_is_labelled_asks_for_nothing(unknown):
    loss, grads = gradient(logits_of(0), torch.full((2, 6, 7), IGNORE), unknown)
    assert loss == 0
    assert torch.equal(grads, torch.zeros_like(grads))


# Classes that nobody has looked for


@given(labels_of, ignored_of, seeds)
@settings(max_examples=50, deadline=None)
def test_background_may_be_any_unknown_class(labels, ignored, seed):
    """The probability of background is the sum of theirs; written out for one sample with two unknown classes."""
    logits = logits_of(seed)[:1]
    known = torch.where(labels[:1] == 2, 2, 0)
    counted = known.masked_fill(ignored[:1], IGNORE)
    assume((counted != IGNORE).any())
    found = class_loss(logits, counted, torch.tensor([[False, True, False, True]]))
    probabilities = logits.softmax(dim=1)
    merged = torch.stack([probabilities[:, [0, 1, 3]].sum(dim=1), probabilities[:, 2]], dim=1)
    entropy = F.nll_loss(merged.log(), (known == 2).long().masked_fill(ignored[:1], IGNORE), ignore_index=IGNORE)
    wanted, one = (known == 2) & ~ignored[:1], merged[:, 1] * ~ignored[:1]
    dice = 1 - (2 * (one * wanted).sum() + 1e-5) / (one.sum() + wanted.sum() + 1e-5)
    torch.testing.assert_close(found, dice / 3 + entropy, rtol=1e-4, atol=1e-5)


@given(seeds, st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_probability_may_move_among_unknown_classes_and_background(seed, shift):
    """Two logits with the same sum of exponentials as before: the loss stays, and so do other classes' gradients."""
    logits = logits_of(seed).detach()
    share = torch.tensor(shift).sigmoid()
    total = logits[:, [0, 3]].logsumexp(dim=1)
    moved = logits.clone()
    moved[:, 0], moved[:, 3] = total + share.log(), total + (1 - share).log()
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (2, 6, 7)))
    unknown = torch.tensor([[False, False, False, True]] * 2)
    (loss, grads), (same, others) = (gradient(one.requires_grad_(), labels, unknown) for one in (logits, moved))
    torch.testing.assert_close(loss, same)
    torch.testing.assert_close(grads[:, 1:3], others[:, 1:3])
    assert grads.isfinite().all()


def test_a_wrong_class_is_still_wrong_where_another_is_unknown():
    labels, unknown = torch.zeros(2, 6, 7, dtype=torch.long), torch.tensor([[False, False, False, True]] * 2)
    wrong, allowed = (torch.zeros(2, CLASSES, 6, 7).index_fill(1, torch.tensor([n]), 9.0) for n in (1, 3))
    assert class_loss(wrong, labels, unknown) > 5
    assert class_loss(allowed, labels, unknown) < 1
    assert class_loss(allowed, labels) > 5


def test_one_sample_may_know_what_another_does_not():
    labels = torch.zeros(2, 6, 7, dtype=torch.long)
    _, grads = gradient(
        torch.zeros(2, CLASSES, 6, 7).index_fill(1, torch.tensor([3]), 2.0).requires_grad_(),
        labels,
        torch.tensor([[False, False, False, True], [False] * 4]),
    )
    assert (grads[0, 3] <= 0).all()
    assert (grads[1, 3] > 0).all()


# Prompts


@pytest.fixture(scope="module")
def model():
    return recipes.build("lora", LabelMap(("a", "b")), BACKBONES["per_head"]()).eval()


def embeddings_of(model, seed):
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return model.embed(images).detach().requires_grad_()


def asked(model, embeddings, labels):
    loss = prompt_loss(model, embeddings, labels, torch.Generator().manual_seed(1))
    return loss.detach(), torch.autograd.grad(loss, embeddings)[0] if loss.requires_grad else None


@pytest.fixture
def square():
    """One object in each of two slices."""
    labels = torch.zeros(2, SIZE, SIZE, dtype=torch.long)
    labels[0, 8:24, 8:24] = 1
    labels[1, 30:40, 20:50] = 2
    return labels


def test_what_nobody_has_labelled_is_no_object(model):
    labels = torch.zeros(2, SIZE, SIZE, dtype=torch.long)
    labels[:, 5:30] = IGNORE
    loss, grads = asked(model, embeddings_of(model, 0), labels)
    assert loss == 0
    assert grads is None


def test_masks_are_not_measured_where_nobody_has_labelled(model, square, monkeypatch):
    """Whatever the model says there, the loss is the same; where it is labelled, it is not."""
    masked = square.clone()
    masked[:, 44:] = IGNORE
    embeddings, losses = embeddings_of(model, 0), []
    answer = type(model).prompt_masks
    for shift in (None, slice(12, None), slice(0, 11)):  # of 16 rows; row 11 and later show pixels from 44 on

        def answered(self, *arguments, shift=shift):
            logits, iou = answer(self, *arguments)
            if shift is not None:
                rows = torch.zeros(16, 1)
                rows[shift] = 5.0
                rows = rows.repeat_interleave(logits.shape[-2] // 16, dim=0)
                logits = logits + rows
            return logits, iou

        monkeypatch.setattr(type(model), "prompt_masks", answered)
        losses.append(asked(model, embeddings, masked)[0])
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_everything_labelled_is_asked_as_before(model, square, monkeypatch):
    """MONAI's loss, and clicks drawn as ever."""
    embeddings = embeddings_of(model, 0)
    losses = []
    binary = DiceCELoss(sigmoid=True, batch=True)
    monkeypatch.setattr(
        "samadapt.training.losses._binary", lambda *pair: losses.append(binary(*pair)) or torch.zeros(())
    )
    assert asked(model, embeddings, square)[0] < 1
    assert len(losses) == 1
