"""SAM's two-way transformer (Kirillov et al., "Segment Anything", 2023, A. Mask decoder), on fewer operations.

The modules are segment-anything's, with their parameters; only the way through them is ours. Most of its time goes
into the image's thousands of tokens, which meet a handful of prompt tokens. So the image is not projected: where a
score is (X W_k) q, the few q go through W_k instead, and where an answer is A (X W_v), A X comes first. The image may
be one for many prompts. With many tokens, or with projections that are more than a matrix, attention is computed as
usual.
"""

from __future__ import annotations

import math

import torch
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from samadapt.adapters.bottleneck import Bottleneck, ParallelAdapter

BOTTLENECK_RATIO = 0.25


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
    image, position = (x.flatten(2).transpose(1, 2).contiguous() for x in (image, position))
    return _through(transformer, image, position, tokens, tokens)


def two_way_without_positions(transformer: TwoWayTransformer, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As ``two_way``, but nothing has a place, except that the last attention still adds the tokens to its queries: the
    transformer that S-SAM's published code runs with SAM's weights."""
    image = image.flatten(2).transpose(1, 2).contiguous()
    nowhere = torch.zeros_like(image[:1, :1])
    return _through(transformer, image, nowhere, tokens, torch.zeros_like(tokens))


def _through(
    transformer: TwoWayTransformer, image: Tensor, position: Tensor, tokens: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """``two_way`` on image tokens (N or 1,P,256), with what both blocks take for the places of the prompt tokens."""
    queries = tokens
    for block in transformer.layers:
        assert isinstance(block, TwoWayAttentionBlock)
        queries, image = _block(block, queries, image, places, position)
    queries = queries + _read_image(transformer.final_attn_token_to_image, queries + tokens, image + position, image)
    return transformer.norm_final_attn(queries), image


def add_bottlenecks(transformer: TwoWayTransformer, seed: int) -> None:
    """Put adapters into both blocks, as the finetune-SAM study does (arXiv 2404.09957): one shared by tokens and image
    behind their attentions to each other, and one beside the perceptron. They start at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for block in transformer.layers:
            dim = block.norm1.normalized_shape[0]
            hidden = int(dim * BOTTLENECK_RATIO)
            block.bottleneck = Bottleneck(dim, hidden)
            block.mlp = ParallelAdapter(block.mlp, Bottleneck(dim, hidden))


def _adapted(block: TwoWayAttentionBlock, x: Tensor) -> Tensor:
    """``x`` behind an attention, through the block's adapter where it has one."""
    return x + block.bottleneck(x) if hasattr(block, "bottleneck") else x


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
    queries = queries + _read_image(block.cross_attn_token_to_image, queries + tokens, placed, image)
    queries = block.norm2(_adapted(block, queries))
    queries = block.norm3(queries + block.mlp(queries))
    image = _write_image(block.cross_attn_image_to_token, image, placed, queries + tokens, queries)
    return queries, block.norm4(_adapted(block, image))


def _read_image(attention: Attention, queries: Tensor, placed: Tensor, image: Tensor) -> Tensor:
    """What tokens find in the image.

    Args:
        attention: its key's bias adds the same to every score of a token, which the softmax takes away again.
        queries: (N,T,256).
        placed: (N or 1,P,256) image tokens with their positions, the keys.
        image: (N or 1,P,256) the values.

    Returns:
        (N,T,256).
    """
    if not _fewer_operations(attention, queries):
        return _attend(attention, queries, placed, image)
    keys, values = _per_head(attention, attention.k_proj), _per_head(attention, attention.v_proj)
    asked = (_heads(attention, attention.q_proj, queries) @ keys).flatten(1, 2)  # (N,heads*T,256)
    weights = _product(asked, placed.transpose(1, 2)).softmax(dim=-1)
    seen = _product(weights, image).unflatten(1, (attention.num_heads, -1)) @ values.transpose(1, 2)
    return attention.out_proj(seen.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _write_image(attention: Attention, image: Tensor, placed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The image with what its tokens find among the prompt's tokens added.

    Args:
        attention: the weights of a head add up to 1, so its share of the output's bias can ride on every value.
        image: (N or 1,P,256).
        placed: the same with positions, the queries.
        keys: (N,T,256).
        values: (N,T,256).

    Returns:
        (N,P,256).
    """
    if not _fewer_operations(attention, keys):
        return image + _attend(attention, placed, keys, values)
    heads = attention.num_heads
    answers = _heads(attention, attention.k_proj, keys)  # (N,heads,T,d)
    offsets = answers @ attention.q_proj.bias.unflatten(0, (heads, -1, 1))  # (N,heads,T,1)
    answers = answers @ _per_head(attention, attention.q_proj)
    output = attention.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
    found = attention.v_proj(values).unflatten(-1, (heads, -1)).transpose(1, 2) @ output
    found = found + attention.out_proj.bias / heads
    # Heads last: a softmax over the dimension before the last one runs along whole vectors.
    answers, offsets, found = (x.transpose(1, 2).flatten(1, 2) for x in (answers, offsets, found))
    scores = _product(placed, answers.transpose(1, 2)) + offsets.transpose(1, 2)
    weights = scores.unflatten(-1, (-1, heads)).softmax(dim=-2).flatten(2)
    return torch.baddbmm(image, weights, found)


def _fewer_operations(attention: Attention, tokens: Tensor) -> bool:
    """Whether ``tokens`` are so few that they, and not the image, should go through the projections."""
    plain = all(
        type(m) is nn.Linear for m in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    )
    return plain and tokens.shape[1] * attention.num_heads <= attention.internal_dim


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(N or 1,A,B) x (N or 1,B,C) -> (N,A,C), as one matrix product where one of them is shared by all."""
    if len(right) == 1:
        return (left.flatten(0, 1) @ right[0]).unflatten(0, left.shape[:2])
    if len(left) == 1:
        return _product(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
    return left @ right


def _heads(attention: Attention, project: nn.Module, x: Tensor) -> Tensor:
    """(N,T,256) -> (N,heads,T,d), already divided by the root of d."""
    heads = project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    return heads / math.sqrt(heads.shape[-1])


def _per_head(attention: Attention, project: nn.Linear) -> Tensor:
    """Weight (heads*d,256) -> (heads,d,256)."""
    return project.weight.unflatten(0, (attention.num_heads, -1))


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N or 1,Q,256), (N or 1,K,256) twice -> (N,Q,256)."""
    count = max(len(q), len(k))
    pairs: list[tuple[nn.Module, Tensor]] = [(attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)]
    heads = [project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for project, x in pairs]
    found = F.scaled_dot_product_attention(*(x.expand(count, -1, -1, -1) for x in heads))
    return attention.out_proj(found.transpose(1, 2).flatten(2))
