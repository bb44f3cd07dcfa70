"""SAM's decoder prompted by label names (S-SAM, arXiv 2408.06447, section 3)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from samadapt.backbones.base import EMBED_DIM, Backbone
from samadapt.data.labels import LabelMap
from samadapt.errors import ConfigError, WeightsError
from samadapt.heads.base import Head, HeadConfig
from samadapt.heads.sam_decoder import decode_masks, image_position, upscale
from samadapt.heads.two_way import two_way, two_way_without_positions
from samadapt.text import TextEncoder, text_encoder


class TextAffine(nn.Module):
    """S-SAM's Text Affine Layer: text vectors (K,d) -> prompt tokens (K,256).

    Args:
        width: d.
        norm: LayerNorm; the published code has BatchNorm over the labels, which cannot learn from a single one.
    """

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(width, EMBED_DIM)
        self.norm = norm

    def forward(self, vectors: Tensor) -> Tensor:
        if self.training and len(vectors) == 1 and isinstance(self.norm, nn.BatchNorm1d):
            raise ConfigError(
                "BatchNorm over one label leaves nothing of its name",
                where="labels",
                remedy="Name a second one, or leave the reference form.",
            )
        return self.norm(self.linear(vectors).relu())


class LabelDecoder(nn.Module):
    """SAM's decoder with its single mask alone: each prompt gives one map of logits.

    Args:
        decoder: the base model's mask decoder; its parts are copied.
    """

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        self.transformer = copy.deepcopy(decoder.transformer)
        self.upscaling = copy.deepcopy(decoder.output_upscaling)
        self.own_tokens = nn.Parameter(torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).detach())
        self.hypernetworks = copy.deepcopy(decoder.output_hypernetworks_mlps[:1])

    def forward(self, image: Tensor, dense: Tensor, prompts: Tensor, place: Tensor) -> Tensor:
        """Image (1,256,g,g), dense prompt (1,256,g,g), K prompts (K,T,256), position (1,256,g,g) -> (K,4g,4g)."""
        tokens = torch.cat([self.own_tokens.expand(len(prompts), -1, -1), prompts], dim=1)
        hidden, image = self._transform(image, dense, place, tokens)
        return decode_masks(hidden[:, 1:2], self.hypernetworks, upscale(self.upscaling, image))[:, 0]

    def _transform(self, image: Tensor, dense: Tensor, place: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return two_way(self.transformer, image + dense, place, tokens)


class BareLabelDecoder(LabelDecoder):
    """The same as S-SAM's published code has it: no dense prompt, and no positions in its transformer."""

    def _transform(self, image: Tensor, dense: Tensor, place: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return two_way_without_positions(self.transformer, image, tokens)


class TextDecoderHead(Head):
    """Each label's name is a prompt, and what SAM's decoder finds for it is that label's logit; background's is 0.

    So the softmax over the K+1 logits gives label c and background the ratio exp(z_c), the sigmoid's own, for a single
    label the softmax is the sigmoid, and the largest logit is S-SAM's decision: the label with the highest probability
    where that is at least one half, else background (its code's inference). Cross-entropy and Dice of the project's
    class loss therefore need no form of their own; they see logits, which in the published code go through the
    sigmoid twice. Unlike there, all labels share one embedding, and a slice teaches all of them at once.

    The decoder runs once per label, so its time and memory grow with K. Clicks and boxes are left to the plain model.

    Args:
        decoder: what finds a label's mask; frozen here.
        vectors: (K,d) of the labels; NaN where they are unknown until a model file is loaded.
        affine: from d to 256.
        missing: why vectors are unknown; raised where they are needed.
    """

    prompts = ("none", "text")
    vectors: Tensor

    def __init__(
        self, decoder: LabelDecoder, vectors: Tensor, affine: TextAffine, missing: WeightsError | None = None
    ) -> None:
        super().__init__()
        self.labels = decoder.requires_grad_(False)
        like = self.labels.own_tokens
        self.affine = affine.to(like.device, like.dtype)
        self.register_buffer("vectors", vectors.to(like.device, like.dtype))
        self._missing = missing

    def copied(self) -> set[str]:
        return {f"labels.{name}" for name, p in self.labels.named_parameters() if not p.requires_grad}

    def require_complete(self) -> None:
        """As ``Head.require_complete``: the text encoder is missing, and no model file has brought its vectors."""
        if self._missing is not None and self.vectors.isnan().any():
            raise self._missing

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        """As ``Head.class_logits``.

        Raises:
            WeightsError: the text encoder is missing, and no model file has brought its vectors.
        """
        self.require_complete()
        empty, dense = prompt_encoder(None, None, None)
        names = self.affine(self.vectors)[:, None]
        prompts = torch.cat([empty.expand(len(names), -1, -1), names], dim=1)
        place = image_position(prompt_encoder, embeddings)
        maps = torch.stack([self.labels(image[None], dense, prompts, place) for image in embeddings])
        return torch.cat([torch.zeros_like(maps[:, :1]), maps], dim=1)


@dataclass(frozen=True)
class TextHead(HeadConfig):
    """Label names as prompts.

    What learns is the Text Affine Layer, the norms of the decoder's transformer (both as published), and all that turns
    its tokens into masks: the decoder's own tokens, the hyper-network of the single mask and the upscaling. These have
    only ever answered clicks and boxes, cost next to nothing and take 0.9 MB of a model file; the transformer's
    matrices, most of the decoder, stay SAM's. One short trial (hippocampus_mr, LiteMedSAM at 64 px, 32 labelled slices,
    late blocks, one minute of training or 19 to 26 steps; held-out Dice): 0.69 so, 0.53 with the norms alone, 0.38 with
    the whole decoder.

    Attributes:
        clip: folder of CLIP ViT-B/32, whose text encoder then reads the names; None reads them with word vectors. A
            model file holds the vectors, so it needs no folder.
        reference: the form of the published code: CLIP, BatchNorm behind the affine layer, norms alone in the decoder,
            and ``BareLabelDecoder``.
    """

    kind = "text"
    clip: str | None = None
    reference: bool = False

    def build(self, backbone: Backbone, labels: LabelMap, seed: int) -> Head:
        """As ``HeadConfig.build``.

        Raises:
            ConfigError: two labels read the same to the text encoder.
        """
        encoder = text_encoder("clip" if self.clip or self.reference else "words", self.clip)
        vectors, missing = _vectors(encoder, labels)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            affine = TextAffine(encoder.width, (nn.BatchNorm1d if self.reference else nn.LayerNorm)(EMBED_DIM))
        decoder = (BareLabelDecoder if self.reference else LabelDecoder)(backbone.mask_decoder)
        head = TextDecoderHead(decoder, vectors, affine, missing)
        self._release(head.labels)
        return head

    def _release(self, decoder: LabelDecoder) -> None:
        """Let learn what the configuration says."""
        for module in decoder.transformer.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
        if not self.reference:
            decoder.own_tokens.requires_grad_(True)
            decoder.hypernetworks.requires_grad_(True)
            decoder.upscaling.requires_grad_(True)


def _vectors(encoder: TextEncoder, labels: LabelMap) -> tuple[Tensor, WeightsError | None]:
    """(K,d) and None, or NaN and why: a model file may bring them, and counting parameters needs none.

    Raises:
        ConfigError: two labels have the same vector, so that no training could tell them apart.
    """
    try:
        vectors = encoder.encode(labels.names)
    except WeightsError as error:
        return torch.full((len(labels), encoder.width), torch.nan), error
    for n, name in enumerate(labels.names):
        for m in range(n):
            if torch.equal(vectors[n], vectors[m]):
                raise ConfigError(
                    f"'{labels.names[m]}' and '{name}' read the same to the text encoder",
                    where="labels",
                    remedy="Rename one of them.",
                )
    return vectors, None
