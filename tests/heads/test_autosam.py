"""AutoSAM's heads: sizes of the paper's code, a defined start, and that every form learns and survives its file."""

from __future__ import annotations

import pytest
import torch

from one_slice import LABELS, gradients, images, labels, overfit, reloaded, train
from samadapt import recipes
from samadapt.data.labels import LabelMap
from samadapt.encoding import KEPT
from samadapt.errors import ConfigError
from samadapt.heads import AutoSamCnn, AutoSamLinear, AutoSamVit, HeadConfig
from tiny import BACKBONES, SIZE

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {
    "vit": AutoSamVit(),
    "vit, class-wise": AutoSamVit("class_wise"),
    "vit, reference": AutoSamVit("class_wise", reference=True),
    "cnn": AutoSamCnn(),
    "linear": AutoSamLinear(),
    "linear, reference": AutoSamLinear(reference=True),
}
ALL_FORMS = FORMS | {"cnn, reference": AutoSamCnn(reference=True)}

WITHOUT_EFFECT = ("unused_hypernetwork", "token_to_image.k_proj.bias")
"""The paper's code trains the first, but nothing it computes reaches a mask; the second adds the same to all scores of
a softmax."""


@pytest.fixture(params=BACKBONES)
def layout(request):
    return request.param


def build(config: HeadConfig, names=LABELS, layout: str = "fused"):
    return recipes.build(config.kind, names, BACKBONES[layout](), head=config)


def learning(model) -> int:
    return sum(p.numel() for p in model.trainable().values())


def names(count: int) -> LabelMap:
    return LabelMap(tuple(f"class {n}" for n in range(count)))


@pytest.mark.parametrize(
    ("config", "classes", "expected"),
    [
        (AutoSamVit("class_wise", reference=True), 3, 3_646_880),
        (AutoSamVit("class_wise", reference=True), 8, 3_649_440),
        (AutoSamCnn(reference=True), 3, 20_686_340),
        (AutoSamLinear(reference=True), 3, 75_140),
    ],
)
def test_reference_forms_learn_as_many_parameters_as_the_papers(config, classes, expected):
    assert learning(build(config, names(classes))) == expected


def test_the_default_cnn_is_a_tenth_of_the_papers():
    assert 1_000_000 < learning(build(AutoSamCnn())) < 2_000_000


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_the_start_depends_on_the_seed_alone(config):
    with torch.no_grad():
        first = build(config)(images())
        torch.rand(3)
        assert torch.equal(build(config)(images()), first)
        other = recipes.build(config.kind, LABELS, BACKBONES["fused"](), head=config, seed=1)
        assert not torch.equal(other(images()), first)


@pytest.mark.parametrize("passes", ["joint", "class_wise"])
def test_each_class_is_decoded_as_the_single_mask_of_sam(layout, passes):
    """SAM's own modules on the same tokens, in one pass or in one for each class."""
    model = build(AutoSamVit(passes), layout=layout)
    decoder, prompts = model.backbone.mask_decoder, model.backbone.prompt_encoder
    groups = [torch.cat([model.head.iou_tokens[c], model.head.mask_tokens[c]]) for c in range(4)]
    sequences = [torch.cat(groups)] if passes == "joint" else groups
    with torch.no_grad():
        embedding = model.embed(images(1))
        expected = torch.cat([sams_masks(decoder, prompts, embedding, tokens) for tokens in sequences])
        assert torch.allclose(model.class_logits(embedding)[0], expected, atol=1e-4)


def sams_masks(decoder, prompts, embedding, tokens):
    """One mask for each group of three ``tokens``, the way SAM decodes its first mask token."""
    source = embedding + prompts.no_mask_embed.weight[..., None, None]
    hidden, image = decoder.transformer(source, prompts.get_dense_pe(), tokens[None])
    upscaled = decoder.output_upscaling(image.transpose(1, 2).reshape(source.shape))
    weights = decoder.output_hypernetworks_mlps[0](hidden[0, 1::3])
    return torch.einsum("mc,chw->mhw", weights, upscaled[0])


@pytest.mark.parametrize(("passes", "affected"), [("joint", [True] * 4), ("class_wise", [False, True, False, False])])
def test_classes_see_each_other_in_a_joint_pass_alone(passes, affected):
    model = build(AutoSamVit(passes))
    with torch.no_grad():
        before = model(images())
        model.head.mask_tokens[1] += 1
        after = model(images())
    assert [not torch.equal(before[:, n], after[:, n]) for n in range(4)] == affected


def test_the_reference_form_leaves_sams_positions_and_no_mask_embedding_aside():
    reference, default = build(AutoSamVit(reference=True)), build(AutoSamVit())
    for model, same in ((reference, True), (default, False)):
        embedding = model.embed(images())
        with torch.no_grad():
            before = model.class_logits(embedding)
            model.backbone.prompt_encoder.no_mask_embed.weight += 1
            assert torch.equal(model.class_logits(embedding), before) is same
            model.backbone.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix += 1
            assert torch.equal(model.class_logits(embedding), before) is same


def test_only_the_reference_form_cuts_logits_at_zero():
    with torch.no_grad():
        assert build(AutoSamLinear(reference=True))(images()).min() >= 0
        assert build(AutoSamLinear())(images()).min() < 0


@pytest.mark.parametrize("config", ALL_FORMS.values(), ids=ALL_FORMS)
def test_exactly_what_is_declared_gets_gradients(config):
    model = build(config)
    declared = {name for name in model.trainable() if not any(part in name for part in WITHOUT_EFFECT)}
    assert set(gradients(model)) == declared
    assert all(name.startswith("head.") for name in declared)


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_what_is_frozen_stays_byte_for_byte(config, layout):
    model = build(config, layout=layout)
    learned = model.trainable()
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in learned}
    train(model, images(), labels(), steps=2)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert set(model.backbone.state_dict()) == set(BACKBONES[layout]().state_dict())


@pytest.mark.parametrize("config", ALL_FORMS.values(), ids=ALL_FORMS)
def test_a_model_file_holds_all_that_the_base_does_not(config, tmp_path, monkeypatch):
    model = build(config)
    train(model, images(), labels())
    for name, tensor in model.head.named_buffers():
        tensor += 0.1  # as if another version of torch had drawn it
        assert f"head.{name}" in model.kept()
    loaded = reloaded(model, BACKBONES["fused"], tmp_path, monkeypatch)
    assert loaded.info == model.info
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_one_empty_slice_of_one_class_trains(config, layout):
    model = build(config, ("one",), layout)
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    train(model, images(1), torch.zeros(1, SIZE, SIZE, dtype=torch.long))
    with torch.no_grad():
        logits = model(images(1))
    assert logits.shape == (1, 2, model.backbone.mask_size, model.backbone.mask_size)
    assert torch.isfinite(logits).all()
    assert any(not torch.equal(p, before[name]) for name, p in model.trainable().items())


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_twenty_classes(config, layout):
    model = build(config, names(20), layout)
    train(model, images(), torch.randint(21, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        logits = model(images())
    assert logits.shape == (2, 21, model.backbone.mask_size, model.backbone.mask_size)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_cached_embeddings_give_the_same_masks(config, layout):
    model = build(config, layout=layout)
    with torch.no_grad():
        live = model(images())
        cached = model.class_logits(model.embed_tokens(model.tokens(images()).to(KEPT).float()))
    assert torch.allclose(cached, live, atol=1e-2 * float(live.std()))


@pytest.mark.parametrize(
    ("config", "steps"),
    [(AutoSamVit(), 40), (AutoSamVit("class_wise"), 40), (AutoSamCnn(), 40), (AutoSamLinear(), 200)],
    ids=str,
)
def test_one_slice_is_learned_by_heart(config, steps):
    assert overfit(build(config), steps, rate=1e-3) > 0.95


def test_what_a_head_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="joint, class_wise"):
        AutoSamVit(passes="classwise")
    with pytest.raises(ConfigError, match="multiple of 32"):
        AutoSamCnn(width=100)
