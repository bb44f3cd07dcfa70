"""SAM's mask decoder twice: widened to K+1 classes, and as it is for points and boxes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from samadapt.adapters.peft_tuners import inject_tuner
from samadapt.backbones.base import Backbone
from samadapt.data.labels import LabelMap
from samadapt.heads.base import Head, HeadConfig
from samadapt.heads.two_way import add_bottlenecks, two_way

INITIAL_NOISE = 0.02
"""Standard deviation of the noise on copied class tokens, relative to that of the tokens."""


class ClassDecoder(nn.Module):
    """Class logits without a prompt: SAM's decoder with K+1 class tokens in place of its mask tokens (as in SAMed).

    Each class token has its own hyper-network. Tokens and hyper-networks start as copies of SAM's three multimask
    ones, cycled, plus a little noise on the tokens: explicit, and the same for any number of classes.

    Args:
        decoder: the base model's mask decoder; its parts are copied.
        num_classes: K, foreground classes.
        seed: seeds the noise.
    """

    def __init__(self, decoder: MaskDecoder, num_classes: int, seed: int) -> None:
        super().__init__()
        self.transformer = copy.deepcopy(decoder.transformer)
        self.upscaling = copy.deepcopy(decoder.output_upscaling)
        self.first_token = nn.Parameter(decoder.iou_token.weight.detach().clone())
        base = decoder.mask_tokens.weight.detach()
        source = [1 + c % (decoder.num_mask_tokens - 1) for c in range(num_classes + 1)]
        noise = torch.randn(len(source), base.shape[1], generator=torch.Generator().manual_seed(seed))
        self.class_tokens = nn.Parameter(base[source] + INITIAL_NOISE * base.std() * noise.to(base))
        self.hypernetworks = nn.ModuleList(copy.deepcopy(decoder.output_hypernetworks_mlps[i]) for i in source)

    def forward(self, embeddings: Tensor, dense: Tensor, position: Tensor) -> Tensor:
        """(B,256,g,g), dense prompt (1,256,g,g), position (1,256,g,g) -> (B,K+1,4g,4g), background first."""
        tokens = torch.cat([self.first_token, self.class_tokens]).expand(len(embeddings), -1, -1)
        hidden, image = two_way(self.transformer, embeddings + dense, position, tokens)
        return decode_masks(hidden[:, 1:], self.hypernetworks, upscale(self.upscaling, image))


class ClassDecoderHead(Head):
    """SAM's decoder widened to classes, and nothing for prompts.

    Args:
        decoder: the base model's mask decoder; copied, the original is not touched.
        num_classes: K, foreground classes.
        seed: seeds the noise on the class tokens.
    """

    def __init__(self, decoder: MaskDecoder, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.classes = ClassDecoder(decoder, num_classes, seed).requires_grad_(True)
        self.pretrained = frozenset(f"classes.transformer.{name}" for name, _ in decoder.transformer.named_parameters())

    def copied(self) -> set[str]:
        new = ("classes.class_tokens", "classes.hypernetworks.", "classes.first_token")
        return {name for name, p in self.named_parameters() if not p.requires_grad and not name.startswith(new)}

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        return self.classes(
            embeddings, no_mask_prompt(prompt_encoder, embeddings), image_position(prompt_encoder, embeddings)
        )


class SamDecoderHead(ClassDecoderHead):
    """Two decoders on the same embeddings: one for classes, and SAM's own for prompts.

    They are apart because learning classes with a shared one made it forget how to follow prompts: after four minutes
    on ACDC a tight box gave a median Dice of 0.69 on the left ventricle, where SAM's own decoder gives 0.96.

    Args:
        decoder: the base model's mask decoder; copied, the original is not touched.
        num_classes: K, foreground classes.
        seed: seeds the noise on the class tokens.
    """

    prompts = ("none", "points", "box")

    def __init__(self, decoder: MaskDecoder, num_classes: int, seed: int = 0) -> None:
        super().__init__(decoder, num_classes, seed)
        self.prompted = copy.deepcopy(decoder).requires_grad_(True)

    def prompt_masks(
        self, embeddings: Tensor, sparse: Tensor, dense: Tensor, prompt_encoder: PromptEncoder, kept: slice
    ) -> tuple[Tensor, Tensor]:
        decoder = self.prompted
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)
        # An image that all prompts share goes in once; the first block that writes into it makes N of it.
        source = embeddings + (dense[:1] if dense.stride(0) == 0 else dense)
        hidden, image = two_way(decoder.transformer, source, image_position(prompt_encoder, source), tokens)
        upscaled = upscale(decoder.output_upscaling, image)
        masks = decode_masks(hidden[:, 1 : len(own)][:, kept], decoder.output_hypernetworks_mlps[kept], upscaled)
        return masks, decoder.iou_prediction_head(hidden[:, 0])[:, kept]


Learns = Literal["all", "classes", "upscaling", "lora", "bottleneck"]


@dataclass(frozen=True)
class SamHead(HeadConfig):
    """SAM's decoder with class tokens, and beside it one that goes on answering points and boxes.

    Attributes:
        learns: what of each decoder: "all"; "classes" (mask tokens, their hyper-networks and the upscaling);
            "upscaling" alone (SAM-LST's code); "lora" (LoRA on q and v of every attention, and all that is behind the
            transformer: SAMed_s, finetune-SAM); "bottleneck" (an adapter after the attentions and beside the
            perceptron of both blocks: finetune-SAM; tokens and hyper-networks learn, too, since those of the classes
            are new).
        rank: of LoRA.
        prompted: whether there is a decoder for points and boxes; without it the head finds classes alone, as in
            SAMed and SAM-LST.
    """

    kind = "sam"
    learns: Learns = "all"
    rank: int = 4
    prompted: bool = True

    def build(self, backbone: Backbone, labels: LabelMap, seed: int) -> Head:
        make = SamDecoderHead if self.prompted else ClassDecoderHead
        head = make(backbone.mask_decoder, len(labels.names), seed)
        for part in head.children():
            self._limit(part, seed)
        return head

    def _limit(self, decoder: ClassDecoder | MaskDecoder, seed: int) -> None:
        """Let ``decoder`` learn what the configuration says."""
        if self.learns == "all":
            return
        decoder.transformer.requires_grad_(False)
        if self.learns == "lora":
            options = {"r": self.rank, "lora_alpha": self.rank}
            inject_tuner(decoder.transformer, "lora", options, decoder_attention(decoder.transformer), seed)
        elif self.learns == "bottleneck":
            add_bottlenecks(decoder.transformer, seed)
            _upscaling(decoder).requires_grad_(False)
        elif self.learns == "upscaling":
            decoder.requires_grad_(False)
            _upscaling(decoder).requires_grad_(True)


def decoder_attention(transformer: nn.Module) -> list[str]:
    """Names of the query and value projections of every attention in the decoder's transformer."""
    layers = [path for path, module in transformer.named_modules() if isinstance(module, Attention)]
    return [f"{path}.{part}" for path in layers for part in ("q_proj", "v_proj")]


def _upscaling(decoder: ClassDecoder | MaskDecoder) -> nn.Module:
    return decoder.upscaling if isinstance(decoder, ClassDecoder) else decoder.output_upscaling


def image_position(prompt_encoder: PromptEncoder, embeddings: Tensor) -> Tensor:
    """SAM's own positional encoding of the grid, (1,256,g,g)."""
    return prompt_encoder.get_dense_pe().to(embeddings.dtype)


def no_mask_prompt(prompt_encoder: PromptEncoder, embeddings: Tensor) -> Tensor:
    """What SAM adds to the embedding where no mask is given, (1,256,g,g)."""
    return prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *embeddings.shape[-2:])


def upscale(upscaling: nn.Sequential, image: Tensor) -> Tensor:
    """SAM's upscaling of image tokens (N,P,256) -> (N,P,2,2,2,2,32): row and column in a cell, then in its quarters.

    Its transposed convolutions do not overlap (kernel 2, stride 2), so each is a matrix product of every token, and
    the norm between them runs over the last dimension. No feature map is ever rearranged; ``to_maps`` does that
    with the masks alone.
    """
    first, norm, activation, second, last_activation = upscaling
    assert isinstance(first, nn.ConvTranspose2d)
    assert isinstance(norm, LayerNorm2d)
    assert isinstance(second, nn.ConvTranspose2d)
    x = _quarters(first, image)
    x = activation(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
    return last_activation(_quarters(second, x))


def _quarters(conv: nn.ConvTranspose2d, tokens: Tensor) -> Tensor:
    """(...,C) -> (...,2,2,D): what a transposed convolution with kernel 2 and stride 2 makes of each token."""
    weight = conv.weight.permute(2, 3, 1, 0)
    assert conv.bias is not None
    return F.linear(tokens, weight.flatten(0, 2), conv.bias.repeat(4)).unflatten(-1, weight.shape[:3])


def masks_of(weights: Tensor, upscaled: Tensor) -> Tensor:
    """Weights (N,32,M) of M masks and what ``upscale`` gave -> (N,M,4g,4g)."""
    return to_maps(upscaled.flatten(1, -2) @ weights)


def to_maps(values: Tensor) -> Tensor:
    """Values (N,P*16,M) in the order of what ``upscale`` gives -> maps (N,M,4g,4g)."""
    side = math.isqrt(values.shape[1] // 16)
    cells = values.view(len(values), side, side, 2, 2, 2, 2, -1)
    return cells.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(len(values), -1, 4 * side, 4 * side)


def decode_masks(tokens: Tensor, hypernetworks: nn.ModuleList, upscaled: Tensor) -> Tensor:
    """Mask tokens (N,M,256), each through a hyper-network of its own, and what ``upscale`` gave -> (N,M,4g,4g)."""
    weights = torch.stack([net(tokens[:, i]) for i, net in enumerate(hypernetworks)], dim=-1)
    return masks_of(weights, upscaled)
