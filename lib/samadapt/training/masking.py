"""Masked image modelling: patches of a slice are hidden, and the encoder learns to say what was there.

From He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), section 3: which patches are hidden
(a random permutation, the same share in every image), each hidden patch normalised by its own mean and deviation as the
target, and the mean squared error over hidden patches alone.

From Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022), section 3: the encoder sees the
whole image with the hidden patches filled in, so that it may be convolutional or hierarchical (He et al. drop them,
which only a plain ViT allows); a share of 0.6; one linear layer as decoder.

Of neither: the filling is the mean of what is visible, in the image, so that the encoder stays exactly the published
one; deviations below ``FLOOR`` count as ``FLOOR``, because medical images have much empty background, whose noise
nobody could foresee; and the embedding is held near the one that the base has of the whole image (``distance``),
because the prompt decoder, which learns nothing here, must still understand it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from samadapt.backbones import EMBED_DIM, Backbone

PATCH = 16
"""Side of a patch in pixels; image sizes are multiples of it."""

SHARE = 0.6
"""Share of the patches that are hidden."""

FLOOR = 5 / 255
"""Smallest deviation that a patch is normalised by, on the scale of images in [0,1]."""

CHANNELS = 3


def draw_hidden(batch: int, size: int, seed: int) -> Tensor:
    """(B,1,S/PATCH,S/PATCH) bool on the CPU, True where a patch is hidden; the same seed hides the same patches."""
    cells = size // PATCH
    noise = torch.rand(batch, cells * cells, generator=torch.Generator().manual_seed(seed))
    return (noise.argsort(dim=1) < round(SHARE * cells * cells)).view(batch, 1, cells, cells)


def hide(images: Tensor, hidden: Tensor) -> Tensor:
    """(B,3,S,S) -> the same with every hidden patch filled with the mean of its image's visible ones, per channel."""
    mask = _pixels(hidden)
    visible = (images * ~mask).sum(dim=(2, 3), keepdim=True) / (~mask).sum(dim=(2, 3), keepdim=True)
    return torch.where(mask, visible, images)


def reconstruction_loss(predicted: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over the hidden patches, each normalised; 1 or less where the prediction is 0 everywhere.

    Args:
        predicted: (B,3,S,S) normalised patches.
        images: (B,3,S,S) in [0,1], what was there.
        hidden: (B,1,S/PATCH,S/PATCH) bool.
    """
    patches, mean, deviation = _patches(images)
    errors = F.pixel_unshuffle(predicted.float(), PATCH) - (patches - mean) / deviation
    return errors.square().mean(dim=1, keepdim=True)[hidden].mean()


def reconstruction(predicted: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """(B,3,S,S) in [0,1] for people: visible patches as they are, hidden ones as predicted.

    What is predicted is normalised; the hidden patches get their mean and deviation from ``images``.
    """
    _, mean, deviation = _patches(images)
    shown = F.pixel_shuffle(F.pixel_unshuffle(predicted.float(), PATCH) * deviation + mean, PATCH)
    return torch.where(_pixels(hidden), shown, images).clamp(0, 1)


def distance(embedding: Tensor, base: Tensor) -> Tensor:
    """Mean squared difference of two embeddings (B,256,g,g), in variances of ``base``; 2 where they share nothing."""
    return F.mse_loss(embedding.float(), base.float()) / base.float().var()


class MaskedAutoencoder(nn.Module):
    """A backbone's image encoder, and a norm and one linear layer that turn each cell of its embedding into pixels.

    Args:
        backbone: its encoder is trained; nothing else of it is used.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        stride = backbone.image_size // backbone.embedding_size
        pixels = nn.Conv2d(EMBED_DIM, CHANNELS * stride**2, 1)
        # It begins with every patch's mean: the best that can be said without having learned anything.
        for parameter in pixels.parameters():
            nn.init.zeros_(parameter)
        # Normalised first: backbones' embeddings differ tenfold in scale, and one learning rate is to suit them all.
        self.decoder = nn.Sequential(LayerNorm2d(EMBED_DIM), pixels, nn.PixelShuffle(stride))

    def forward(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) in [0,1] and hidden patches (B,1,S/PATCH,S/PATCH) -> what it makes of the visible ones.

        Returns:
            Normalised pixels (B,3,S,S), and the embedding (B,256,g,g) that they are made from.
        """
        embedding = self.backbone.embed(hide(images, hidden))
        return self.decoder(embedding), embedding


def _pixels(hidden: Tensor) -> Tensor:
    """(B,1,c,c) patches -> (B,1,S,S) pixels."""
    return hidden.repeat_interleave(PATCH, dim=2).repeat_interleave(PATCH, dim=3)


def _patches(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B,3,S,S) -> (B,3*PATCH*PATCH,c,c), one patch in each cell, and its mean and deviation (B,1,c,c)."""
    patches = F.pixel_unshuffle(images, PATCH)
    deviation, mean = torch.std_mean(patches, dim=1, keepdim=True, correction=0)
    return patches, mean, deviation.clamp(min=FLOOR)
