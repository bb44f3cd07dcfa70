"""Any tuner of Hugging Face peft inside the image encoder, by its name there."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from samadapt.adapters.base import Blocks, EncoderAdapter, choose
from samadapt.adapters.qkv import PARTS, fuse_attention, split_attention
from samadapt.backbones.base import AttentionLayer, Backbone
from samadapt.errors import ConfigError

TARGETS = (*PARTS, "o", "mlp", "norm")
"""Linear layers of a block: the projections of attention, its output's, both of the perceptron; and its norms."""

DORA = "dora"
"""Weight-decomposed LoRA (Liu et al., ICML 2024): in peft a switch of LoRA, here a name of its own."""

NORMS = "ln_tuning"

_DEFAULTS: dict[str, dict[str, Any]] = {
    DORA: {"use_dora": True, "r": 8, "lora_alpha": 8},
    "lora": {"r": 8, "lora_alpha": 8},
    "ia3": {"feedforward_modules": []},
    # peft's own defaults of these suit the widths of language models; all widths here are multiples of 16
    "oft": {"oft_block_size": 0, "r": 4},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 16, "init_weights": True},
    "miss": {"r": 8},
    "psoft": {"r": 8},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "vblora": {"vector_length": 16, "num_vectors": 64},
    "vera": {"r": 64},
    # and these start away from zero unless told otherwise
    "fourierft": {"n_frequency": 100, "init_weights": True},
    "waveft": {"n_frequency": 100, "init_weights": True},
}


@dataclass(frozen=True)
class PeftAdapter(EncoderAdapter):
    """One tuner on the same layers of every chosen block.

    Attributes:
        tuner: peft's name of it, in lower case.
        targets: some of ``TARGETS``; LayerNorm tuning takes "norm", all others linear layers.
        options: fields of the tuner's configuration in peft, beside the targets.
        blocks: which blocks.
    """

    kind = "peft"
    tuner: str = "lora"
    targets: tuple[str, ...] = ("q", "v")
    options: dict[str, Any] = field(default_factory=dict)
    blocks: Blocks = None

    def __post_init__(self) -> None:
        if self.tuner not in known_tuners():
            raise ConfigError(
                f"peft has no tuner {self.tuner!r}", where="tuner", remedy=f"It has: {', '.join(known_tuners())}."
            )
        check_targets(self.targets)

    def inject(self, backbone: Backbone, seed: int) -> int | None:
        targets = ("norm",) if self.tuner == NORMS else self.targets
        names, first = target_modules(backbone, targets, self.blocks)
        inject_tuner(backbone.image_encoder, self.tuner, self.options, names, seed)
        return first

    def merge(self, backbone: Backbone) -> None:
        merge_tuners(backbone)


def check_targets(targets: Sequence[str]) -> None:
    """Refuse an empty list, or a layer that blocks do not have."""
    if not targets or set(targets) - set(TARGETS):
        raise ConfigError(f"cannot adapt {list(targets)}", where="targets", remedy=f"Use some of {', '.join(TARGETS)}.")


def target_modules(backbone: Backbone, targets: Sequence[str], blocks: Blocks) -> tuple[list[str], int]:
    """Names of the chosen layers as seen from the image encoder, and the first block that holds one.

    Fused projections are taken apart where q, k or v is meant.

    Raises:
        ConfigError: ``blocks`` names one without attention.
    """
    layers = chosen_layers(backbone, blocks)
    names: list[str] = []
    for layer in layers:
        if set(targets) & set(PARTS):
            split_attention(backbone, layer)
        attention = layer.name.removeprefix("image_encoder.")
        names += [f"{attention}.{part}" for part in PARTS if part in targets]
        names += _others(backbone, layer, targets)
    return names, layers[0].block


def _others(backbone: Backbone, layer: AttentionLayer, targets: Sequence[str]) -> list[str]:
    """Output projection, perceptron and norms of the block of ``layer``, as far as they are meant."""
    path = layer.name.removesuffix(".attn.qkv")
    found = []
    for name, module in backbone.get_submodule(path).named_modules():
        wanted = {
            "o": name == "attn.proj",
            "mlp": name.startswith("mlp.") and isinstance(module, nn.Linear),
            "norm": isinstance(module, nn.LayerNorm),
        }
        if any(wanted[target] for target in targets if target in wanted):
            found.append(f"{path.removeprefix('image_encoder.')}.{name}")
    return found


def chosen_layers(backbone: Backbone, blocks: Blocks) -> list[AttentionLayer]:
    """The attention layers of the chosen blocks."""
    layers = backbone.attention_layers()
    chosen = choose(blocks, [layer.block for layer in layers], backbone.late_block)
    return [layer for layer in layers if layer.block in chosen]


def inject_tuner(module: nn.Module, tuner: str, options: dict[str, Any], names: Sequence[str], seed: int) -> None:
    """Put layers of ``tuner`` around the named layers of ``module``, in place.

    Raises:
        ConfigError: peft refuses, or the tuner changes what the module computes before it has learned anything.
    """
    config = _config(tuner, {**options, "target_modules": list(names)})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several tuners warn of what concerns language models
        torch.manual_seed(seed)
        try:
            _put(config, module)
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, AssertionError) as error:
            raise ConfigError(
                f"peft's {tuner} does not fit these layers ({error})",
                where=f"peft/{tuner}",
                remedy=f"These fit: {', '.join(fitting_tuners())}; or change its options.",
            ) from error


def merge_tuners(module: nn.Module) -> None:
    """Fold every tuner's update into plain weights, and fuse q, k and v again, in place."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            module.set_submodule(name, layer.get_base_layer().requires_grad_(False))
    if isinstance(module, Backbone):
        fuse_attention(module)


@functools.cache
def known_tuners() -> tuple[str, ...]:
    """Every tuner that peft can inject, and DoRA."""
    return tuple(sorted({DORA, *(kind.value.lower() for kind in PEFT_TYPE_TO_TUNER_MAPPING)}))


@functools.cache
def fitting_tuners() -> tuple[str, ...]:
    """Those of ``known_tuners`` that adapt a linear layer (or a norm) and change nothing at first. Found by trying."""
    return tuple(tuner for tuner in known_tuners() if _fits(tuner))


def _fits(tuner: str) -> bool:
    module = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).requires_grad_(False)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    before = module(x)
    try:
        # Some print, or show bars of their own, while they are tried.
        with (
            torch.random.fork_rng(),
            warnings.catch_warnings(),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            target = "1" if tuner == NORMS else "0"
            _put(_config(tuner, {"target_modules": [target]}), module)
            learns = any(parameter.requires_grad for parameter in module.parameters())
            same = torch.allclose(module(x), before, atol=1e-4)
            module(x).sum().backward()
            merge_tuners(module)
    except Exception:  # whatever a tuner that is not made for this may raise
        return False
    return learns and same and torch.allclose(module(x), before, atol=1e-4)


def _put(config: peft.PeftConfig, module: nn.Module) -> None:
    """As ``peft.inject_adapter_in_model``, which refuses tuners whose layers share matrices; each layer holds them."""
    PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(config.peft_type)](module, config, "default")


def _config(tuner: str, options: dict[str, Any]) -> peft.PeftConfig:
    """peft's configuration of ``tuner``.

    Raises:
        ConfigError: it has no such option, or refuses a value.
    """
    kind = "LORA" if tuner == DORA else tuner.upper()
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**{**_DEFAULTS.get(tuner, {}), **options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{tuner} cannot be configured so ({error})", where=f"peft/{tuner}") from error
