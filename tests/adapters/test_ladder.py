"""SAM-LST's side network: nothing changes at first, then it learns, and no norm remembers what it has seen."""

from __future__ import annotations

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from one_slice import LABELS, gradients, images, labels, overfit, reloaded, train
from samadapt import recipes
from samadapt.adapters import Ladder
from samadapt.encoding import KEPT
from samadapt.errors import WeightsError
from samadapt.heads import SamHead
from tiny import BACKBONES, SIZE

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {"default": Ladder(), "reference": Ladder(reference=True)}


@pytest.fixture(params=BACKBONES)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def resnet():
    """torchvision's ResNet-18, random, with statistics that differ from those of a new one."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "running_" in name:
                tensor += 0.2
    return network.eval()


def build(side: Ladder, names=LABELS, layout: str = "fused", **overrides):
    return recipes.build("sam_lst", names, BACKBONES[layout](), side=side, **overrides)


def test_the_reference_form_learns_as_many_parameters_as_the_papers():
    model = build(Ladder(reference=True), head=SamHead("upscaling", prompted=False))
    found = gradients(model)
    assert sum(tensor.numel() for tensor in found.values()) == 2_856_737
    assert sum(tensor.numel() for name, tensor in found.items() if "side.cnn" in name) == 2_782_784
    assert set(found) == set(model.trainable())


def test_a_head_without_prompts_finds_the_same_classes(layout):
    alone, both = (build(Ladder(), layout=layout, head=SamHead(prompted=prompted)) for prompted in (False, True))
    assert alone.head.prompts == ("none",)
    assert not alone.takes_prompts
    with torch.no_grad():
        assert torch.equal(alone(images()), both(images()))


@torch.no_grad()
def test_the_first_embedding_is_sams(layout):
    model = build(Ladder(), layout=layout)
    assert torch.allclose(model.embed(images()), BACKBONES[layout]().embed(images()), atol=1e-4)


@torch.no_grad()
def test_the_reference_form_starts_with_half_of_each(layout):
    model = build(Ladder(reference=True), layout=layout)
    sams, cnns = BACKBONES[layout]().embed(images()), model.side.cnn(images())
    side = sams.shape[-1]
    assert cnns.shape == (2, 256, SIZE // 16, SIZE // 16)
    found = 2 * model.embed(images()) - sams
    coarse = torch.nn.functional.avg_pool2d(found, side // cnns.shape[-1])
    assert torch.allclose(coarse.mean(dim=(2, 3)), cnns.mean(dim=(2, 3)), atol=0.15 * float(cnns.std()))
    if layout == "fused":  # S/16 like the CNN's: nothing to enlarge
        assert torch.allclose(found, cnns, atol=1e-4)


@pytest.mark.parametrize("side", FORMS.values(), ids=FORMS)
def test_every_declared_parameter_learns_from_the_second_step_on(side, layout):
    model = build(side, layout=layout, head=SamHead("classes", prompted=False))
    train(model, images(), labels())
    found = gradients(model)
    assert set(found) == set(model.trainable())
    assert [name for name, tensor in found.items() if name.startswith("side.") and not tensor.any()] == []


@pytest.mark.parametrize("side", FORMS.values(), ids=FORMS)
def test_the_encoder_stays_byte_for_byte(side, layout):
    model, base = build(side, layout=layout), BACKBONES[layout]().state_dict()
    train(model, images(), labels(), steps=2)
    own = model.backbone.state_dict()
    assert set(own) == set(base)
    assert all(torch.equal(own[name], tensor) for name, tensor in base.items())


def test_the_default_form_embeds_in_training_as_it_does_after(layout):
    model = build(Ladder(), layout=layout)
    train(model, images(), labels(), steps=2)
    with torch.no_grad():
        after = model.embed(images())
        model.train()
        assert torch.equal(model.embed(images()), after)
        assert torch.allclose(model.embed(images()[:1]), after[:1], atol=1e-4)  # whoever else is in the batch


def test_running_statistics_stand_still_while_the_head_learns_alone():
    model = build(Ladder(reference=True))
    train(model, images(), labels())
    before = model.embed(images())
    key = model.encoder_key()
    model.freeze_encoder()
    model.train()
    assert torch.equal(model.embed(images()), before)
    assert model.encoder_key() == key
    model.release_encoder()
    model.train()
    model.embed(images())
    assert model.encoder_key() != key


@pytest.mark.parametrize("side", FORMS.values(), ids=FORMS)
def test_a_model_file_holds_the_whole_network(side, layout, tmp_path, monkeypatch):
    model = build(side, layout=layout)
    train(model, images(), labels(), steps=2)
    loaded = reloaded(model, BACKBONES[layout], tmp_path, monkeypatch)
    assert loaded.info == model.info
    assert loaded.encoder_key() == model.encoder_key()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_imagenet_features_are_torchvisions(resnet, suffix, tmp_path):
    path = tmp_path / f"resnet18{suffix}"
    state = resnet.state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    model = build(Ladder(weights=str(path)))
    expected = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    x = torchvision.transforms.functional.normalize(images(), expected.mean, expected.std)
    for stage in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
        x = resnet.get_submodule(stage)(x)
    model.train()
    with torch.no_grad():
        assert torch.allclose(model.side.cnn(model.side.normalise(images())), x, atol=1e-3 * float(x.std()))
        assert torch.allclose(model.embed(images()), BACKBONES["fused"]().embed(images()), atol=1e-4)


@pytest.mark.parametrize("reference", [False, True])
def test_a_model_needs_the_imagenet_file_no_more(resnet, reference, tmp_path, monkeypatch):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    model = build(Ladder(weights=str(path), reference=reference))
    assert torch.equal(model.side.cnn.conv1.weight, resnet.conv1.weight)
    path.unlink()
    train(model, images(), labels())
    loaded = reloaded(model, BACKBONES["fused"], tmp_path, monkeypatch)
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_other_files_than_resnet18_are_refused(resnet, tmp_path):
    state = resnet.state_dict()
    torch.save(state, tmp_path / "resnet18-f37072fd.pth")
    torch.save({name: tensor for name, tensor in state.items() if "layer3.1" not in name}, tmp_path / "short.pth")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    torch.save(resnet, tmp_path / "pickled.pth")
    faults = {
        "resnet18-f37072fd.pth": "SHA-256",
        "short.pth": r"missing: layer3\.1",
        "resnet34.pth": r"unexpected: layer1\.2",
        "pickled.pth": "without executing code",
        "absent.pth": "no such weights file",
    }
    for name, message in faults.items():
        with pytest.raises(WeightsError, match=message):
            build(Ladder(weights=str(tmp_path / name)))


@pytest.mark.parametrize("side", FORMS.values(), ids=FORMS)
def test_one_empty_slice_of_one_class_trains(side, layout):
    model = build(side, ("one",), layout)
    train(model, images(1), torch.zeros(1, SIZE, SIZE, dtype=torch.long), steps=2)
    with torch.no_grad():
        logits = model(images(1))
    assert logits.shape == (1, 2, model.backbone.mask_size, model.backbone.mask_size)
    assert torch.isfinite(logits).all()


def test_twenty_classes(layout):
    model = build(Ladder(), tuple(f"class {n}" for n in range(20)), layout)
    train(model, images(), torch.randint(21, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(0)))
    assert model(images()).shape == (2, 21, model.backbone.mask_size, model.backbone.mask_size)


@pytest.mark.parametrize("side", FORMS.values(), ids=FORMS)
def test_cached_tokens_give_the_same_embedding(side, layout):
    model = build(side, layout=layout)
    train(model, images(), labels(), steps=2)
    with torch.no_grad():
        live = model.embed(images())
        cached = model.embed_tokens(model.tokens(images()).to(KEPT).float())
    assert torch.allclose(cached, live, atol=1e-2 * float(live.std()))


def test_one_slice_is_learned_by_heart():
    model = build(Ladder(), head=SamHead("classes", prompted=False))
    assert overfit(model, steps=60, rate=3e-3) > 0.95
