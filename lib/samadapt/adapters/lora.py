"""LoRA inside the image encoder, through Hugging Face peft (SAMed, arXiv 2304.13785, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from samadapt.adapters.base import Blocks, EncoderAdapter
from samadapt.adapters.peft_tuners import check_targets, inject_tuner, merge_tuners, target_modules
from samadapt.backbones.base import Backbone
from samadapt.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig(EncoderAdapter):
    """Low-rank updates W + (alpha / rank) B A of linear layers; B starts at zero, so nothing changes at step 0.

    Attributes:
        rank: rank of each update, at least 1.
        alpha: scale of the update; ``alpha == rank`` is SAMed's unscaled form.
        dropout: probability of dropping an input feature of A in training, 0..1.
        targets: which layers are adapted: "q", "k", "v", "o", "mlp".
        blocks: which blocks.
        stem: whether what comes before the first block with attention learns whole, up to there: finetune-SAM's code
            lets TinyViT's convolutional stage learn so (methods: 5.2).
    """

    kind = "lora"
    rank: int = 8
    alpha: int = 8
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    blocks: Blocks = None
    stem: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA's rank must be at least 1, not {self.rank}", where="rank")
        check_targets(self.targets)

    def inject(self, backbone: Backbone, seed: int) -> int | None:
        names, first = target_modules(backbone, self.targets, self.blocks)
        options = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        inject_tuner(backbone.image_encoder, "lora", options, names, seed)
        if not self.stem:
            return first
        for module in chain.from_iterable(backbone.image_encoder.steps()[: backbone.attention_layers()[0].block]):
            module.requires_grad_(True)
        return 0

    def merge(self, backbone: Backbone) -> None:
        merge_tuners(backbone)
