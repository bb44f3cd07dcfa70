"""What every backbone is: an image encoder, SAM's prompt encoder and mask decoder, and facts about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from samadapt.errors import InputError

EMBED_DIM = 256

IMAGES = -1
"""In place of a block's index: before the first block and all that precedes it, where the images themselves enter."""

QKVPart = Literal["q", "k", "v"]


@dataclass(frozen=True)
class QKVLayout:
    """Which output channels of a fused qkv ``nn.Linear`` belong to q, k and v.

    Args:
        heads: attention heads.
        head_dim: channels per head.
        order: "fused" is [q|k|v], each holding all heads (SAM's ViT); "per_head" is [q|k|v] of head 0, then of
            head 1, ... (TinyViT). Slicing one as the other mixes q, k and v of different heads without any error.
    """

    heads: int
    head_dim: int
    order: Literal["fused", "per_head"]

    def channels(self, part: QKVPart) -> Tensor:
        """(heads * head_dim,) int64 output channels of ``part``, head after head."""
        index = torch.arange(3 * self.heads * self.head_dim)
        position = "qkv".index(part)
        if self.order == "fused":
            return index.view(3, -1)[position]
        return index.view(self.heads, 3, self.head_dim)[:, position].flatten()


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of an image encoder.

    Args:
        name: module path of the fused qkv ``nn.Linear``, seen from the backbone.
        block: running index of its block through the whole encoder (TinyViT's convolutional blocks count too).
        dim: channels of the tokens that enter it.
        layout: where q, k and v lie in its output.
    """

    name: str
    block: int
    dim: int
    layout: QKVLayout


class PixelNorm(nn.Module):
    """SAM's input scaling: (B,3,S,S) in [0,1] -> (255 x - mean) / std with ImageNet's mean and std per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Not persistent: Meta's checkpoints do not carry them.
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images * 255.0 - self.mean) / self.std


class ImageEncoder(nn.Module):
    """An image encoder whose blocks run in a row, so that it can be cut before any of them.

    ``second_part(first_part(x, k), k)`` is ``forward(x)`` for every k from 0 to the number of blocks.
    """

    neck: nn.Module

    def steps(self) -> list[tuple[nn.Module, ...]]:
        """The modules of every block in their order: the block itself, and what follows before the next one."""
        raise NotImplementedError

    def first_part(self, x: Tensor, block: int) -> Tensor:
        """(B,3,S,S) normalised -> the tokens that enter block ``block`` (behind the last one: that enter the neck)."""
        raise NotImplementedError

    def second_part(self, tokens: Tensor, block: int) -> Tensor:
        """What ``first_part`` gave -> (B,256,g,g)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B,3,S,S) normalised -> (B,256,g,g)."""
        return self.second_part(self.first_part(x, 0), 0)


class Backbone(nn.Module):
    """A SAM-family model: image -> embedding, and the parts that turn embeddings and prompts into masks.

    Its ``state_dict`` has exactly the keys of the published checkpoint (``image_encoder.*``, ``prompt_encoder.*``,
    ``mask_decoder.*``).

    Args:
        name: registry name.
        image_size: side S of the square input in pixels.
        stride: input pixels per embedding cell; the embedding is g x g with g = S / stride.
        image_encoder: (B,3,S,S) normalised -> (B,256,g,g).
        attention: the encoder's attention layers, first to last.
        normalise: (B,3,S,S) in [0,1] -> what the encoder was trained on.
        late_block: index of the block that begins the encoder's second half.

    Attributes:
        weights_sha256: hex SHA-256 of the weights file; empty for random weights.
    """

    embed_dim = EMBED_DIM

    def __init__(
        self,
        *,
        name: str,
        image_size: int,
        stride: int,
        image_encoder: ImageEncoder,
        attention: Sequence[AttentionLayer],
        normalise: nn.Module,
        late_block: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.image_size = image_size
        self.embedding_size = image_size // stride
        self.mask_size = 4 * self.embedding_size
        self.weights_sha256 = ""
        self.image_encoder = image_encoder
        self.prompt_encoder = PromptEncoder(
            embed_dim=EMBED_DIM,
            image_embedding_size=(self.embedding_size, self.embedding_size),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED_DIM, mlp_dim=2048, num_heads=8),
            transformer_dim=EMBED_DIM,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )
        self.normalise = normalise
        self.late_block = late_block
        self._attention = tuple(attention)

    def embed(self, images: Tensor) -> Tensor:
        """(B,3,S,S) floating point in [0,1] -> (B,256,g,g). Differentiable.

        Raises:
            InputError: the images are not floating point, or not (B,3,S,S).
        """
        return self.embed_tokens(self.tokens(images, 0), 0)

    def embed_tokens(self, tokens: Tensor, block: int) -> Tensor:
        """What ``tokens`` gave for ``block`` -> (B,256,g,g). Differentiable."""
        if block == IMAGES:
            tokens, block = self.tokens(tokens, 0), 0
        return self.image_encoder.second_part(tokens, block)

    def tokens(self, images: Tensor, block: int) -> Tensor:
        """(B,3,S,S) floating point in [0,1] -> the activations that enter block ``block``, batch first.

        ``block`` counts as ``AttentionLayer.block`` does; their number stands for the entry of the neck, and ``IMAGES``
        for the images, which are given back.

        Raises:
            InputError: the images are not floating point, or not (B,3,S,S).
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"{self.name} takes images of shape (B, 3, {self.image_size}, {self.image_size}), "
                f"not {tuple(images.shape)}",
                remedy="Bring slices into the model frame first (samadapt.data.slices), or load the backbone with "
                "this image_size.",
            )
        if not images.is_floating_point():
            raise InputError(
                f"{self.name} takes floating-point images in [0, 1], not {images.dtype}",
                remedy="Apply the intensity window first (samadapt.data.window).",
            )
        return images if block == IMAGES else self.image_encoder.first_part(self.normalise(images), block)

    def attention_layers(self) -> list[AttentionLayer]:
        """The encoder's attention layers, first to last."""
        return list(self._attention)
