"""Label names as prompts: SAM's decoder answers them, and a name is all that a label's map depends on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from samadapt import recipes
from samadapt.adapters import Frozen
from samadapt.data.labels import LabelMap
from samadapt.errors import ConfigError, WeightsError
from samadapt.heads import TextHead
from samadapt.model import AdaptedModel
from samadapt.text import ClipText, WordVectors, text_encoder
from samadapt.training.losses import class_loss
from tiny import BACKBONES, SIZE

LABELS = ("left kidney", "right kidney", "spleen")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]().requires_grad_(False)


@pytest.fixture
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def clip(tmp_path):
    """A folder like that of CLIP ViT-B/32, with a text encoder of one narrow layer that spells every word."""
    folder = tmp_path / "clip"
    letters = [chr(n) for n in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(words), projection_dim=512, eos_token_id=len(words) - 1, **sizes)
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def embeddings(backbone, count: int = 2) -> torch.Tensor:
    side = backbone.embedding_size
    return torch.randn(count, 256, side, side, generator=torch.Generator().manual_seed(2))


def build(backbone, labels=LABELS, **options):
    return TextHead(**options).build(backbone, LabelMap(labels), seed=0).eval()


def train(model: AdaptedModel, images: torch.Tensor, labels: torch.Tensor, steps: int) -> list[float]:
    """Adam on everything that learns; the loss before each step."""
    optimizer = torch.optim.Adam(model.trainable().values(), lr=5e-3)
    losses = []
    for _ in range(steps):
        model.train()
        loss = class_loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def test_each_label_is_answered_as_a_prompt_by_sam(backbone):
    """Background is 0, and label c what SAM's single mask is for the token of its name, from the same embedding."""
    head, image = build(backbone), embeddings(backbone)
    logits = head.class_logits(image, backbone.prompt_encoder)
    assert logits.shape == (2, 4, backbone.mask_size, backbone.mask_size)
    assert torch.equal(logits[:, 0], torch.zeros_like(logits[:, 0]))
    empty, dense = backbone.prompt_encoder(None, None, None)
    for c, vector in enumerate(head.vectors, start=1):
        sparse = torch.cat([empty, head.affine(vector[None])[:, None]], dim=1)
        for n in range(2):
            masks, _ = backbone.mask_decoder.predict_masks(
                image[n : n + 1], backbone.prompt_encoder.get_dense_pe(), sparse, dense
            )
            assert torch.allclose(logits[n, c], masks[0, 0], atol=1e-4)


@torch.no_grad()
def test_in_reference_form_nothing_has_a_place(backbone, clip):
    """The published code's decoder, written out with SAM's own layers: no dense prompt, no positions, but tokens are
    added to the queries of the last attention."""
    head, image = build(backbone, clip=str(clip), reference=True), embeddings(backbone)
    logits = head.class_logits(image, backbone.prompt_encoder)
    decoder = backbone.mask_decoder
    names = head.affine(head.vectors)[:, None]
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    for n in range(2):
        keys = image[n : n + 1].flatten(2).transpose(1, 2).expand(len(names), -1, -1)
        tokens = queries = torch.cat([own.expand(len(names), -1, -1), names], dim=1)
        for number, layer in enumerate(decoder.transformer.layers):
            attended = layer.self_attn(queries, queries, queries)
            queries = layer.norm1(attended if number == 0 else queries + attended)
            queries = layer.norm2(queries + layer.cross_attn_token_to_image(queries, keys, keys))
            queries = layer.norm3(queries + layer.mlp(queries))
            keys = layer.norm4(keys + layer.cross_attn_image_to_token(keys, queries, queries))
        last = decoder.transformer.final_attn_token_to_image(queries + tokens, keys, keys)
        queries = decoder.transformer.norm_final_attn(queries + last)
        side = backbone.embedding_size
        fine = decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, (side, side)))
        weights = decoder.output_hypernetworks_mlps[0](queries[:, 1])
        torch.testing.assert_close(logits[n, 1:], torch.einsum("kc,kchw->khw", weights, fine), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_labels_in_another_order_are_maps_in_another_order(backbone):
    image, order = embeddings(backbone), [2, 0, 1]
    given = build(backbone).class_logits(image, backbone.prompt_encoder)
    turned = build(backbone, tuple(LABELS[n] for n in order)).class_logits(image, backbone.prompt_encoder)
    assert torch.allclose(turned[:, 1:], given[:, 1:][:, order], atol=1e-4)
    assert not torch.allclose(given[:, 1], given[:, 2], atol=1e-2)


@pytest.mark.parametrize("count", [1, 20])
def test_number_of_labels(backbone, images, count):
    names = tuple(f"organ {n}" for n in range(count))
    model = recipes.build("s_sam", names, backbone, adapter=Frozen())
    labels = torch.randint(0, count + 1, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    before = model(images).detach()
    train(model, images, labels, 1)
    after = model(images).detach()
    assert after.shape[1] == count + 1
    assert torch.isfinite(after).all()
    assert all(not torch.equal(after[:, c], before[:, c]) for c in range(1, count + 1))


@pytest.mark.parametrize("reference", [False, True])
def test_what_learns(backbone, images, reference, clip):
    """The affine layer and the transformer's norms; beside these, unless for reference, all behind the transformer."""
    head = TextHead(clip=str(clip), reference=reference)
    model = recipes.build("s_sam", LABELS, backbone, adapter=Frozen(), head=head)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    labels = torch.randint(0, 4, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    train(model, images, labels, 2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(model.trainable())
    behind = ("own_tokens", "hypernetworks", "upscaling")
    for name, parameter in model.head.labels.named_parameters():
        expected = ".norm" in name
        expected = expected or (name.startswith(behind) and not reference)
        assert parameter.requires_grad == expected, name


def test_one_slice_is_learned(backbone, images):
    """Softmax over 0 and the labels' logits is enough for the project's class loss: every class is found."""
    labels = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    labels[0, 8:32, 8:30] = 1
    labels[0, 40:60, 10:40] = 3
    image = 0.2 * images[:1] + 0.25 * labels[:, None]
    model = recipes.build("s_sam", LABELS, backbone)
    losses = train(model, image, labels, 60)
    assert losses[-1] < 0.5 * losses[0]


def test_labels_that_read_the_same_are_refused(backbone):
    with pytest.raises(ConfigError, match="'left_kidney' and 'Left kidney'"):
        build(backbone, ("left_kidney", "spleen", "Left kidney"))


def test_batch_norm_cannot_learn_from_one_label(backbone):
    head = build(backbone, ("spleen",), reference=True)
    head.vectors.fill_(1)
    with pytest.raises(ConfigError, match="BatchNorm"):
        head.train().class_logits(embeddings(backbone), backbone.prompt_encoder)


@pytest.mark.parametrize("reference", [False, True])
def test_a_model_file_needs_no_text_encoder(backbone, images, reference, clip, tmp_path, monkeypatch, request):
    base = BACKBONES[request.node.callspec.params["backbone"]]
    monkeypatch.setattr("samadapt.backbones.load", lambda name, weights, image_size: base())
    head = TextHead(clip=str(clip), reference=reference)
    model = recipes.build("s_sam", LABELS, backbone, adapter=Frozen(), head=head)
    labels = torch.randint(0, 4, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    train(model, images, labels, 2)
    model.save(tmp_path / "model.safetensors")
    shutil.rmtree(clip)
    text_encoder.cache_clear()
    loaded = AdaptedModel.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_missing_text_encoder_is_named(backbone, tmp_path):
    head = build(backbone, clip=str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"nowhere.*clip-vit-base-patch32"):
        head.class_logits(embeddings(backbone), backbone.prompt_encoder)
    with pytest.raises(WeightsError, match="not given"):
        build(backbone, reference=True).class_logits(embeddings(backbone), backbone.prompt_encoder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="empty"):
        ClipText(str(tmp_path / "empty")).encode(["spleen"])


@pytest.mark.parametrize("kind", ["words", "clip"])
def test_a_vector_depends_on_its_name_alone(kind, clip):
    def encoder():
        return ClipText(str(clip)) if kind == "clip" else WordVectors()

    many = encoder().encode(["liver", "left kidney", "a structure with a much longer name"])
    assert many.shape == (3, encoder().width)
    assert many.dtype == torch.float32
    assert torch.equal(encoder().encode(["left kidney"])[0], many[1])
    assert torch.equal(encoder().encode(["Left_Kidney "])[0], many[1])
    assert not torch.allclose(many[0], many[1], atol=1e-2)


def test_word_vectors_know_what_names_mean():
    names = ["left kidney", "right kidney", "tumor", "tumour", "aorta"]
    near = torch.nn.functional.normalize(WordVectors().encode(names))
    near = near @ near.T
    assert near[0, 1] > 0.5
    assert near[2, 3] > 0.5
    assert max(near[0, 2], near[0, 4], near[2, 4]) < 0.3


@pytest.mark.parametrize("name", ["脾", "___", "1", "Bauchspeicheldrüse", "a" * 300])
def test_every_name_has_a_vector(name):
    assert torch.isfinite(WordVectors().encode([name])).all()
