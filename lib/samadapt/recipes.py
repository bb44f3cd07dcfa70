"""Named presets: what is adapted, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samadapt.adapters.lora import LoraConfig
from samadapt.errors import ConfigError

if TYPE_CHECKING:
    from samadapt.backbones import Backbone
    from samadapt.data.labels import LabelMap
    from samadapt.model import AdaptedModel


@dataclass(frozen=True)
class Recipe:
    """One way to adapt and train.

    Attributes:
        name: registry name.
        summary: one line for people.
        adapter: what learns inside the encoder.
        context: see ``ModelInfo.context``; colour images always keep their own channels.
        learning_rate: AdamW's peak rate for the adapter.
        head_learning_rate: AdamW's peak rate for the decoder of classes.
        prompt_learning_rate: the same for the decoder of prompts, which starts out skilled.
        weight_decay: AdamW's, for matrices only (not for norms, biases and tokens).
        warmup: share of the training, 0..1, over which the rate rises from zero.
        batch_size: slices per step.
        copies: augmented copies of each slice; what is frozen runs once for each of them.
        prompt_weight: weight of the prompted loss beside the class loss; 0 trains no prompts.
        seed: of all randomness.
    """

    name: str
    summary: str
    adapter: LoraConfig = field(default_factory=LoraConfig)
    context: int = 1
    learning_rate: float = 2e-3
    head_learning_rate: float = 2e-3
    prompt_learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 0.05
    batch_size: int = 8
    copies: int = 8
    prompt_weight: float = 0.3
    seed: int = 0

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Recipe:
        """Inverse of ``dataclasses.asdict`` after a way through JSON."""
        adapter: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value["adapter"].items()}
        return cls(**{**value, "adapter": LoraConfig(**adapter)})


_RECIPES = {
    recipe.name: recipe
    for recipe in [
        Recipe(name="lora", summary="LoRA on q and v of every attention block, SAM's decoder with class tokens"),
        Recipe(
            name="lora_late",
            summary="LoRA on q and v in the second half of the encoder only: about twice the steps in the same time",
            adapter=LoraConfig(blocks="late"),
        ),
    ]
}

DEFAULT = "lora_late"


def names() -> list[str]:
    """Names of all recipes."""
    return list(_RECIPES)


def get(name: str, **overrides: Any) -> Recipe:
    """The recipe of that name, with fields replaced.

    Raises:
        ConfigError: unknown name or field; the message lists the valid ones.
    """
    if name not in _RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", where="recipe", remedy=f"Choose among {', '.join(_RECIPES)}.")
    known = {f.name for f in fields(Recipe)} - {"name", "summary"}
    if unknown := sorted(set(overrides) - known):
        raise ConfigError(
            f"a recipe has no field {unknown[0]!r}", where="recipe", remedy=f"Its fields: {', '.join(sorted(known))}."
        )
    return replace(_RECIPES[name], **overrides)


def build(
    name: str | Recipe,
    labels: LabelMap | list[str] | tuple[str, ...],
    backbone: Backbone | str = "lite_medsam",
    weights: str | Path | None = None,
    image_size: int | None = None,
    **overrides: Any,
) -> AdaptedModel:
    """An untrained adapted model: every prompt is answered as by the base model.

    Args:
        name: a recipe or its name.
        labels: foreground classes, in the order of the logits.
        backbone: registry name, or a loaded backbone (adapted in place).
        weights: base weights for a named backbone; see ``samadapt.backbones.load``.
        image_size: side of the square input in pixels for a named backbone.
        overrides: fields of the recipe to replace.
    """
    from samadapt import backbones
    from samadapt.data.labels import LabelMap
    from samadapt.model import AdaptedModel, ModelInfo

    recipe = get(name, **overrides) if isinstance(name, str) else replace(name, **overrides)
    base = backbones.load(backbone, weights, image_size) if isinstance(backbone, str) else backbone
    label_map = labels if isinstance(labels, LabelMap) else LabelMap(tuple(labels))
    info = ModelInfo(recipe, label_map, base.name, base.weights_sha256, base.image_size)
    return AdaptedModel(base, info).eval()
