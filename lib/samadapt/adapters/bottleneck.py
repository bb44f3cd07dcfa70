"""Bottleneck adapters in every chosen block, as the finetune-SAM study places them (arXiv 2404.09957, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

from samadapt.adapters.base import Blocks, EncoderAdapter, choose
from samadapt.backbones.base import Backbone

PARALLEL_SCALE = 0.5
"""Share of the adapter beside the perceptron, as in the study's code."""


class Bottleneck(nn.Module):
    """(..., dim) -> (..., dim) through a narrow layer.

    Args:
        dim: channels.
        hidden: channels of the narrow layer.
        zero: whether the way back starts at zero, so that nothing is added at first.
    """

    def __init__(self, dim: int, hidden: int, *, zero: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.up = nn.Linear(hidden, dim)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(nn.functional.gelu(self.down(x)))


class SerialAdapter(nn.Module):
    """An attention layer followed by a bottleneck with a skip."""

    def __init__(self, attention: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.base = attention
        self.adapter = adapter

    @property
    def window(self) -> Any:
        """TinyViT's block asks its attention for the side of its windows."""
        return self.base.window

    def forward(self, x: Tensor) -> Tensor:
        attended = self.base(x)
        return attended + self.adapter(attended)


class ParallelAdapter(nn.Module):
    """A perceptron with a bottleneck beside it, on the same normed tokens."""

    def __init__(self, mlp: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.base = mlp
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        norm = getattr(self.base, "norm", None)  # TinyViT's perceptron holds its norm itself, SAM's gets normed tokens
        return self.base(x) + PARALLEL_SCALE * self.adapter(norm(x) if norm is not None else x)


@dataclass(frozen=True)
class BottleneckAdapter(EncoderAdapter):
    """Two bottlenecks in every chosen block: after attention, and beside the perceptron.

    Attributes:
        ratio: width of the narrow layer in parts of the block's channels.
        blocks: which blocks.
        reference: start as the study's code does, with random weights on the way back (the model is perturbed at
            first), and with the third bottleneck per block that its code makes for SAM's ViT and never uses.
    """

    kind = "bottleneck"
    ratio: float = 0.25
    blocks: Blocks = None
    reference: bool = False

    def inject(self, backbone: Backbone, seed: int) -> int | None:
        layers = {layer.block: layer for layer in backbone.attention_layers()}
        steps = backbone.image_encoder.steps()
        chosen = choose(self.blocks, list(layers), backbone.late_block)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for index in chosen:
                self._adapt(steps[index][0], layers[index].dim)
        return chosen[0]

    def merge(self, backbone: Backbone) -> None:
        """A bottleneck is no linear map, so it stays where it is."""
        backbone.requires_grad_(False)

    def _adapt(self, block: nn.Module, dim: int) -> None:
        hidden, like = int(dim * self.ratio), next(block.parameters())
        unused = self.reference and isinstance(block, Block)
        made = [Bottleneck(dim, hidden, zero=not self.reference).to(like.device, like.dtype) for _ in range(3)]
        block.attn = SerialAdapter(block.get_submodule("attn"), made[0])
        block.mlp = ParallelAdapter(block.get_submodule("mlp"), made[1])
        if unused:
            block.unused_depth_adapter = made[2]
