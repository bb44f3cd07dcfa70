"""SAM's mask decoder, widened to K+1 classes and still answering points and boxes."""

from __future__ import annotations

import copy

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

INITIAL_NOISE = 0.02
"""Standard deviation of the noise on copied class tokens, relative to that of the tokens."""


class SamDecoderHead(nn.Module):
    """Two ways to read one decoder: prompt-free class logits, and masks for points and boxes.

    SAM's own IoU token and mask tokens stay for prompts. K+1 class tokens, each with its own hyper-network, are added
    for prompt-free segmentation (widened tokens as in SAMed); transformer and upscaling are shared by both. Class
    tokens and hyper-networks start as copies of SAM's three multimask ones, cycled, plus a little noise: explicit, and
    the same for any number of classes.

    Args:
        decoder: the base model's mask decoder; copied, the original is not touched.
        num_classes: K, foreground classes.
        seed: seeds the noise.
    """

    prompts = ("none", "points", "box")

    def __init__(self, decoder: MaskDecoder, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder).requires_grad_(True)
        base = decoder.mask_tokens.weight.detach()
        source = [1 + c % (decoder.num_mask_tokens - 1) for c in range(num_classes + 1)]
        noise = torch.randn(len(source), base.shape[1], generator=torch.Generator().manual_seed(seed))
        tokens = base[source] + INITIAL_NOISE * base.std() * noise.to(base)
        self.class_tokens = nn.Parameter(tokens)
        self.class_hypernetworks = nn.ModuleList(
            copy.deepcopy(self.decoder.output_hypernetworks_mlps[i]) for i in source
        )

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        """(B,256,g,g) -> (B,K+1,4g,4g) logits, background first. No prompt is used."""
        tokens = torch.cat([self.decoder.iou_token.weight, self.class_tokens])
        dense = _no_mask(prompt_encoder, embeddings)
        hidden, upscaled = self._decode(embeddings, dense, tokens.expand(len(embeddings), -1, -1), prompt_encoder)
        return _masks(hidden[:, 1:], upscaled, self.class_hypernetworks)

    def prompt_masks(
        self, embeddings: Tensor, sparse: Tensor, dense: Tensor, prompt_encoder: PromptEncoder
    ) -> tuple[Tensor, Tensor]:
        """Masks for encoded prompts.

        Args:
            embeddings: (N,256,g,g), or (1,256,g,g) shared by all N prompts.
            sparse: (N,T,256) encoded points and boxes.
            dense: (N,256,g,g) encoded mask prompts, or the no-mask embedding.

        Returns:
            Logits (N,4,4g,4g) and predicted IoU (N,4): token 0 is the single mask, 1..3 the multimask.
        """
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)
        hidden, upscaled = self._decode(embeddings, dense, tokens, prompt_encoder)
        masks = _masks(hidden[:, 1 : len(own)], upscaled, self.decoder.output_hypernetworks_mlps)
        return masks, self.decoder.iou_prediction_head(hidden[:, 0])

    def _decode(
        self, embeddings: Tensor, dense: Tensor, tokens: Tensor, prompt_encoder: PromptEncoder
    ) -> tuple[Tensor, Tensor]:
        """Tokens after the two-way transformer (N,T,256) and the upscaled image features (N,32,4g,4g)."""
        source = embeddings + dense
        source = source.expand(len(tokens), -1, -1, -1)
        position = prompt_encoder.get_dense_pe().to(source.dtype).expand(len(tokens), -1, -1, -1)
        hidden, image = self.decoder.transformer(source, position, tokens)
        image = image.transpose(1, 2).reshape(source.shape)
        return hidden, self.decoder.output_upscaling(image)


def _no_mask(prompt_encoder: PromptEncoder, embeddings: Tensor) -> Tensor:
    return prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *embeddings.shape[-2:])


def _masks(tokens: Tensor, upscaled: Tensor, hypernetworks: nn.ModuleList) -> Tensor:
    weights = torch.stack([net(tokens[:, i]) for i, net in enumerate(hypernetworks)], dim=1)
    return torch.einsum("nmc,nchw->nmhw", weights, upscaled)
