"""LoRA inside the image encoder, through Hugging Face peft (SAMed, arXiv 2304.13785, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from samadapt.adapters.qkv import PARTS, fuse_attention, split_attention
from samadapt.backbones.base import AttentionLayer, Backbone
from samadapt.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates W + (alpha / rank) B A of attention projections; B starts at zero, so nothing changes at step 0.

    Attributes:
        rank: rank of each update, at least 1.
        alpha: scale of the update; ``alpha == rank`` is SAMed's unscaled form.
        dropout: probability of dropping an input feature of A in training, 0..1.
        targets: which of "q", "k", "v" are adapted.
        blocks: indices of the adapted encoder blocks; "late": those of the encoder's second half; None: every block
            that has attention.
    """

    rank: int = 8
    alpha: int = 8
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    blocks: tuple[int, ...] | Literal["late"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA's rank must be at least 1, not {self.rank}", where="rank")
        if not self.targets or set(self.targets) - set(PARTS):
            raise ConfigError(f"LoRA cannot target {list(self.targets)}", where="targets", remedy="Use q, k, v.")


def inject_lora(backbone: Backbone, config: LoraConfig, seed: int = 0) -> int:
    """Put LoRA layers into ``backbone``, in place; only they require gradients afterwards.

    Args:
        backbone: changed.
        config: what is adapted.
        seed: of the random start of A.

    Returns:
        The index of the first adapted block: tokens entering it do not depend on what is trained.

    Raises:
        ConfigError: ``config.blocks`` names a block without attention.
    """
    layers = _chosen(backbone, config.blocks)
    for layer in layers:
        split_attention(backbone, layer)
    prefix = "image_encoder."
    names = [f"{layer.name.removeprefix(prefix)}.{target}" for layer in layers for target in config.targets]
    tuner = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names, bias="none"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(tuner, backbone.image_encoder)
    return min(layer.block for layer in layers)


def merge_lora(backbone: Backbone) -> None:
    """Fold the updates into plain weights and fuse q, k, v again, in place: the checkpoint layout of the base."""
    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            backbone.set_submodule(name, module.get_base_layer())
    fuse_attention(backbone)


def adapter_parameters(backbone: Backbone) -> dict[str, nn.Parameter]:
    """The adapter's own parameters by name: all that training changes inside the encoder."""
    return {name: p for name, p in backbone.named_parameters() if "lora_" in name}


def _chosen(backbone: Backbone, blocks: tuple[int, ...] | Literal["late"] | None) -> list[AttentionLayer]:
    layers = backbone.attention_layers()
    if blocks is None:
        return layers
    known = {layer.block for layer in layers}
    chosen = {block for block in known if block >= backbone.late_block} if blocks == "late" else set(blocks)
    if unknown := sorted(chosen - known):
        raise ConfigError(f"no attention in blocks {unknown}", where="blocks", remedy=f"Choose among {sorted(known)}.")
    return [layer for layer in layers if layer.block in chosen]
