"""SAM's two-way transformer (Kirillov et al., "Segment Anything", 2023, A. Mask decoder), run with fused attention.

The modules are segment-anything's, with their parameters; only the way through them is ours. Most of its time goes
into the image's thousands of tokens: here they may be one image for many prompts, their position is added once per
block, and no table of attention weights is ever written.
"""

from __future__ import annotations

from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F


def two_way(transformer: TwoWayTransformer, image: Tensor, position: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What ``transformer(image, position, tokens)`` gives.

    Args:
        transformer: of a mask decoder.
        image: (N,256,g,g), or (1,256,g,g) shared by all.
        position: (1,256,g,g).
        tokens: (N,T,256), output and prompt tokens.

    Returns:
        Tokens (N,T,256) and image tokens (N,g*g,256).
    """
    image, position = (x.flatten(2).transpose(1, 2) for x in (image, position))
    queries = tokens
    for block in transformer.layers:
        assert isinstance(block, TwoWayAttentionBlock)
        queries, image = _block(block, queries, image, tokens, position)
    queries = queries + _attend(transformer.final_attn_token_to_image, queries + tokens, image + position, image)
    return transformer.norm_final_attn(queries), image


def _block(
    block: TwoWayAttentionBlock, queries: Tensor, image: Tensor, tokens: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens among themselves, tokens to the image, perceptron, image to the tokens."""
    if block.skip_first_layer_pe:  # the first block: the tokens are still their own positions
        queries = _attend(block.self_attn, queries, queries, queries)
    else:
        queries = queries + _attend(block.self_attn, queries + tokens, queries + tokens, queries)
    queries = block.norm1(queries)
    placed = image + position
    queries = block.norm2(queries + _attend(block.cross_attn_token_to_image, queries + tokens, placed, image))
    queries = block.norm3(queries + block.mlp(queries))
    found = _attend(block.cross_attn_image_to_token, placed, queries + tokens, queries)
    return queries, block.norm4(image + found)


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N or 1,Q,256), (N or 1,K,256) twice -> (N,Q,256)."""
    count = max(len(q), len(k))
    pairs: list[tuple[nn.Module, Tensor]] = [(attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)]
    heads = [project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for project, x in pairs]
    found = F.scaled_dot_product_attention(*(x.expand(count, -1, -1, -1) for x in heads))
    return attention.out_proj(found.transpose(1, 2).flatten(2))
