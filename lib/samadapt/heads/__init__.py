"""What turns an embedding (and prompts) into masks."""

from __future__ import annotations

from typing import Any

from samadapt.heads.autosam import AutoSamCnn, AutoSamLinear, AutoSamVit
from samadapt.heads.base import Head, HeadConfig
from samadapt.heads.sam_decoder import SamDecoderHead, SamHead

__all__ = ["AutoSamCnn", "AutoSamLinear", "AutoSamVit", "Head", "HeadConfig", "SamDecoderHead", "SamHead", "from_dict"]

_KINDS: dict[str, type[HeadConfig]] = {head.kind: head for head in (SamHead, AutoSamVit, AutoSamCnn, AutoSamLinear)}


def from_dict(value: dict[str, Any]) -> HeadConfig:
    """Inverse of ``HeadConfig.to_dict`` after a way through JSON."""
    fields = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items() if key != "kind"}
    return _KINDS[value["kind"]](**fields)
