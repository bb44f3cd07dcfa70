"""What turns an embedding (and prompts) into masks."""

from __future__ import annotations

from typing import Any

from samadapt.heads.autosam import AutoSamCnn, AutoSamLinear, AutoSamVit
from samadapt.heads.base import Head, HeadConfig
from samadapt.heads.sam_decoder import SamDecoderHead, SamHead
from samadapt.heads.text import TextHead
from samadapt.heads.unet import UNetHead
from samadapt.heads.widened import WidenedHead
from samadapt.parts import part_from_dict

__all__ = [
    "AutoSamCnn",
    "AutoSamLinear",
    "AutoSamVit",
    "Head",
    "HeadConfig",
    "SamDecoderHead",
    "SamHead",
    "TextHead",
    "UNetHead",
    "WidenedHead",
    "from_dict",
]

_KINDS: dict[str, type[HeadConfig]] = {
    head.kind: head for head in (SamHead, AutoSamVit, AutoSamCnn, AutoSamLinear, TextHead, UNetHead, WidenedHead)
}


def from_dict(value: dict[str, Any]) -> HeadConfig:
    """Inverse of ``HeadConfig.to_dict`` after a way through JSON."""
    return part_from_dict(_KINDS, value)
