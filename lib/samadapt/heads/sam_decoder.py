"""SAM's mask decoder twice: widened to K+1 classes, and as it is for points and boxes."""

from __future__ import annotations

import copy

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

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
        """(B,256,g,g), dense prompt and position encoding of the same shape -> (B,K+1,4g,4g), background first."""
        tokens = torch.cat([self.first_token, self.class_tokens]).expand(len(embeddings), -1, -1)
        hidden, upscaled = _decode(self.transformer, self.upscaling, embeddings + dense, position, tokens)
        return _masks(hidden[:, 1:], upscaled, self.hypernetworks)


class SamDecoderHead(nn.Module):
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
        super().__init__()
        self.classes = ClassDecoder(decoder, num_classes, seed).requires_grad_(True)
        self.prompted = copy.deepcopy(decoder).requires_grad_(True)

    def class_logits(self, embeddings: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        """(B,256,g,g) -> (B,K+1,4g,4g) logits, background first. No prompt is used."""
        return self.classes(embeddings, _no_mask(prompt_encoder, embeddings), _position(prompt_encoder, embeddings))

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
        decoder = self.prompted
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)
        source = (embeddings + dense).expand(len(tokens), -1, -1, -1)
        position = _position(prompt_encoder, source)
        hidden, upscaled = _decode(decoder.transformer, decoder.output_upscaling, source, position, tokens)
        masks = _masks(hidden[:, 1 : len(own)], upscaled, decoder.output_hypernetworks_mlps)
        return masks, decoder.iou_prediction_head(hidden[:, 0])


def _decode(
    transformer: nn.Module, upscaling: nn.Module, source: Tensor, position: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens after the two-way transformer (N,T,256) and the upscaled image features (N,32,4g,4g)."""
    hidden, image = transformer(source, position, tokens)
    return hidden, upscaling(image.transpose(1, 2).reshape(source.shape))


def _position(prompt_encoder: PromptEncoder, embeddings: Tensor) -> Tensor:
    return prompt_encoder.get_dense_pe().to(embeddings.dtype).expand(len(embeddings), -1, -1, -1)


def _no_mask(prompt_encoder: PromptEncoder, embeddings: Tensor) -> Tensor:
    return prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *embeddings.shape[-2:])


def _masks(tokens: Tensor, upscaled: Tensor, hypernetworks: nn.ModuleList) -> Tensor:
    weights = torch.stack([net(tokens[:, i]) for i, net in enumerate(hypernetworks)], dim=1)
    return torch.einsum("nmc,nchw->nmhw", weights, upscaled)
