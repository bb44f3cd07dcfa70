"""Tuning of singular values inside the image encoder (S-SAM, arXiv 2408.06447, section 3)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn
from torch.nn import functional as F

from samadapt.adapters.base import Blocks, EncoderAdapter, choose
from samadapt.backbones.base import Backbone
from samadapt.backbones.sam_attention import strip
from samadapt.backbones.weights import cache_folder
from samadapt.errors import ConfigError
from samadapt.files import cache_path

PROBE_ERROR = 1e-3
"""Largest relative error of cached factors on a random vector; rounding to float32 alone gives about 1e-6."""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one are zero: nothing determines their vectors."""


class Factors(NamedTuple):
    """Thin singular value decomposition of a weight (out,in), with r = min(out,in).

    Attributes:
        left: U, (out,r).
        values: (r,), not negative.
        right: V transposed, (r,in).
    """

    left: Tensor
    values: Tensor
    right: Tensor


class SingularLayer(nn.Module):
    """A frozen layer with weight U diag(s) V^T, computed as U diag(relu(a s + b)) V^T; a and b learn.

    Two products instead of one, through r channels: the cheapest way to train. With 2,048 tokens on one core, forward
    and backward of ViT-B's qkv, output projection and first perceptron layer took 1.0 s; a correction beside the plain
    layers 1.7 s, building the weights at each step 1.3 s, the plain layers alone 0.6 s.

    Args:
        base: Linear or Conv2d without groups; it keeps its weight and bias, and training changes neither.
        factors: of its weight, convolution kernels flattened to (out, in*kh*kw).
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def __init__(self, base: nn.Linear | nn.Conv2d, factors: Factors) -> None:
        super().__init__()
        self.base = base
        for name, tensor in factors._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        self.scale = nn.Parameter(torch.ones_like(factors.values))
        self.shift = nn.Parameter(torch.zeros_like(factors.values))

    def tuned(self) -> Tensor:
        """(r,) the singular values as they are now."""
        return F.relu(self.scale * self.values + self.shift)

    @torch.no_grad()
    def merged(self) -> nn.Linear | nn.Conv2d:
        """The plain layer with the learned weight; exactly the base's where nothing was learned."""
        change = (self.left * (self.tuned() - self.values)) @ self.right
        self.base.weight += change.view_as(self.base.weight)
        return self.base


class SingularLinear(SingularLayer):
    """(...,in) -> (...,out)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right) * self.tuned(), self.left, self.base.bias)


class SingularConv2d(SingularLayer):
    """(B,in,H,W) -> (B,out,H',W')."""

    base: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.right.view(-1, *self.base.weight.shape[1:])
        found = F.conv2d(x, kernels, None, self.base.stride, self.base.padding, self.base.dilation)
        return F.conv2d(found * self.tuned()[:, None, None], self.left[:, :, None, None], self.base.bias)


class PositionedBlock(nn.Module):
    """An encoder's first block, with what its absolute position embedding has learned added to the tokens.

    Apart from the embedding itself, because the tokens that enter this block may be cached only if they do not learn.

    Args:
        block: (B,g,g,dim) -> the same shape.
        embedding: (1,g,g,dim), already in the tokens.
    """

    def __init__(self, block: nn.Module, embedding: Tensor) -> None:
        super().__init__()
        self.base = block
        self.position = nn.Parameter(torch.zeros_like(embedding))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x + self.position)


@dataclass(frozen=True)
class SingularAdapter(EncoderAdapter):
    """Scales and shifts the singular values of the chosen blocks, and lets their norms learn.

    Every linear layer of a block: qkv, the output projection of attention, both of the perceptron; with the last block
    also the neck's two convolutions; with all blocks also the absolute position embedding, where the encoder has one.
    The neck's norms stay, as in the published code. On a SAM ViT with all blocks these are exactly the parameters of
    that code.

    Attributes:
        blocks: which blocks.
        reference: run a SAM ViT as the published code does, see ``strip``. Its position embedding is resized as
            everywhere here, bilinearly; there it is averaged.
    """

    kind = "singular"
    blocks: Blocks = None
    reference: bool = False

    def inject(self, backbone: Backbone, seed: int) -> int | None:
        if self.reference:
            self._strip(backbone)
        encoder, steps = backbone.image_encoder, backbone.image_encoder.steps()
        paths = {layer.block: layer.name.removesuffix(".attn.qkv") for layer in backbone.attention_layers()}
        chosen = choose(self.blocks, list(paths), backbone.late_block)
        for block in chosen:
            _adapt(backbone, paths[block], nn.Linear)
        if chosen[-1] == len(steps) - 1:
            _adapt(backbone, "image_encoder.neck", nn.Conv2d)
        embedding = getattr(encoder, "pos_embed", None)
        if embedding is not None and chosen == list(range(len(steps))):
            backbone.set_submodule(paths[0], PositionedBlock(steps[0][0], embedding))
        return chosen[0]

    def _strip(self, backbone: Backbone) -> None:
        if self.blocks is not None:
            raise ConfigError(
                "the reference form changes every block", where="blocks", remedy="Leave blocks or the form out."
            )
        for (block,) in filter(lambda step: isinstance(step[0], Block), backbone.image_encoder.steps()):
            strip(block)

    @torch.no_grad()
    def merge(self, backbone: Backbone) -> None:
        for name, module in list(backbone.named_modules()):
            if isinstance(module, SingularLayer):
                backbone.set_submodule(name, module.merged())
        for name, module in list(backbone.named_modules()):
            if isinstance(module, PositionedBlock):
                backbone.get_parameter("image_encoder.pos_embed").add_(module.position)
                backbone.set_submodule(name, module.base)
        backbone.requires_grad_(False)


def _adapt(backbone: Backbone, path: str, kind: type[nn.Linear | nn.Conv2d]) -> None:
    """Tune the singular values of every layer of ``kind`` under ``path``, and let the LayerNorms there learn."""
    for name, module in list(backbone.get_submodule(path).named_modules(prefix=path)):
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
        elif isinstance(module, kind):
            factors = decompose(module.weight, cached_factors(backbone, name))
            layer = SingularLinear if isinstance(module, nn.Linear) else SingularConv2d
            backbone.set_submodule(name, layer(module, factors))


def cached_factors(backbone: Backbone, name: str) -> Path | None:
    """Where the factors of the layer ``name`` are kept; None for random weights, which nobody meets again."""
    sha256 = backbone.weights_sha256
    return cache_folder() / "svd" / sha256 / f"{name}.safetensors" if sha256 else None


@torch.no_grad()
def decompose(weight: Tensor, file: Path | None) -> Factors:
    """The singular value decomposition of ``weight`` (out,...), flattened to (out,in).

    In float64, so that singular vectors of close values do not turn from machine to machine: a model file holds what
    was learned about each of them, but not the vectors. Values of zero, whose vectors are anyone's choice, stay zero in
    training, since relu has no gradient there.

    Args:
        weight: of a Linear or a Conv2d.
        file: where the factors are kept; made where it is missing, damaged, or of another weight. A folder that cannot
            be written to costs the time of computing them again.
    """
    matrix = weight.detach().flatten(1)
    found = _read(file, matrix) if file is not None else None
    if found is None:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        values = values * (values > NEGLIGIBLE * values.max())
        found = Factors(*(factor.to(matrix.dtype).contiguous() for factor in (left, values, right)))
        if file is not None:
            with suppress(OSError, SafetensorError), cache_path(file) as temporary:
                save_file({name: tensor.cpu() for name, tensor in found._asdict().items()}, temporary)
    return found


def _read(file: Path, matrix: Tensor) -> Factors | None:
    """Factors of ``matrix`` from ``file``; None where it holds none."""
    try:
        found = Factors(**{name: tensor.to(matrix, copy=True) for name, tensor in load_file(file).items()})
    except (OSError, SafetensorError, TypeError):
        return None
    out, rank, inner = len(matrix), min(matrix.shape), matrix.shape[1]
    if [f.shape for f in found] != [(out, rank), (rank,), (rank, inner)]:
        return None
    probe = torch.randn(inner, generator=torch.Generator().manual_seed(0)).to(matrix)
    expected = matrix @ probe
    error = found.left @ (found.values * (found.right @ probe)) - expected
    return found if error.norm() <= PROBE_ERROR * expected.norm() else None
