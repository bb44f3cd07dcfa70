"""The two ends: nothing of the encoder learns, or its own weights do ("vanilla" in the finetune-SAM study)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from samadapt.adapters.base import Blocks, EncoderAdapter, choose
from samadapt.backbones.base import IMAGES, Backbone

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Frozen(EncoderAdapter):
    """The encoder stays as it is, so its embeddings are computed once and kept."""

    kind = "frozen"

    def inject(self, backbone: Backbone, seed: int) -> int | None:
        return None

    def merge(self, backbone: Backbone) -> None:
        """Nothing was learned."""


@dataclass(frozen=True)
class FullTuning(EncoderAdapter):
    """Every weight of the chosen blocks learns.

    Attributes:
        blocks: None also tunes what comes before the first block; the neck learns with the last block.
        reference: keep the classifier that MobileSAM's code has behind its encoder and never uses, since it counts
            among the parameters in the finetune-SAM study.
    """

    kind = "full"
    blocks: Blocks = None
    reference: bool = False

    def inject(self, backbone: Backbone, seed: int) -> int | None:
        encoder = backbone.image_encoder
        if self.reference and backbone.name == "mobile_sam":
            width = next(encoder.neck.parameters()).shape[1]
            encoder.unused_classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, IMAGENET_CLASSES))
        if self.blocks is None:
            encoder.requires_grad_(True)
            return IMAGES
        steps = encoder.steps()
        chosen = choose(self.blocks, range(len(steps)), backbone.late_block)
        for block in chosen:
            for module in steps[block]:
                module.requires_grad_(True)
        if chosen[-1] == len(steps) - 1:
            encoder.neck.requires_grad_(True)
        return chosen[0]

    def merge(self, backbone: Backbone) -> None:
        backbone.requires_grad_(False)
