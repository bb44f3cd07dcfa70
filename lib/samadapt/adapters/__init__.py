"""What learns inside the frozen encoder."""

from samadapt.adapters.lora import LoraConfig, inject_lora, merge_lora

__all__ = ["LoraConfig", "inject_lora", "merge_lora"]
