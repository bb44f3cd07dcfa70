"""AutoSAM's three heads on a frozen encoder (Hu, Xu and Shi, 2023, arXiv 2306.13731); none takes points or boxes.

Each has a ``reference`` form with the structure of the paper's code, and a default form without its accidents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import Tensor, nn

from samadapt.backbones.base import EMBED_DIM, Backbone
from samadapt.data.labels import LabelMap
from samadapt.errors import ConfigError
from samadapt.heads.base import Head, HeadConfig
from samadapt.heads.sam_decoder import image_position, masks_of, no_mask_prompt, to_maps, upscale
from samadapt.heads.two_way import two_way

UPSCALED_DIM = 32
"""Channels behind SAM's upscaling."""

MASK_TOKENS = 2
"""Per class: SAM's decoder built with one alternative beside its single mask. The first of them becomes the mask."""

GROUPS = 8
"""Channel groups of every GroupNorm."""

Passes = Literal["joint", "class_wise"]


class TokenGroupHead(Head):
    """SAM's mask decoder with three tokens for each class, background included: one for IoU and two for masks.

    The classes share everything but their tokens: the transformer, the upscaling, and the hyper-network of SAM's
    single mask, which turns a class's first mask token into its logits. These start as copies of SAM's.

    Args:
        decoder: the base model's mask decoder; its parts are copied.
        iou_tokens: (K+1,1,256).
        mask_tokens: (K+1,2,256).
        classes_per_pass: how many classes go through the decoder together. Within a pass all tokens attend to each
            other; K+1 takes one pass, 1 is the paper's form and takes K+1 times as long.
    """

    def __init__(self, decoder: MaskDecoder, iou_tokens: Tensor, mask_tokens: Tensor, classes_per_pass: int) -> None:
        super().__init__()
        self.transformer = copy.deepcopy(decoder.transformer)
        self.upscaling = copy.deepcopy(decoder.output_upscaling)
        self.hypernetwork = copy.deepcopy(decoder.output_hypernetworks_mlps[0])
        self.iou_tokens = nn.Parameter(iou_tokens)
        self.mask_tokens = nn.Parameter(mask_tokens)
        self.classes_per_pass = classes_per_pass
        self.requires_grad_(True)

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        image, position = self._placed(embeddings, prompt_encoder)
        groups = torch.cat([self.iou_tokens, self.mask_tokens], dim=1)
        passes = groups.split(self.classes_per_pass)
        return torch.cat([self._decode(image, position, part) for part in passes], dim=1)

    def _placed(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> tuple[Tensor, Tensor]:
        """The image (B,256,g,g) that the transformer gets, and the positions (1,256,g,g) of its tokens."""
        return embeddings + no_mask_prompt(prompt_encoder, embeddings), image_position(prompt_encoder, embeddings)

    def _decode(self, image: Tensor, position: Tensor, groups: Tensor) -> Tensor:
        """Image (B,256,g,g), position (1,256,g,g), token groups (C,3,256) of C classes -> logits (B,C,4g,4g)."""
        tokens = groups.flatten(0, 1).expand(len(image), -1, -1)
        hidden, image = two_way(self.transformer, image, position, tokens)
        first_masks = hidden.unflatten(1, groups.shape[:2])[:, :, 1]
        return masks_of(self.hypernetwork(first_masks).transpose(1, 2), upscale(self.upscaling, image))


class ReferenceTokenGroupHead(TokenGroupHead):
    """The same as in the paper's code: positions from a new random Fourier matrix in place of SAM's, and no no-mask
    embedding. The IoU tokens stay as they are; a second hyper-network is trainable and never used.

    Its head that predicts IoU is left out: it neither learns nor answers anything.

    Args:
        decoder: see ``TokenGroupHead``.
        iou_tokens: see ``TokenGroupHead``.
        mask_tokens: see ``TokenGroupHead``.
        classes_per_pass: see ``TokenGroupHead``.
        positions: its matrix is a buffer, and part of a model file.
    """

    def __init__(
        self,
        decoder: MaskDecoder,
        iou_tokens: Tensor,
        mask_tokens: Tensor,
        classes_per_pass: int,
        positions: PositionEmbeddingRandom,
    ) -> None:
        super().__init__(decoder, iou_tokens, mask_tokens, classes_per_pass)
        self.iou_tokens.requires_grad_(False)
        self.unused_hypernetwork = copy.deepcopy(decoder.output_hypernetworks_mlps[1]).requires_grad_(True)
        self.positions = positions

    def _placed(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> tuple[Tensor, Tensor]:
        return embeddings, self.positions(embeddings.shape[-2:])[None].to(embeddings.dtype)


class ConvHead(Head):
    """A plain convolutional network on the embedding.

    Args:
        layers: (B,256,g,g) -> (B,K+1,4g,4g).
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        return self.layers(embeddings)


class LinearHead(Head):
    """SAM's upscaling and a classifier of every pixel by itself.

    Args:
        upscaling: layers as those of SAM's ``output_upscaling``.
        classifier: (...,32) -> (...,K+1).
    """

    def __init__(self, upscaling: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.upscaling = upscaling
        self.classifier = classifier

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        pixels = upscale(self.upscaling, embeddings.flatten(2).transpose(1, 2))
        return to_maps(self.classifier(pixels.flatten(1, -2)))


@dataclass(frozen=True)
class AutoSamVit(HeadConfig):
    """AutoSAM's main head: a transformer decoder in which every class has tokens of its own.

    Attributes:
        passes: "joint": all classes in one pass, their tokens attend to each other; "class_wise": one pass for each
            class, as in the paper, at K+1 times the cost.
        reference: as in the paper's code; see ``ReferenceTokenGroupHead``.

    All tokens start as standard normal noise from the seed, in both forms. Copies of SAM's tokens with a little noise
    are no better start here, since all that tells the classes apart is their tokens: with noise of a fiftieth of
    SAM's tokens' spread, LiteMedSAM's decoder (64 px, joint) needs more than 60 steps of AdamW for one synthetic slice
    with three classes (loss 0.9 then), with noise as wide as that spread about 60 (0.001 to 0.35 in three runs), with
    seven times as much, which is about 1, fewer than 30 (below 0.001).
    """

    kind = "autosam_vit"
    passes: Passes = "joint"
    reference: bool = False

    def __post_init__(self) -> None:
        if self.passes not in get_args(Passes):
            raise ConfigError(
                f"no such passes: {self.passes!r}", where="passes", remedy=f"Use one of {', '.join(get_args(Passes))}."
            )

    def build(self, backbone: Backbone, labels: LabelMap, seed: int) -> Head:
        decoder, classes = backbone.mask_decoder, len(labels.names) + 1
        together = classes if self.passes == "joint" else 1
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            iou, masks = (torch.randn(classes, count, EMBED_DIM) for count in (1, MASK_TOKENS))
            positions = PositionEmbeddingRandom(EMBED_DIM // 2)
        if self.reference:
            return _like(ReferenceTokenGroupHead(decoder, iou, masks, together, positions), backbone)
        return _like(TokenGroupHead(decoder, iou, masks, together), backbone)


@dataclass(frozen=True)
class AutoSamCnn(HeadConfig):
    """AutoSAM's convolutional head.

    Attributes:
        width: channels at the embedding's grid, a multiple of 32; halved by each of two upscalings. 128 makes 1.0
            million parameters.
        reference: the network of the paper's code instead, with 1024 channels in four blocks and without any norm
            (20.7 million parameters for four classes); ``width`` then means nothing.
    """

    kind = "autosam_cnn"
    width: int = 128
    reference: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.width % (4 * GROUPS):
            raise ConfigError(f"the CNN's width must be a multiple of {4 * GROUPS}, not {self.width}", where="width")

    def build(self, backbone: Backbone, labels: LabelMap, seed: int) -> Head:
        classes = len(labels.names) + 1
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = _reference_layers(classes) if self.reference else _normed_layers(self.width, classes)
        return _like(ConvHead(layers), backbone)


@dataclass(frozen=True)
class AutoSamLinear(HeadConfig):
    """Two linear layers on every pixel of the upscaled embedding: AutoSAM's smallest head.

    Attributes:
        reference: the upscaling starts at random instead of as SAM's, and a ReLU follows the logits, as in the paper's
            code: no logit is below zero, and a class whose logits are all zero has stopped learning.
    """

    kind = "autosam_linear"
    reference: bool = False

    def build(self, backbone: Backbone, labels: LabelMap, seed: int) -> Head:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hidden = nn.Linear(UPSCALED_DIM, UPSCALED_DIM)
            classifier = nn.Sequential(hidden, nn.ReLU(), nn.Linear(UPSCALED_DIM, len(labels.names) + 1))
            if self.reference:
                classifier.append(nn.ReLU())
                upscaling = _new_upscaling()
            else:
                upscaling = copy.deepcopy(backbone.mask_decoder.output_upscaling).requires_grad_(True)
        return _like(LinearHead(upscaling, classifier), backbone)


def _like(head: Head, backbone: Backbone) -> Head:
    """``head`` on the device and in the precision of ``backbone``."""
    return head.to(backbone.mask_decoder.iou_token.weight)


def _new_upscaling() -> nn.Sequential:
    """SAM's ``output_upscaling`` with random weights."""
    middle = EMBED_DIM // 4
    return nn.Sequential(
        nn.ConvTranspose2d(EMBED_DIM, middle, kernel_size=2, stride=2),
        LayerNorm2d(middle),
        nn.GELU(),
        nn.ConvTranspose2d(middle, UPSCALED_DIM, kernel_size=2, stride=2),
        nn.GELU(),
    )


def _normed_layers(width: int, classes: int) -> nn.Sequential:
    """Six convolutions at the embedding's grid, where they see far for little, two at the next and one at the last."""
    half, quarter = width // 2, width // 4
    return nn.Sequential(
        *_normed(nn.Conv2d(EMBED_DIM, width, 1)),
        *(layer for _ in range(6) for layer in _normed(_conv(width, width))),
        *_normed(nn.ConvTranspose2d(width, half, kernel_size=2, stride=2)),
        *(layer for _ in range(2) for layer in _normed(_conv(half, half))),
        *_normed(nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2)),
        *_normed(_conv(quarter, quarter)),
        nn.Conv2d(quarter, classes, 1),
    )


def _normed(convolution: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    return [convolution, nn.GroupNorm(GROUPS, convolution.out_channels), nn.ReLU()]


def _reference_layers(classes: int, depth: int = 4, top: int = 64) -> nn.Sequential:
    """The paper's network: ``depth`` blocks that halve the channels down to ``top``, the last two doubling the grid."""
    width = top * 2**depth
    layers: list[nn.Module] = [nn.Conv2d(EMBED_DIM, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU()]
    for block in range(depth):
        layers += [_conv(width, width), nn.ReLU()]
        if block < depth - 2:
            layers += [_conv(width, width // 2), nn.ReLU()]
        else:
            layers += [_conv(width, width), nn.ReLU(), nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)]
        width //= 2
    return nn.Sequential(*layers, _conv(width, width), nn.Conv2d(width, classes, 1))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
