"""The two ends: nothing of the encoder learns, or its own weights do ("vanilla" in the finetune-SAM study)."""

from __future__ import annotations

from dataclasses import dataclass

from samadapt.adapters.base import Blocks, EncoderAdapter, choose
from samadapt.backbones.base import Backbone


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
    """

    kind = "full"
    blocks: Blocks = None

    def inject(self, backbone: Backbone, seed: int) -> int | None:
        encoder = backbone.image_encoder
        if self.blocks is None:
            encoder.requires_grad_(True)
            return 0
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
