"""What every network beside a frozen encoder promises: it sees the image and changes the embedding."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samadapt.backbones.base import EMBED_DIM, Backbone
from samadapt.parts import Part


class SideNetwork(nn.Module):
    """(embeddings (B,256,g,g), images (B,3,S,S) in [0,1]) -> embeddings (B,256,g,g)."""

    def __call__(self, embeddings: Tensor, images: Tensor) -> Tensor:
        return super().__call__(embeddings, images)


@dataclass(frozen=True)
class SideConfig(Part):
    """Which side network. A subclass is the configuration of one kind."""

    @abstractmethod
    def build(self, backbone: Backbone, seed: int) -> SideNetwork:
        """A new side network for ``backbone``; exactly what it learns requires gradients."""

    @abstractmethod
    def pretrain(self, side: SideNetwork) -> None:
        """Load what a new model starts from into what ``build`` gave; a model read from its file needs none of that.

        Raises:
            WeightsError: the configuration names a file that is missing, broken or not of this network.
        """


def pack(embeddings: Tensor, images: Tensor) -> Tensor:
    """Frozen embeddings (B,256,g,g) and the images (B,3,S,S) that they are of, as one (B,N) that a cache can keep."""
    return torch.cat([embeddings.flatten(1), images.flatten(1).to(embeddings)], dim=1)


def unpack(packed: Tensor, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Inverse of ``pack``."""
    grid, size = backbone.embedding_size, backbone.image_size
    embeddings, images = packed.split([EMBED_DIM * grid**2, 3 * size**2], dim=1)
    return embeddings.reshape(-1, EMBED_DIM, grid, grid), images.reshape(-1, 3, size, size)
