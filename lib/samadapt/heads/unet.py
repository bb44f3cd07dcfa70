"""A U-Net from scratch in the same loop: the honest baseline that every adaptation has to beat."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import torch
from monai.networks.nets import BasicUNet
from segment_anything.modeling import PromptEncoder
from torch import Tensor

from samadapt.backbones.base import Backbone
from samadapt.data.labels import LabelMap
from samadapt.heads.base import Head, HeadConfig

CHANNELS = (16, 16, 32, 64, 128, 16)
"""Feature maps from the finest to the coarsest level and of the last layer."""


def unet_2d(classes: int) -> BasicUNet:
    """MONAI's ``BasicUNet`` with random weights: three channels -> background and ``classes``."""
    with redirect_stdout(StringIO()):  # MONAI prints the features of each network that it makes
        return BasicUNet(2, 3, classes + 1, CHANNELS)


class UNet2D(Head):
    """MONAI's ``BasicUNet`` on the slices themselves (after Falk et al., "U-Net: deep learning for cell counting,
    detection, and morphometry", Nature Methods 2019)."""

    reads_images = True

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = unet_2d(classes)

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        """Images (B,3,S,S) in [0,1] -> (B,K+1,S,S) logits, background first."""
        return self.network(embeddings)


@dataclass(frozen=True)
class UNetHead(HeadConfig):
    """A U-Net with random weights in place of encoder and decoder."""

    kind = "unet"

    def build(self, backbone: Backbone, labels: LabelMap, seed: int) -> Head:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNet2D(len(labels.names)).to(next(backbone.parameters()).device)
