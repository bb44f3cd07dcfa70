"""SAM's decoder widened as the papers' code does it: to compare parameter counts and results with theirs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

from samadapt.adapters.peft_tuners import inject_tuner
from samadapt.backbones.base import EMBED_DIM, Backbone
from samadapt.data.labels import LabelMap
from samadapt.heads.base import Head, HeadConfig
from samadapt.heads.sam_decoder import decode_masks, decoder_attention, image_position, no_mask_prompt, upscale
from samadapt.heads.two_way import add_bottlenecks, two_way


class WidenedDecoder(Head):
    """One decoder with a mask token for each class, and a prompt encoder of its own whose no-mask vector may learn.

    Its weights are SAM's wherever a tensor has the same shape, the others start at random: what loading SAM's
    checkpoint into a widened decoder comes to in the papers' code (methods: 0.3).

    Args:
        backbone: whose decoder and prompt encoder are copied.
        tokens: mask tokens.
        dropped: how many of the first ones are computed and thrown away.
        seed: of the random tensors.
    """

    def __init__(self, backbone: Backbone, tokens: int, dropped: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.decoder = MaskDecoder(
                num_multimask_outputs=tokens - 1,
                transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED_DIM, mlp_dim=2048, num_heads=8),
                transformer_dim=EMBED_DIM,
                iou_head_depth=3,
                iou_head_hidden_dim=256,
            )
        sams, own = backbone.mask_decoder.state_dict(), self.decoder.state_dict()
        fitting = {name: tensor for name, tensor in sams.items() if name in own and own[name].shape == tensor.shape}
        self.decoder.to(next(backbone.parameters()).device).load_state_dict({**own, **fitting})
        self.prompt_encoder = copy.deepcopy(backbone.prompt_encoder)
        self._dropped = dropped
        self.pretrained = frozenset(
            f"decoder.transformer.{name}" for name, _ in self.decoder.transformer.named_parameters()
        )

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        decoder = self.decoder
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = own.expand(len(embeddings), -1, -1)
        source = embeddings + no_mask_prompt(self.prompt_encoder, embeddings)
        hidden, image = two_way(decoder.transformer, source, image_position(self.prompt_encoder, source), tokens)
        kept = slice(self._dropped, None)
        return decode_masks(
            hidden[:, 1:][:, kept],
            decoder.output_hypernetworks_mlps[kept],
            upscale(decoder.output_upscaling, image),
        )


@dataclass(frozen=True)
class WidenedHead(HeadConfig):
    """The reference form of ``SamHead``.

    Attributes:
        learns: "all" (SAMed; vanilla tuning: the prompt encoder learns, too); "upscaling" (SAM-LST's code); "lora"
            (finetune-SAM: all but the transformer, which has LoRA); "bottleneck" (finetune-SAM: the adapters alone, so
            that the new tokens stay at random).
        extra: mask tokens beyond K+1 that are computed and thrown away: none in SAMed, one in finetune-SAM.
        rank: of LoRA.
    """

    kind = "widened"
    learns: Literal["all", "upscaling", "lora", "bottleneck"] = "all"
    extra: int = 0
    rank: int = 4

    def build(self, backbone: Backbone, labels: LabelMap, seed: int) -> Head:
        head = WidenedDecoder(backbone, len(labels.names) + 1 + self.extra, self.extra, seed)
        head.requires_grad_(self.learns in ("all", "lora"))
        transformer = head.decoder.transformer
        if self.learns == "upscaling":
            head.decoder.output_upscaling.requires_grad_(True)
        elif self.learns == "lora":
            transformer.requires_grad_(False)
            options = {"r": self.rank, "lora_alpha": self.rank}
            inject_tuner(transformer, "lora", options, decoder_attention(transformer), seed)
        elif self.learns == "bottleneck":
            add_bottlenecks(transformer, seed)
        return head
