"""SAM-LST's ladder: a small trained CNN beside the frozen encoder (Chai et al., 2023, arXiv 2306.12737)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from samadapt.adapters.side import SideConfig, SideNetwork
from samadapt.backbones.base import EMBED_DIM, Backbone, PixelNorm
from samadapt.backbones.checkpoint import load_strictly, read_checkpoint
from samadapt.backbones.tiny_vit import FrozenStatsBatchNorm2d
from samadapt.errors import WeightsError
from samadapt.files import sha256_of

PUBLISHED = {"resnet18-f37072fd.pth": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"}
"""torchvision's files of ResNet-18 by name, with the hex SHA-256 that they must have."""

GROUPS = 32
"""Channel groups of every GroupNorm (Wu and He, "Group Normalization", 2018)."""

_STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")


class LadderNetwork(SideNetwork):
    """embedding + (1 - sigmoid(a)) P(cnn(image)), with a scalar gate a and a 1x1 convolution P.

    This is the paper's sigmoid(a) x_sam + (1 - sigmoid(a)) x_cnn with x_cnn = x_sam + P(cnn(image)): the CNN says what
    SAM's embedding lacks. P starts at zero, so the first fused embedding is SAM's own, and the decoder gets what it
    knows. A gate that starts closed would do that, too, but it scales the gradients of the CNN and of itself by almost
    nothing for as long as it is closed. P does not: its own gradient is whole from the first step on, and that of the
    CNN and of the gate from the second, as with LoRA's B.

    What the CNN gives for S x S pixels is S/16 x S/16. Where the embedding's grid is finer (LiteMedSAM: S/4), it is
    enlarged to it, bilinearly, behind P: fine detail stays the frozen encoder's, and the CNN stays cheap.

    Args:
        cnn: (B,3,S,S) -> (B,256,S/16,S/16).
    """

    def __init__(self, cnn: nn.Sequential) -> None:
        super().__init__()
        self.normalise = PixelNorm()
        self.cnn = cnn
        self.projection = nn.Conv2d(EMBED_DIM, EMBED_DIM, 1)
        nn.init.zeros_(self.projection.weight)
        assert self.projection.bias is not None
        nn.init.zeros_(self.projection.bias)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, embeddings: Tensor, images: Tensor) -> Tensor:
        lacking = _on_grid_of(embeddings, self.projection(self.cnn(self.normalise(images))))
        return embeddings + (1 - torch.sigmoid(self.gate)) * lacking


class ReferenceLadderNetwork(SideNetwork):
    """sigmoid(a) embedding + (1 - sigmoid(a)) cnn(image) with a = 0, as in the paper's code.

    Half of the first embedding is an untuned CNN's, so SAM's decoder starts on what it has never seen.

    Args:
        cnn: (B,3,S,S) in [0,1] -> (B,256,S/16,S/16).
    """

    def __init__(self, cnn: nn.Sequential) -> None:
        super().__init__()
        self.cnn = cnn
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, embeddings: Tensor, images: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate)
        return share * embeddings + (1 - share) * _on_grid_of(embeddings, self.cnn(images))


class LearningBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm by the batch's statistics while it learns, else by its running ones, which then stay as they are.

    Without this a training of the head alone would go on changing the embeddings of a frozen side network.
    """

    def forward(self, x: Tensor) -> Tensor:
        learns = self.training and self.weight.requires_grad
        momentum = self.momentum or 0.0
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, learns, momentum, self.eps)


@dataclass(frozen=True)
class Ladder(SideConfig):
    """A ResNet-18 up to its third stage, which ends with as many channels as SAM's embedding.

    Its norms depend neither on the batch nor on its history, so a batch may be a single slice, and an embedding in
    training is that of inference: GroupNorm from a random start, BatchNorm with ImageNet's statistics from ``weights``.

    Attributes:
        weights: a file with torchvision's ResNet-18 on ImageNet (.pth or .safetensors) to start from; needed for a new
            model alone, since a model file holds the whole network. A file with torchvision's name must have its
            SHA-256. None starts at random; nothing is ever downloaded.
        reference: fused and normed as in the paper's code: an even mix at first, no projection, BatchNorm that learns
            its statistics, images as they are.
    """

    kind = "ladder"
    weights: str | None = None
    reference: bool = False

    def build(self, backbone: Backbone, seed: int) -> SideNetwork:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            cnn = _resnet(self._norm())
            side = ReferenceLadderNetwork(cnn) if self.reference else LadderNetwork(cnn)
        return side.to(backbone.mask_decoder.iou_token.weight)

    def pretrain(self, side: SideNetwork) -> None:
        if self.weights is None:
            return
        assert isinstance(side, LadderNetwork | ReferenceLadderNetwork)
        path = Path(self.weights).expanduser()
        _check(path)
        state = read_checkpoint(path)
        own = side.cnn.state_dict()
        used = {name: tensor for name, tensor in state.items() if name.split(".")[0] in _STAGES}
        # Older files lack the count of batches, which only a norm without momentum reads.
        counts = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
        remedy = "Give the state dict of torchvision's resnet18."
        load_strictly(side.cnn, counts | used, where=path, remedy=remedy)

    def _norm(self) -> Callable[[int], nn.Module]:
        if self.reference:
            return LearningBatchNorm2d
        return FrozenStatsBatchNorm2d if self.weights else _group_norm


def _resnet(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """ResNet-18 without its last stage and its classifier; names as in torchvision's state dict."""
    whole = resnet18(norm_layer=norm)
    return nn.Sequential(OrderedDict((name, whole.get_submodule(name)) for name in _STAGES))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, channels)


def _on_grid_of(embeddings: Tensor, x: Tensor) -> Tensor:
    """(B,256,h,w) -> (B,256,g,g), bilinearly."""
    return F.interpolate(x, size=embeddings.shape[-2:], mode="bilinear", align_corners=False)


def _check(path: Path) -> None:
    """Raise ``WeightsError`` unless ``path`` is a file, and the published one if it has a published name."""
    if not path.is_file():
        raise WeightsError(
            "no such weights file", where=path, remedy="Give the path of torchvision's resnet18 weights."
        )
    expected = PUBLISHED.get(path.name)
    if expected is not None and (found := sha256_of(path)) != expected:
        raise WeightsError(
            f"damaged: its SHA-256 is {found}, not the published {expected}",
            where=path,
            remedy="Fetch it again, or rename it if it is meant to differ.",
        )
