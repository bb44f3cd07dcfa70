"""SAM's ViT through the registry's builder against segment_anything's own model."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn

from samadapt import backbones
from samadapt.backbones.sam_attention import strip
from samadapt.backbones.sam_vit import build_sam_vit, resize_positions

# 13 blocks: choosing blocks by the digits in a key's name would take 1, 10, 11 and 12 for global as well.
SIZES = {"dim": 32, "depth": 13, "heads": 2, "window": 3}
GLOBAL = (1, 4)


def tiny(image_size: int):
    return build_sam_vit(image_size, name="tiny", global_blocks=GLOBAL, **SIZES).eval()


def randomised(backbone):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.image_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return backbone


def reference_encoder(image_size: int) -> ImageEncoderViT:
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=SIZES["dim"],
        depth=SIZES["depth"],
        num_heads=SIZES["heads"],
        window_size=SIZES["window"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=GLOBAL,
    ).eval()


def encoder_state(backbone):
    prefix = "image_encoder."
    return {k.removeprefix(prefix): v for k, v in backbone.state_dict().items() if k.startswith(prefix)}


@pytest.mark.parametrize("image_size", [32, 80, 96, 128])
def test_embedding_is_sams(image_size):
    """Windows of 3 tokens on grids of 2, 5, 6 and 8: smaller than a window, cut at the edge, whole."""
    backbone = randomised(tiny(image_size))
    sam = Sam(reference_encoder(image_size), backbone.prompt_encoder, backbone.mask_decoder)
    sam.image_encoder.load_state_dict(encoder_state(backbone))
    images = torch.rand(2, 3, image_size, image_size)
    with torch.no_grad():
        expected = sam.image_encoder(sam.preprocess(images * 255.0))
        torch.testing.assert_close(backbone.embed(images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("image_size", [64, 96])
def test_a_stripped_encoder_is_the_package_s_by_its_defaults(image_size):
    """What S-SAM's published code makes of a checkpoint: global attention, no relative positions, eps 1e-5."""
    backbone = randomised(tiny(image_size))
    sizes = {"embed_dim": SIZES["dim"], "depth": SIZES["depth"], "num_heads": SIZES["heads"]}
    expected = ImageEncoderViT(img_size=image_size, **sizes).eval()
    dropped = expected.load_state_dict(encoder_state(backbone), strict=False)
    assert not dropped.missing_keys
    for block in backbone.image_encoder.blocks:
        strip(block)
    images = torch.rand(2, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(backbone.image_encoder(images), expected(images), atol=1e-4, rtol=1e-4)


def test_positions_are_untouched_at_the_trained_size():
    backbone = tiny(128)
    state = backbone.state_dict()
    resized = resize_positions(state, backbone)
    assert all(resized[key] is tensor for key, tensor in state.items())


@pytest.mark.parametrize("image_size", [80, 208])
def test_positions_are_resized_by_block_and_equal_sams_own_interpolation(image_size):
    trained, other = randomised(tiny(128)), tiny(image_size)
    grid = image_size // 16
    resized = resize_positions(trained.state_dict(), other)
    other.load_state_dict(resized)
    changed = {key for key, tensor in trained.state_dict().items() if resized[key].shape != tensor.shape}
    assert changed == {"image_encoder.pos_embed"} | {
        f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in GLOBAL for axis in "hw"
    }
    assert resized["image_encoder.blocks.4.attn.rel_pos_h"].shape == (2 * grid - 1, 16)

    # segment_anything interpolates a table of the wrong length at every forward pass; only pos_embed it cannot.
    reference = reference_encoder(128)
    reference.load_state_dict(encoder_state(trained))
    table = F.interpolate(reference.pos_embed.detach().permute(0, 3, 1, 2), (grid, grid), mode="bilinear")
    reference.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1))
    images = torch.rand(1, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(other.embed(images), reference(other.normalise(images)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("letter", ["b", "l", "h"])
def test_registered_sizes_and_keys_are_metas(letter):
    with torch.device("meta"):  # shapes only: ViT-H holds 2.5 GB
        ours, theirs = backbones.build(f"sam_vit_{letter}"), sam_model_registry[f"vit_{letter}"]()

    def shapes(model):
        return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}

    def windows(model):
        return [block.window_size for block in model.image_encoder.blocks]

    assert shapes(ours) == shapes(theirs)
    assert windows(ours) == windows(theirs)
    assert ours.embedding_size == 64
    assert ours.mask_size == 256
    key, shape = backbones.spec(f"sam_vit_{letter}").signature
    assert shapes(ours)[key] == shape


def test_prompts_and_gradients_at_another_size():
    backbone = randomised(tiny(80))
    images = torch.rand(1, 3, 80, 80, requires_grad=True)
    sparse, dense = backbone.prompt_encoder(points=None, boxes=torch.tensor([[5.0, 5.0, 60.0, 70.0]]), masks=None)
    masks, iou = backbone.mask_decoder(
        image_embeddings=backbone.embed(images),
        image_pe=backbone.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    assert masks.shape == (1, 3, backbone.mask_size, backbone.mask_size) == (1, 3, 20, 20)
    assert iou.shape == (1, 3)
    masks.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0
