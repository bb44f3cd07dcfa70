"""The decoder on matrices is SAM's decoder on feature maps: the same masks, for one image or many prompts."""

from __future__ import annotations

import pytest
import torch

from samadapt.heads.sam_decoder import SamDecoderHead
from tiny import BACKBONES, SIZE

EMBEDDINGS = {"one image, many prompts": 1, "an image for each prompt": 3}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]()


def boxes(count: int) -> torch.Tensor:
    corners = torch.rand(count, 4, generator=torch.Generator().manual_seed(1)) * SIZE / 2
    return corners + torch.tensor([0, 0, SIZE / 2, SIZE / 2])


def images(backbone, count: int) -> torch.Tensor:
    side = backbone.embedding_size
    return torch.randn(count, 256, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("count", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("clicks", [0, 20])
def test_prompts_are_answered_as_by_sam(backbone, count, with_mask, clicks):
    side = backbone.mask_size
    previous = torch.randn(3, 1, side, side, generator=torch.Generator().manual_seed(3)) if with_mask else None
    points = (torch.rand(3, clicks, 2) * SIZE, torch.ones(3, clicks)) if clicks else None
    sparse, dense = backbone.prompt_encoder(points, boxes(3), previous)
    embeddings = images(backbone, count)
    with torch.no_grad():
        found = SamDecoderHead(backbone.mask_decoder, 2).prompt_masks(
            embeddings, sparse, dense, backbone.prompt_encoder, slice(None)
        )
        for n in range(3):  # SAM's own decoder takes one image at a time
            expected = backbone.mask_decoder.predict_masks(
                embeddings[n % count][None], backbone.prompt_encoder.get_dense_pe(), sparse[n : n + 1], dense[n : n + 1]
            )
            for ours, sams in zip(found, expected, strict=True):
                assert torch.allclose(ours[n], sams[0], atol=1e-4)


def test_masks_that_are_not_wanted_change_nothing(backbone):
    sparse, dense = backbone.prompt_encoder(None, boxes(3), None)
    head, embeddings = SamDecoderHead(backbone.mask_decoder, 2), images(backbone, 1)
    with torch.no_grad():
        every, some = (
            head.prompt_masks(embeddings, sparse, dense, backbone.prompt_encoder, kept)
            for kept in (slice(None), slice(1, None))
        )
    for all_four, multimask in zip(every, some, strict=True):
        assert torch.allclose(all_four[:, 1:], multimask, atol=1e-5)


def test_each_class_is_decoded_as_a_mask_of_sam(backbone):
    decoder = backbone.mask_decoder
    head = SamDecoderHead(decoder, 2)
    for token, own in enumerate(head.classes.class_tokens):
        own.data.copy_(decoder.mask_tokens.weight[1 + token % 3])  # without the noise that classes start with
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight[1:4]])[None]
    embeddings, prompts = images(backbone, 1), backbone.prompt_encoder
    with torch.no_grad():
        source = embeddings + prompts.no_mask_embed.weight[..., None, None]
        hidden, image = decoder.transformer(source, prompts.get_dense_pe(), tokens)
        upscaled = decoder.output_upscaling(image.transpose(1, 2).reshape(source.shape))
        for n in range(3):
            weights = decoder.output_hypernetworks_mlps[1 + n](hidden[:, 1 + n])
            expected = torch.einsum("c,chw->hw", weights[0], upscaled[0])
            assert torch.allclose(head.class_logits(embeddings, prompts)[0, n], expected, atol=1e-4)
