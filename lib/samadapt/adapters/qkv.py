"""Taking a fused qkv projection apart, so that q, k and v are plain Linear layers which any tuner can adapt.

SAM's ViT stores [q|k|v] for all heads at once, TinyViT stores [q|k|v] inside each head. Slicing the wrong way adapts
other channels than meant; ``QKVLayout`` says which output channels belong to which part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samadapt.backbones.base import AttentionLayer, Backbone, QKVLayout, QKVPart

PARTS: tuple[QKVPart, ...] = ("q", "k", "v")


class SplitQKV(nn.Module):
    """Three Linear layers that together compute exactly what the fused one did, channel for channel.

    Args:
        fused: Linear (in -> 3 * heads * head_dim).
        layout: which of its output channels are q, k and v.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def __init__(self, fused: nn.Linear, layout: QKVLayout) -> None:
        super().__init__()
        self.layout = layout
        for part in PARTS:
            self.add_module(part, _rows(fused, layout.channels(part)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., 3 * heads * head_dim), in the fused layer's channel order."""
        parts = [self.q(x), self.k(x), self.v(x)]
        if self.layout.order == "fused":
            return torch.cat(parts, dim=-1)
        heads = [part.unflatten(-1, (self.layout.heads, self.layout.head_dim)) for part in parts]
        return torch.cat(heads, dim=-1).flatten(-2)

    def fuse(self) -> nn.Linear:
        """The one Linear layer again; only valid while q, k and v are plain Linear layers (merge tuners first)."""
        fused = nn.Linear(self.q.in_features, 3 * self.q.out_features, bias=self.q.bias is not None)
        fused = fused.to(device=self.q.weight.device, dtype=self.q.weight.dtype).requires_grad_(False)
        for part in PARTS:
            linear = getattr(self, part)
            channels = self.layout.channels(part).to(linear.weight.device)
            fused.weight[channels] = linear.weight
            if linear.bias is not None:
                fused.bias[channels] = linear.bias
        return fused


def split_attention(backbone: Backbone, layer: AttentionLayer) -> None:
    """Replace the fused projection named by ``layer`` by its parts, in place."""
    fused = backbone.get_submodule(layer.name)
    assert isinstance(fused, nn.Linear)
    backbone.set_submodule(layer.name, SplitQKV(fused, layer.layout))


def fuse_attention(backbone: Backbone) -> None:
    """Undo every ``split_attention``, in place."""
    for name, module in list(backbone.named_modules()):
        if isinstance(module, SplitQKV):
            backbone.set_submodule(name, module.fuse())


def _rows(fused: nn.Linear, channels: Tensor) -> nn.Linear:
    channels = channels.to(fused.weight.device)
    linear = nn.Linear(fused.in_features, len(channels), bias=fused.bias is not None)
    linear = linear.to(device=fused.weight.device, dtype=fused.weight.dtype).requires_grad_(False)
    linear.weight.copy_(fused.weight.detach()[channels])
    if fused.bias is not None:
        linear.bias.copy_(fused.bias.detach()[channels])
    return linear
