"""What learns inside the image encoder."""

from __future__ import annotations

from typing import Any

from samadapt.adapters.base import Blocks, EncoderAdapter
from samadapt.adapters.bottleneck import BottleneckAdapter
from samadapt.adapters.ladder import Ladder
from samadapt.adapters.lora import LoraConfig
from samadapt.adapters.peft_tuners import PeftAdapter
from samadapt.adapters.plain import Frozen, FullTuning
from samadapt.adapters.side import SideConfig
from samadapt.adapters.singular import SingularAdapter
from samadapt.parts import part_from_dict

__all__ = [
    "Blocks",
    "BottleneckAdapter",
    "EncoderAdapter",
    "Frozen",
    "FullTuning",
    "Ladder",
    "LoraConfig",
    "PeftAdapter",
    "SideConfig",
    "SingularAdapter",
    "from_dict",
    "side_from_dict",
]

_KINDS: dict[str, type[EncoderAdapter]] = {
    adapter.kind: adapter
    for adapter in (Frozen, FullTuning, LoraConfig, BottleneckAdapter, PeftAdapter, SingularAdapter)
}

_SIDES: dict[str, type[SideConfig]] = {side.kind: side for side in (Ladder,)}


def from_dict(value: dict[str, Any]) -> EncoderAdapter:
    """Inverse of ``EncoderAdapter.to_dict`` after a way through JSON. Files of the first version are LoRA's."""
    return part_from_dict(_KINDS, {"kind": LoraConfig.kind, **value})


def side_from_dict(value: dict[str, Any]) -> SideConfig:
    """Inverse of ``SideConfig.to_dict`` after a way through JSON."""
    return part_from_dict(_SIDES, value)
