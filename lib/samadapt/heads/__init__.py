"""What turns an embedding (and prompts) into masks."""

from samadapt.heads.sam_decoder import SamDecoderHead

__all__ = ["SamDecoderHead"]
