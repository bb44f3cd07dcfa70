"""SAM's ViT-B/L/H at any input size divisible by 16, from the package segment-anything.

Kirillov et al., "Segment Anything" (ICCV 2023). Away from 1024 px the absolute position embedding is resized
bilinearly, and the relative-position tables of the blocks with global attention linearly; the tables of the windowed
blocks belong to the window, not to the image, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

from samadapt.backbones.base import EMBED_DIM, AttentionLayer, Backbone, ImageEncoder, PixelNorm, QKVLayout
from samadapt.backbones.sam_attention import fuse

PATCH = 16


class SamViT(ImageEncoderViT, ImageEncoder):
    """The package's encoder, cut before any block; tokens are (B,g,g,dim)."""

    patch_embed: nn.Module
    pos_embed: Tensor | None
    blocks: nn.ModuleList
    neck: nn.Module

    def steps(self) -> list[tuple[nn.Module, ...]]:
        return [(block,) for block in self.blocks]

    def first_part(self, x: Tensor, block: int) -> Tensor:
        tokens = self.patch_embed(x)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        for module in self.blocks[:block]:
            tokens = module(tokens)
        return tokens

    def second_part(self, tokens: Tensor, block: int) -> Tensor:
        for module in self.blocks[block:]:
            tokens = module(tokens)
        return self.neck(tokens.permute(0, 3, 1, 2))


def build_sam_vit(
    image_size: int,
    *,
    name: str,
    dim: int,
    depth: int,
    heads: int,
    global_blocks: Sequence[int],
    window: int = 14,
) -> Backbone:
    """A SAM with a ViT encoder and random weights.

    Args:
        image_size: side of the square input in pixels, divisible by 16.
        name: registry name.
        dim, depth, heads: tokens' channels, number of blocks, attention heads per block.
        global_blocks: indices of the blocks that attend over the whole image; the others attend in windows.
        window: window side in tokens.
    """
    encoder = SamViT(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4,
        out_chans=EMBED_DIM,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=tuple(global_blocks),
    )
    for own in encoder.blocks:
        fuse(own)
    layout = QKVLayout(heads, dim // heads, "fused")
    return Backbone(
        name=name,
        image_size=image_size,
        stride=PATCH,
        image_encoder=encoder,
        attention=[AttentionLayer(f"image_encoder.blocks.{i}.attn.qkv", i, dim, layout) for i in range(depth)],
        normalise=PixelNorm(),
        late_block=depth // 2,
    )


def resize_positions(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """``state`` with its position embeddings resized to the grid of ``backbone``; other entries are passed on.

    Which blocks are global is read off the encoder, block by block. Tables that already fit are returned as they are.
    """
    resized = dict(state)
    grid = backbone.embedding_size
    for key, resize in _resizers(backbone.image_encoder, grid):
        if key in resized:  # a missing key is reported by the strict load that follows
            resized[key] = resize(resized[key])
    return resized


def position_keys(backbone: Backbone) -> list[str]:
    """The keys of what ``resize_positions`` resizes."""
    return [key for key, _ in _resizers(backbone.image_encoder, backbone.embedding_size)]


def _resizers(encoder: nn.Module, grid: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield "image_encoder.pos_embed", partial(_resize_grid, side=grid)
    for path, block in encoder.named_modules():
        if isinstance(block, Block) and block.window_size == 0:
            for axis in "hw":
                yield f"image_encoder.{path}.attn.rel_pos_{axis}", partial(_resize_table, length=2 * grid - 1)


def _resize_grid(table: Tensor, *, side: int) -> Tensor:
    """Absolute embedding (1,h,w,C) -> (1,side,side,C), bilinear."""
    if table.shape[1:3] == (side, side):
        return table
    resized = F.interpolate(table.permute(0, 3, 1, 2).float(), (side, side), mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def _resize_table(table: Tensor, *, length: int) -> Tensor:
    """Relative-position table (L,C) -> (length,C), linear."""
    if len(table) == length:
        return table
    return F.interpolate(table.float().t()[None], length, mode="linear", align_corners=False)[0].t()
