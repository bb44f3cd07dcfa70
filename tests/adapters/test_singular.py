"""S-SAM's encoder: identity at the start, the paper's formula and counts, and factors that are computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from samadapt import backbones, recipes
from samadapt.adapters import SingularAdapter
from samadapt.adapters.singular import SingularLayer, SingularLinear, decompose
from samadapt.errors import ConfigError
from samadapt.heads import TextHead
from samadapt.model import AdaptedModel
from samadapt.training.losses import class_loss
from tiny import BACKBONES, SIZE

LABELS = ("left", "right", "tumour")
SHA = "5" * 64

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BACKBONES, ids=str)
def layout(request):
    return request.param


@pytest.fixture(params=[None, "late"], ids=["all", "late"])
def blocks(request):
    return request.param


@pytest.fixture
def model(layout, blocks) -> AdaptedModel:
    return recipes.build("s_sam", LABELS, BACKBONES[layout](), adapter=SingularAdapter(blocks))


@pytest.fixture
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def step(model: AdaptedModel, images: torch.Tensor) -> None:
    """One step along the sign of the gradient of every parameter that has one."""
    labels = torch.randint(0, len(LABELS) + 1, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    model.train()
    class_loss(model(images), labels).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad.sign()
                parameter.grad = None
    model.eval()


def singular_layers(module: torch.nn.Module) -> dict[str, SingularLayer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, SingularLayer)}


def count(sizes: dict[str, int], *parts: str) -> int:
    return sum(size for name, size in sizes.items() if any(part in name for part in parts))


@pytest.mark.parametrize(("size", "positions"), [(256, 196_608), (512, 786_432), (1024, 3_145_728)])
def test_parameters_of_the_published_code(size, positions):
    """methods.md, 3.2: SAM ViT-B, each group and the total."""
    with torch.device("meta"):
        recipe = replace(recipes.get("s_sam"), head=TextHead(reference=True))
        model = recipes.build(recipe, ("liver", "spleen"), backbones.build("sam_vit_b", size))
    sizes = {name: parameter.numel() for name, parameter in model.trainable().items()}
    encoder = {name: number for name, number in sizes.items() if name.startswith("backbone.")}
    assert count(encoder, ".scale", ".shift") == 74_752
    assert count(encoder, ".norm") == 36_864
    assert count(encoder, ".position") == positions
    assert count(sizes, "head.labels.") == 4_608
    assert count(sizes, "head.affine.") == 131_840
    assert sum(sizes.values()) == {256: 444_672, 512: 1_034_496, 1024: 3_393_792}[size]


@pytest.mark.parametrize(("name", "values", "norms"), [("sam_vit_l", 197_632, 98_304), ("sam_vit_h", 328_704, 163_840)])
def test_parameters_with_larger_encoders(name, values, norms):
    with torch.device("meta"):
        backbone = backbones.build(name, 256).requires_grad_(False)
        SingularAdapter().inject(backbone, 0)
    sizes = {name: p.numel() for name, p in backbone.named_parameters() if p.requires_grad}
    assert count(sizes, ".scale", ".shift") == values
    assert count(sizes, ".norm") == norms


def test_the_reference_form_is_of_all_blocks(images):
    adapter = SingularAdapter(reference=True)
    own, stripped = (
        recipes.build("s_sam", LABELS, BACKBONES["fused"](), adapter=a) for a in (SingularAdapter(), adapter)
    )
    assert set(own.trainable()) == set(stripped.trainable())
    with torch.no_grad():
        assert not torch.allclose(own.embed(images), stripped.embed(images), atol=1e-2)
    with pytest.raises(ConfigError, match="every block"):
        recipes.build("s_sam", LABELS, BACKBONES["fused"](), adapter=replace(adapter, blocks="late"))


@torch.no_grad()
def test_nothing_changes_at_first(model, layout, images):
    assert torch.allclose(model.embed(images), BACKBONES[layout]().embed(images), atol=1e-4)


def test_adapted_layers(layout):
    """Four linear layers of every block with attention, and the neck's two convolutions with the last block."""
    backbone = BACKBONES[layout]()
    SingularAdapter().inject(backbone, 0)
    attention = backbone.attention_layers()
    assert len(singular_layers(backbone)) == 4 * len(attention) + 2
    first = BACKBONES[layout]().requires_grad_(False)
    assert SingularAdapter((attention[0].block,)).inject(first, 0) == attention[0].block
    assert len(singular_layers(first)) == 4
    assert not any(p.requires_grad for name, p in first.named_parameters() if "neck" in name)


def test_late_blocks_leave_the_rest_alone(layout):
    backbone = BACKBONES[layout]().requires_grad_(False)
    first = SingularAdapter("late").inject(backbone, 0)
    assert first == backbone.late_block
    early = [module for step in backbone.image_encoder.steps()[:first] for module in step]
    assert not any(p.requires_grad for module in early for p in module.parameters())
    assert not any("position" in name for name, p in backbone.named_parameters() if p.requires_grad)


@torch.no_grad()
def test_singular_values_are_scaled_shifted_and_cut_at_zero(layout):
    """Twice every value is twice the weight, a shift adds to each value, and far below zero nothing is left."""
    backbone, base = BACKBONES[layout](), BACKBONES[layout]()
    SingularAdapter().inject(backbone, 0)
    names = list(singular_layers(backbone))
    for layer in singular_layers(backbone).values():
        layer.scale.fill_(2)
        layer.shift.fill_(0.25)
    SingularAdapter().merge(backbone)
    plain = {name: base.get_submodule(name.replace(".base.", ".")).weight.flatten(1) for name in names}
    for name, weight in plain.items():
        merged = backbone.get_submodule(name.replace(".base.", ".")).weight.flatten(1)
        expected = 2 * torch.linalg.svdvals(weight) + 0.25
        assert torch.allclose(torch.linalg.svdvals(merged), expected, atol=1e-4)
    emptied = BACKBONES[layout]()
    SingularAdapter().inject(emptied, 0)
    for layer in singular_layers(emptied).values():
        layer.shift.fill_(-1e3)
    SingularAdapter().merge(emptied)
    for name in names:
        assert emptied.get_submodule(name.replace(".base.", ".")).weight.abs().max() < 1e-4


def test_directions_that_a_weight_does_not_have_never_learn():
    """Their singular vectors are another machine's choice, while a model file holds what was learned along them."""
    base = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    base.weight[:, 5:] = 0
    layer = SingularLinear(base, decompose(base.weight, None))
    layer(torch.randn(16, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    for learned in (layer.scale.grad, layer.shift.grad):
        assert (learned[:5] != 0).all()
        assert (learned[5:] == 0).all()


def test_merging_what_learned_nothing_gives_the_base(model, layout):
    model.merge()
    own, base = model.backbone.state_dict(), BACKBONES[layout]().state_dict()
    assert set(own) == set(base)
    assert all(torch.equal(own[name], tensor) for name, tensor in base.items())


@torch.no_grad()
def test_merged_equals_unmerged(model, layout, images):
    with torch.enable_grad():
        step(model, images)
    before = model.embed(images)
    assert not torch.allclose(before, BACKBONES[layout]().embed(images), atol=1e-2)
    model.merge()
    assert torch.allclose(model.embed(images), before, atol=1e-4)
    assert set(model.backbone.state_dict()) == set(BACKBONES[layout]().state_dict())
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_what_is_declared_changes_and_nothing_else(model, images):
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    factors = {name: layer.left.clone() for name, layer in singular_layers(model).items()}
    declared = {name for name in model.trainable() if name.startswith("backbone.")}
    step(model, images)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if name.startswith("backbone.")} == declared
    assert all(torch.equal(layer.left, factors[name]) for name, layer in singular_layers(model).items())


def test_what_enters_the_first_block_never_learns(model, images):
    before = model.tokens(images)
    step(model, images)
    with torch.no_grad():
        assert torch.equal(model.tokens(images), before)
        assert torch.equal(model.embed_tokens(before), model.embed(images))


def test_save_and_load_are_exact(model, layout, images, tmp_path, monkeypatch):
    monkeypatch.setattr("samadapt.backbones.load", lambda name, weights, image_size: BACKBONES[layout]())
    step(model, images)
    model.save(tmp_path / "model.safetensors")
    loaded = AdaptedModel.load(tmp_path / "model.safetensors")
    assert loaded.info == model.info
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


class TestFactorsOnDisk:
    """They are found again for the same base weights, and never believed when they are wrong."""

    NAME = "image_encoder.neck.2"

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SAMADAPT_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache" / "svd" / SHA

    def inject(self, layout: str, sha256: str = SHA):
        backbone = BACKBONES[layout]()
        backbone.weights_sha256 = sha256
        SingularAdapter().inject(backbone, 0)
        return backbone

    def layer(self, backbone) -> SingularLayer:
        return singular_layers(backbone)[self.NAME]

    def test_are_used_again(self, layout, folder):
        left = self.layer(self.inject(layout)).left
        file = folder / f"{self.NAME}.safetensors"
        marked = load_file(file)  # a vector turned round on both sides: the same weight, and not what a computer finds
        marked["left"][:, 0] *= -1
        marked["right"][0] *= -1
        save_file(marked, file)
        assert torch.equal(self.layer(self.inject(layout)).left, marked["left"])
        assert not torch.equal(marked["left"], left)

    def test_one_file_for_each_layer_and_nothing_half_written(self, layout, folder):
        backbone = self.inject(layout)
        names = {f"{name.replace('.base.', '.')}.safetensors" for name in singular_layers(backbone)}
        assert {file.name for file in folder.iterdir()} == names

    @pytest.mark.parametrize(
        "damage", ["cut", "text", "another weight", "another shape", "not a number", "other names"]
    )
    def test_are_made_again_when_damaged(self, layout, folder, damage):
        left = self.layer(self.inject(layout)).left
        file = folder / f"{self.NAME}.safetensors"
        good = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "text":
            file.write_text("no tensors")
        elif damage == "another weight":
            save_file(good | {"values": good["values"] * 1.01}, file)
        elif damage == "another shape":
            save_file({name: tensor[:7].contiguous() for name, tensor in good.items()}, file)
        elif damage == "not a number":
            save_file(good | {"right": good["right"] * torch.nan}, file)
        else:
            save_file({f"old_{name}": tensor for name, tensor in good.items()}, file)
        assert torch.equal(self.layer(self.inject(layout)).left, left)
        assert all(torch.equal(tensor, good[name]) for name, tensor in load_file(file).items())

    def test_random_weights_leave_no_file(self, layout, tmp_path):
        self.inject(layout, sha256="")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written_to_costs_time_alone(self, layout, tmp_path):
        (tmp_path / "cache").write_text("a file where the folder should be")
        assert len(singular_layers(self.inject(layout))) > 0
