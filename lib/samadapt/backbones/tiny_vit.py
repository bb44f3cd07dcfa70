"""TinyViT image encoders of LiteMedSAM and MobileSAM, at any input size.

Architecture: Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers" (ECCV 2022), cut down
as in Zhang et al., "Faster Segment Anything" (MobileSAM, 2023): the last merge keeps the grid and SAM's neck follows.
Parameter names are those of the published checkpoints, which therefore load key for key.

Inside, every activation is channels-last, so turning a feature map into tokens and back costs no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from samadapt.backbones.base import AttentionLayer, Backbone, ImageEncoder, PixelNorm, QKVLayout
from samadapt.backbones.windows import attend_in_windows

Stem = Literal["pointwise", "strided"]


class FrozenStatsBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that always uses its stored statistics, also after ``model.train()``.

    A few labelled slices per batch give statistics far from those of the pretraining, and updating the running means
    would change the frozen backbone under every adapter that was trained on it. Scale and shift may still be trained.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.training = False

    def train(self, mode: bool = True) -> FrozenStatsBatchNorm2d:
        return super().train(False)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The (C,) factor and the (C,) offset that this norm comes to."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class ConvNorm(nn.Module):
    """Bias-free convolution followed by BatchNorm: (B,in,H,W) -> (B,out,H/stride,W/stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = FrozenStatsBatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        # An adapter may have replaced either module by a wrapper of another type: then both must be called.
        if type(self.c) is not nn.Conv2d or type(self.bn) is not FrozenStatsBatchNorm2d:
            return self.bn(self.c(x))
        # With fixed statistics the norm is linear. Putting it into the convolution saves passes over the largest
        # activations (about 15 % of the encoder's time) and stays differentiable.
        scale, shift = self.bn.scale_and_shift()
        kernel = self.c.weight * scale[:, None, None, None]
        return F.conv2d(x, kernel, shift, self.c.stride, self.c.padding, groups=self.c.groups)


class PatchEmbed(nn.Module):
    """Stem: (B,3,S,S) -> (B,dim,S,S) with LiteMedSAM's pointwise convolutions, (B,dim,S/4,S/4) with strided ones."""

    def __init__(self, dim: int, stem: Stem) -> None:
        super().__init__()
        kernel, stride = (1, 1) if stem == "pointwise" else (3, 2)
        self.seq = nn.Sequential(
            ConvNorm(3, dim // 2, kernel, stride),
            nn.GELU(),
            ConvNorm(dim // 2, dim, kernel, stride),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted residual block of stage 0: widen, depthwise 3x3, narrow. Shape kept: (B,dim,H,W)."""

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = dim * expansion
        self.conv1 = ConvNorm(dim, hidden)
        self.conv2 = ConvNorm(hidden, hidden, kernel=3, groups=hidden)
        self.conv3 = ConvNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(inner))


class PatchMerging(nn.Module):
    """Convolution between two stages: (B,dim,H,W) -> (B,out,H/stride,W/stride)."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, out)
        self.conv2 = ConvNorm(out, out, kernel=3, stride=stride, groups=out)
        self.conv3 = ConvNorm(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class Attention(nn.Module):
    """Attention inside one window with a learned bias per head and absolute row/column distance.

    The fused ``qkv`` holds [q|k|v] of head 0, then of head 1, ... (``QKVLayout`` order "per_head").
    """

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self.register_buffer("attention_bias_idxs", _distance_index(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, rows, columns, dim) -> the same shape: the upper left part of windows that else hold zeros.

        The zeros enter before the norm, as in the published models; see ``samadapt.backbones.windows``.
        """
        windows, rows, columns, dim = shape = x.shape
        tokens = rows * columns
        bias, padding = self._bias(rows, columns)
        x = x.reshape(windows, tokens, dim)
        if padding is not None:
            x = F.pad(x, (0, 0, 0, 1))
            bias = torch.cat([bias, padding[..., None]], dim=-1)
        qkv = self.qkv(self.norm(x)).view(windows, -1, self.heads, 3, dim // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        x = F.scaled_dot_product_attention(q[:, :, :tokens], k, v, attn_mask=bias[None].to(q.dtype))
        return self.proj(x.transpose(1, 2).reshape(shape))

    def _bias(self, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """Bias (heads,N,N) among N tokens of a window, and (heads,N) towards all its zeros (None: there are none)."""
        size = self.window
        if rows == columns == size:
            return self.attention_biases[:, self.attention_bias_idxs], None
        inside = torch.zeros(size, size, dtype=torch.bool, device=self.attention_bias_idxs.device)
        inside[:rows, :columns] = True
        index = self.attention_bias_idxs[inside.flatten()]
        bias = self.attention_biases[:, index]
        return bias[..., inside.flatten()], bias[..., ~inside.flatten()].logsumexp(dim=-1)


def _distance_index(window: int) -> Tensor:
    """(N,N) index |row distance| * window + |column distance| between the N tokens of a window, in raster order."""
    side = torch.arange(window)
    rows, columns = (grid.flatten() for grid in torch.meshgrid(side, side, indexing="ij"))
    return (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()


class Mlp(nn.Module):
    """Pre-normed two-layer perceptron over the last dimension."""

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim * expansion)
        self.fc2 = nn.Linear(dim * expansion, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Windowed attention, depthwise 3x3 convolution, perceptron. Shape kept: (B,dim,H,W)."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, window)
        self.local_conv = ConvNorm(dim, dim, kernel=3, groups=dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        tokens = tokens + attend_in_windows(tokens, self.attn.window, self.attn)
        tokens = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        tokens = tokens + self.mlp(tokens)
        return tokens.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one resolution and, except in the last stage, the merge into the next one."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def steps(self) -> list[tuple[nn.Module, ...]]:
        """Its blocks in their order; the merge goes with the last one."""
        blocks: list[tuple[nn.Module, ...]] = [(block,) for block in self.blocks]
        if self.downsample is not None:
            blocks[-1] += (self.downsample,)
        return blocks


class TinyViT(ImageEncoder):
    """TinyViT with SAM's neck: (B,3,S,S) normalised image -> (B,out_channels,g,g).

    Args:
        stem: "pointwise" (LiteMedSAM, g = S/4) or "strided" (MobileSAM, g = S/16).
        dims: channels of each stage; the first is convolutional, the others attend in windows.
        depths: blocks of each stage.
        heads: attention heads of each stage (the first entry is unused, as in the published configuration).
        windows: window side in tokens of each stage (the first entry is unused).
        out_channels: channels of the embedding.

    S must be divisible by the output stride S/g; the registry asks for multiples of 32.
    """

    def __init__(
        self,
        *,
        stem: Stem,
        dims: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (2, 4, 5, 10),
        windows: Sequence[int] = (7, 7, 14, 7),
        out_channels: int = 256,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dims[0], stem)
        stages = []
        last = len(dims) - 1
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [MBConv(dim) if i == 0 else TinyViTBlock(dim, heads[i], windows[i]) for _ in range(depth)]
            # SAM needs a fine grid, so the merge into the last stage keeps the resolution.
            merge = None if i == last else PatchMerging(dim, dims[i + 1], stride=1 if i == last - 1 else 2)
            stages.append(Stage(blocks, merge))
        self.layers = nn.ModuleList(stages)
        self.late_block = depths[0] + depths[1]
        self.neck = nn.Sequential(
            nn.Conv2d(dims[-1], out_channels, 1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )

    def first_part(self, x: Tensor, block: int) -> Tensor:
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        return _run(self.steps()[:block], x)

    def second_part(self, tokens: Tensor, block: int) -> Tensor:
        tokens = tokens.contiguous(memory_format=torch.channels_last)
        return self.neck(_run(self.steps()[block:], tokens))

    def steps(self) -> list[tuple[nn.Module, ...]]:
        return [step for stage in self.layers if isinstance(stage, Stage) for step in stage.steps()]


def _run(steps: Sequence[Sequence[nn.Module]], x: Tensor) -> Tensor:
    for step in steps:
        for module in step:
            x = module(x)
    return x


def attention_layers(encoder: TinyViT) -> list[AttentionLayer]:
    """The attention layers of ``encoder``, named as seen from a backbone that holds it."""
    layers = []
    blocks = [(path, m) for path, m in encoder.named_modules() if isinstance(m, (MBConv, TinyViTBlock))]
    for index, (path, block) in enumerate(blocks):
        if isinstance(block, TinyViTBlock):
            dim, heads = block.attn.qkv.in_features, block.attn.heads
            layout = QKVLayout(heads, dim // heads, "per_head")
            layers.append(AttentionLayer(f"image_encoder.{path}.attn.qkv", index, dim, layout))
    return layers


def build_lite_medsam(image_size: int, **sizes: Any) -> Backbone:
    """LiteMedSAM with random weights; ``sizes`` are those of ``TinyViT``. It takes [0,1] as it is."""
    encoder = TinyViT(stem="pointwise", **sizes)
    return Backbone(
        name="lite_medsam",
        image_size=image_size,
        stride=4,
        image_encoder=encoder,
        attention=attention_layers(encoder),
        normalise=nn.Identity(),
        late_block=encoder.late_block,
    )


def build_mobile_sam(image_size: int, **sizes: Any) -> Backbone:
    """MobileSAM with random weights; ``sizes`` are those of ``TinyViT``."""
    encoder = TinyViT(stem="strided", **sizes)
    return Backbone(
        name="mobile_sam",
        image_size=image_size,
        stride=16,
        image_encoder=encoder,
        attention=attention_layers(encoder),
        normalise=PixelNorm(),
        late_block=encoder.late_block,
    )
