"""What every adapted model promises, whatever its recipe and backbone. A new recipe is a new row here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from segment_anything.modeling import Sam

import one_slice
from samadapt import recipes
from samadapt.adapters import Ladder, LoraConfig
from samadapt.adapters.qkv import fuse_attention
from samadapt.backbones.base import IMAGES
from samadapt.config import AppConfig
from samadapt.errors import ConfigError, InputError, StateError
from samadapt.heads import TextHead
from samadapt.model import AdaptedModel, read_info
from samadapt.training.losses import class_loss, prompt_loss
from tiny import BACKBONES, SIZE

LABELS = ("left", "right", "tumour")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BACKBONES, ids=str)
def layout(request):
    return request.param


RECIPES = [name for name in recipes.names() if not name.startswith("ft/") or name.startswith("ft/mobile_sam/")]
"""The finetune-SAM study's are the same for each backbone, which is given here anyway."""


def layouts(recipe: str) -> list[str]:
    """peft's tuners see plain linear layers in both; frod needs layers of one width, which TinyViT has not."""
    if not recipe.startswith("peft/"):
        return list(BACKBONES)
    return ["fused" if recipe == "peft/frod" else "per_head"]


ROWS = [(recipe, layout) for recipe in RECIPES for layout in layouts(recipe)]


@pytest.fixture(params=ROWS, ids="-".join)
def row(request):
    """A recipe's name, and that of a layout."""
    return request.param


@pytest.fixture
def model(row) -> AdaptedModel:
    recipe, layout = row
    return recipes.build(recipe, LABELS, BACKBONES[layout]())


def test_a_tuner_that_does_not_fit_the_backbone_is_refused():
    with pytest.raises(ConfigError, match=r"frod does not fit these layers .* These fit: .*lora"):
        recipes.build("peft/frod", LABELS, BACKBONES["per_head"]())


@pytest.fixture
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    labels = torch.zeros(2, SIZE, SIZE, dtype=torch.long)
    labels[0, 8:24, 8:30] = 1
    labels[0, 40:60, 10:20] = 3
    labels[1, 30:50, 30:50] = 2
    return labels


def step(model: AdaptedModel, images, labels, rate: float = 1e-2) -> None:
    """One optimiser step on every parameter that has a gradient."""
    model.train()
    embeddings = model.embed(images)
    loss = class_loss(model.class_logits(embeddings), labels)
    if model.takes_prompts:
        loss = loss + prompt_loss(model, embeddings, labels, torch.Generator().manual_seed(0))
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    model.eval()


def box_masks(model, embedding, multimask=False):
    boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0], [20.0, 20.0, 60.0, 61.0]])
    return model.prompt_masks(embedding, boxes=boxes, multimask=multimask)


@torch.no_grad()
def test_identity_at_start(model, row, images):
    """An untrained model embeds as the base SAM, and answers prompts as it does: mask and predicted IoU."""
    base = BACKBONES[row[1]]()
    sam = Sam(base.image_encoder, base.prompt_encoder, base.mask_decoder)
    embedding = base.embed(images[:1])
    if not model.head.reads_images:
        assert torch.allclose(model.embed(images[:1]), embedding, atol=1e-4)
    if not model.takes_prompts:
        with pytest.raises(StateError, match="answers no points or boxes"):
            box_masks(model, embedding)
        return
    boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0], [20.0, 20.0, 60.0, 61.0]])
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    for multimask in (False, True):
        expected = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        found = box_masks(model, model.embed(images[:1]), multimask)
        assert torch.allclose(found[0], expected[0], atol=1e-4)
        assert torch.allclose(found[1], expected[1], atol=1e-4)


def test_start_of_classes_is_defined(layout, images):
    """Class tokens are copies of the multimask tokens: the same on every build, and no class starts far ahead."""
    first, second = (recipes.build("lora", LABELS, BACKBONES[layout]()) for _ in range(2))
    with torch.no_grad():
        logits = first(images)
        assert torch.equal(logits, second(images))
    assert logits.shape == (2, len(LABELS) + 1, first.backbone.mask_size, first.backbone.mask_size)
    source = first.backbone.mask_decoder.mask_tokens.weight
    for c, token in enumerate(first.head.classes.class_tokens):
        assert torch.dist(token, source[1 + c % 3]) < 0.2 * source[1 + c % 3].norm()


def test_only_declared_parameters_get_gradients_and_change(model, images, labels):
    declared = set(model.trainable())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    step(model, images, labels)
    step(model, images, labels)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= declared
    assert {name for name, p in model.named_parameters() if p.requires_grad} == declared
    inner = {name for name in declared if not name.startswith("head.")}
    if model.info.recipe.adapter.kind == "peft":  # some tuners learn one factor at a time
        assert bool(inner & changed) == bool(inner)
    else:
        assert inner <= changed
    assert any(name.startswith("head.") for name in changed)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_tokens_before_the_first_trainable_block_stay_and_give_the_same_embedding(model, images, labels):
    before = model.tokens(images)
    step(model, images, labels)
    with torch.no_grad():
        assert torch.equal(model.tokens(images), before)
        assert torch.equal(model.embed_tokens(before), model.embed(images))


@torch.no_grad()
def test_an_encoder_may_be_cut_before_any_block(layout, images):
    base = BACKBONES[layout]()
    for block in range(IMAGES, base.attention_layers()[-1].block + 2):
        assert torch.equal(base.embed_tokens(base.tokens(images, block), block), base.embed(images))


@torch.no_grad()
def test_a_sam_encoder_in_two_parts_is_the_package_s_own(images):
    from segment_anything.modeling import ImageEncoderViT

    encoder = BACKBONES["fused"]().image_encoder
    assert torch.equal(encoder.second_part(encoder.first_part(images, 1), 1), ImageEncoderViT.forward(encoder, images))


@pytest.mark.parametrize("recipe", ["lora", "lora_late", "samed"])
def test_base_weights_unchanged_after_training(recipe, layout, images, labels):
    """With the adapter taken out, the encoder is byte for byte the base's."""
    model, base = recipes.build(recipe, LABELS, BACKBONES[layout]()), BACKBONES[layout]()
    step(model, images, labels)
    for module in list(model.backbone.modules()):
        if hasattr(module, "lora_B"):
            for matrix in module.lora_B.values():
                torch.nn.init.zeros_(matrix.weight)
    model.merge()
    own = model.backbone.state_dict()
    assert set(own) == set(base.state_dict())
    assert all(torch.equal(own[name], tensor) for name, tensor in base.state_dict().items())


def test_a_merged_encoder_is_laid_out_as_the_base_s(model, row, images, labels):
    """Where an adapter is linear, what is left after merging is a plain checkpoint of the base's architecture."""
    if model.info.recipe.adapter.kind == "bottleneck":
        pytest.skip("a bottleneck cannot be folded into weights")
    step(model, images, labels)
    model.merge()
    assert set(model.backbone.state_dict()) == set(BACKBONES[row[1]]().state_dict())


@torch.no_grad()
def test_merged_equals_unmerged(model, images, labels):
    with torch.enable_grad():
        step(model, images, labels)
    before = model(images)
    model.merge()
    assert torch.allclose(model(images), before, atol=1e-4)
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_save_and_load_are_exact(model, row, images, labels, tmp_path, monkeypatch):
    monkeypatch.setattr("samadapt.backbones.load", lambda name, weights, image_size: BACKBONES[row[1]]())
    step(model, images, labels)
    model.describe(trained=True, training={"cases": ["a"]})
    model.save(tmp_path / "model.safetensors")
    loaded = AdaptedModel.load(tmp_path / "model.safetensors")
    assert loaded.info == model.info
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    if model.takes_prompts:
        assert torch.equal(box_masks(loaded, loaded.embed(images[:1]))[0], box_masks(model, model.embed(images[:1]))[0])


def test_a_new_process_predicts_the_same(layout, images, labels, tmp_path):
    """Every recipe in one new process, since starting it takes longer than all the rest."""
    torch.save(images, tmp_path / "images.pt")
    expected = {}
    rows = [recipe for recipe, own in ROWS if own == layout]
    for number, name in enumerate(rows):
        model = recipes.build(name, LABELS, BACKBONES[layout]())
        step(model, images, labels)
        model.save(tmp_path / f"{number}.safetensors")
        with torch.no_grad():
            expected[name] = model(images)
    program = (
        "import sys, torch; torch.set_num_threads(1); torch.set_grad_enabled(False)\n"
        "from pathlib import Path\n"
        "from tiny import BACKBONES\n"
        "import samadapt.backbones as b\n"
        f"b.load = lambda name, weights, image_size: BACKBONES[{layout!r}]()\n"
        "from samadapt.model import AdaptedModel\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "images = torch.load(folder / 'images.pt', weights_only=True)\n"
        f"found = [AdaptedModel.load(folder / f'{{n}}.safetensors')(images) for n in range({len(rows)})]\n"
        "torch.save(found, folder / 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=_environment())
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert [name for name, logits in zip(rows, found, strict=True) if not torch.equal(logits, expected[name])] == []


def test_a_merged_model_refuses_to_be_saved(model, tmp_path):
    model.merge()
    with pytest.raises(StateError, match="merge"):
        model.save(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_batch_of_one_one_class_and_empty_slice_train(row, images):
    recipe, layout = row
    model = recipes.build(recipe, ("one",), BACKBONES[layout]())
    before = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    step(model, images[:1], torch.zeros(1, SIZE, SIZE, dtype=torch.long))
    assert torch.isfinite(model(images[:1])).all()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.trainable().items())


def test_twenty_classes(row, images):
    recipe, layout = row
    model = recipes.build(recipe, tuple(f"organ {n}" for n in range(20)), BACKBONES[layout]())
    labels = torch.randint(0, 21, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    step(model, images, labels)
    assert model(images).shape[1] == 21


def test_prompts_still_matter_after_training(model, images, labels):
    if not model.takes_prompts:
        pytest.skip("the recipe takes no prompts")
    step(model, images, labels)
    with torch.no_grad():
        masks, _ = box_masks(model, model.embed(images[:1]))
    assert not torch.allclose(masks[0], masks[1], atol=1e-3)


@pytest.mark.parametrize(
    "recipe",
    ["lora", "samed", "s_sam", "unet", *(f"ft/mobile_sam/encoder+decoder/{m}" for m in ("vanilla", "adapter"))],
)
def test_one_slice_can_be_learned_by_heart(recipe):
    """AutoSAM's heads and SAM-LST's ladder: see their own tests."""
    model = recipes.build(recipe, one_slice.LABELS, BACKBONES["fused"]())
    assert one_slice.overfit(model, steps=100, rate=3e-3) > 0.95


def test_a_model_file_of_the_first_version_still_loads_its_recipe():
    """It named LoRA's fields without a kind, and neither side network nor head."""
    adapter = {"rank": 8, "alpha": 8, "dropout": 0.0, "targets": ["q", "v"], "blocks": "late"}
    value = {"name": "lora_late", "summary": recipes.get("lora_late").summary, "adapter": adapter, "seed": 0}
    assert recipes.Recipe.from_dict(value) == recipes.get("lora_late")


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_survives_its_way_through_json(name):
    recipe = recipes.get(name)
    assert recipes.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_adapter_hits_q_and_v_alone(layout, images):
    """An update of q alone changes exactly the q channels of the fused projection."""
    model = recipes.build("lora", LABELS, BACKBONES[layout](), adapter=LoraConfig(targets=("q",)))
    base = BACKBONES[layout]()
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.merge()
    for layer in base.attention_layers():
        new, old = (b.get_submodule(layer.name).weight for b in (model.backbone, base))
        changed = (new != old).any(dim=1).nonzero()[:, 0]
        assert set(changed.tolist()) == set(layer.layout.channels("q").tolist())


def test_lora_parameter_count_is_sameds():
    """147,456 for ViT-B, rank 4, q and v of all blocks (methods: SAMed)."""
    from samadapt import backbones

    with torch.device("meta"):
        backbone = backbones.build("sam_vit_b", 256).requires_grad_(False)
    backbone = backbone.to_empty(device="cpu")
    LoraConfig(rank=4, alpha=4).inject(backbone, 0)
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 147_456


def test_files_that_are_no_models_are_named(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        read_info(path)
    with pytest.raises(InputError, match=r"missing\.safetensors"):
        read_info(tmp_path / "missing.safetensors")


def test_splitting_and_fusing_is_exact(layout):
    from samadapt.adapters.qkv import split_attention

    backbone, base = BACKBONES[layout](), BACKBONES[layout]()
    for layer in backbone.attention_layers():
        split_attention(backbone, layer)
    fuse_attention(backbone)
    own = backbone.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in base.state_dict().items())


def _environment():
    import os
    from pathlib import Path

    tests = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent / "lib"), str(tests)])}


def test_settings_reach_the_parts_that_they_are_for(tmp_path):
    weights = tmp_path / "resnet18.pth"
    weights.write_bytes(b"x")
    clip = recipes.configured(AppConfig.from_strings({"recipe": "s_sam", "clip": str(tmp_path)}))
    assert clip.head == TextHead(clip=str(tmp_path))
    ladder = recipes.configured(AppConfig.from_strings({"recipe": "sam_lst", "ladder_weights": str(weights)}))
    assert ladder.side == Ladder(weights=str(weights))
    published = recipes.configured(AppConfig.from_strings({"recipe": "s_sam", "form": "reference"}))
    assert published == recipes.reference("s_sam")


@pytest.mark.parametrize(
    "values",
    [{"clip": "FOLDER"}, {"recipe": "s_sam", "ladder_weights": "FILE"}, {"recipe": "lora", "form": "reference"}],
)
def test_settings_that_are_for_nothing_are_refused(tmp_path, values):
    (tmp_path / "file").write_bytes(b"x")
    places = {"FOLDER": str(tmp_path), "FILE": str(tmp_path / "file")}
    config = AppConfig.from_strings({key: places.get(text, text) for key, text in values.items()})
    with pytest.raises(ConfigError, match=next(key for key in values if key != "recipe")):
        recipes.configured(config)
