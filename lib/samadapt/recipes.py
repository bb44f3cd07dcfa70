"""Named presets: what is adapted, and how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from samadapt import adapters, heads
from samadapt.adapters import (
    BottleneckAdapter,
    EncoderAdapter,
    Frozen,
    FullTuning,
    Ladder,
    LoraConfig,
    PeftAdapter,
    SideConfig,
    SingularAdapter,
)
from samadapt.adapters.peft_tuners import NORMS, fitting_tuners, known_tuners
from samadapt.config import BACKBONES, closest
from samadapt.errors import ConfigError
from samadapt.heads import (
    AutoSamCnn,
    AutoSamLinear,
    AutoSamVit,
    HeadConfig,
    SamHead,
    TextHead,
    UNetHead,
    WidenedHead,
)

if TYPE_CHECKING:
    from samadapt.backbones import Backbone
    from samadapt.config import AppConfig
    from samadapt.data.labels import LabelMap
    from samadapt.model import AdaptedModel


@dataclass(frozen=True)
class Recipe:
    """One way to adapt and train.

    Attributes:
        name: registry name.
        summary: one line for people.
        adapter: what learns inside the encoder.
        side: what learns beside it; only with a frozen encoder.
        head: what turns embeddings into masks.
        backbone: the one that it belongs to; None fits every backbone.
        context: see ``ModelInfo.context``; colour images always keep their own channels.
        learning_rate: AdamW's peak rate for the adapter and the side network.
        head_learning_rate: AdamW's peak rate for the head that finds classes.
        transformer_learning_rate: the same for that head's transformer where it starts as the base's: at the rate of
            the new class tokens it forgets what it knew, and finds nothing for its first hundred steps.
        prompt_learning_rate: the same for the decoder of prompts, which starts out skilled.
        weight_decay: AdamW's, for matrices only (not for norms, biases and tokens).
        warmup: share of the training, 0..1, over which the rate rises from zero.
        batch_size: slices per step.
        copies: augmented copies of each slice; what is frozen runs once for each of them.
        prompt_weight: weight of the prompted loss beside the class loss, where the head takes points and boxes.
        synthesis: "exemplar" or "lesions": it learns from ``samadapt.training.synthetic`` slices beside the real ones;
            or "none".
        synthetic_share: of its draws that are synthetic, 0..1; None: by the number of cases, see
            ``samadapt.training.synthetic.synthetic_share``.
        seed: of all randomness.
    """

    name: str
    summary: str
    adapter: EncoderAdapter = field(default_factory=LoraConfig)
    side: SideConfig | None = None
    head: HeadConfig = field(default_factory=SamHead)
    backbone: str | None = None
    context: int = 1
    learning_rate: float = 2e-3
    head_learning_rate: float = 2e-3
    transformer_learning_rate: float = 3e-4
    prompt_learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 0.05
    batch_size: int = 8
    copies: int = 8
    prompt_weight: float = 0.3
    synthesis: str = "none"
    synthetic_share: float | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For the header of a model file."""
        parts = {"adapter": self.adapter, "side": self.side, "head": self.head}
        return asdict(self) | {name: part.to_dict() if part else None for name, part in parts.items()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Recipe:
        """Inverse of ``to_dict`` after a way through JSON; a file of the first version names no side and no head."""
        side, head = value.get("side"), value.get("head")
        parts = {
            "adapter": adapters.from_dict(value["adapter"]),
            "side": adapters.side_from_dict(side) if side else None,
            "head": heads.from_dict(head) if head else SamHead(),
        }
        return cls(**(value | parts))


_STUDY = "ft"
"""First word of the finetune-SAM study's combinations: ft/<backbone>/<part>/<method> (arXiv 2404.09957, figure 1)."""

_PARTS = ("encoder+decoder", "decoder")
_METHODS: dict[str, tuple[EncoderAdapter, SamHead]] = {
    "vanilla": (FullTuning(), SamHead()),
    "adapter": (BottleneckAdapter(), SamHead("bottleneck")),
    "lora": (LoraConfig(rank=4, alpha=4), SamHead("lora")),
}


def _study(backbone: str, part: str, method: str) -> Recipe:
    adapter, head = _METHODS[method]
    gentle = {"learning_rate": 1e-4} if method == "vanilla" else {}
    return Recipe(
        name=f"{_STUDY}/{backbone}/{part}/{method}",
        summary=f"finetune-SAM: {method} tuning of the {part.replace('+', ' and the ')}",
        adapter=Frozen() if part == "decoder" else adapter,
        head=head,
        backbone=backbone,
        **gentle,  # type: ignore[arg-type]
    )


_RECIPES = {
    recipe.name: recipe
    for recipe in [
        Recipe(name="lora", summary="LoRA on q and v of every attention block, SAM's decoder with class tokens"),
        Recipe(
            name="lora_late",
            summary="LoRA on q and v in the second half of the encoder only: about twice the steps in the same time",
            adapter=LoraConfig(blocks="late"),
        ),
        Recipe(
            name="samed",
            summary="SAMed: LoRA of rank 4 on q and v of every block, the whole decoder",
            adapter=LoraConfig(rank=4, alpha=4),
        ),
        Recipe(
            name="s_sam",
            summary="S-SAM: singular values of every block's weights and its norms, label names as prompts",
            adapter=SingularAdapter(),
            head=TextHead(),
        ),
        Recipe(
            name="unet",
            summary="the baseline: a U-Net from scratch, without any SAM",
            adapter=Frozen(),
            head=UNetHead(),
            head_learning_rate=3e-3,
            copies=64,
        ),
        Recipe(
            name="cheap_lunch",
            summary="Cheap Lunch: samed, and synthetic slices made from a few labelled ones",
            adapter=LoraConfig(rank=4, alpha=4),
            synthesis="exemplar",
        ),
        Recipe(
            name="sam_lst",
            summary="SAM-LST: a small CNN beside the frozen encoder; of SAM's decoder all behind the transformer",
            adapter=Frozen(),
            side=Ladder(),
            head=SamHead("classes"),
            learning_rate=1e-3,
        ),
        Recipe(
            name="autosam_vit",
            summary="AutoSAM: a decoder with tokens for each class on the frozen encoder; no points or boxes",
            adapter=Frozen(),
            head=AutoSamVit(),
            head_learning_rate=1e-3,
        ),
        Recipe(
            name="autosam_cnn",
            summary="AutoSAM: a small CNN as head on the frozen encoder; no points or boxes",
            adapter=Frozen(),
            head=AutoSamCnn(),
            head_learning_rate=1e-3,
        ),
        Recipe(
            name="autosam_linear",
            summary="AutoSAM: two linear layers per pixel on the frozen encoder, the quickest; no points or boxes",
            adapter=Frozen(),
            head=AutoSamLinear(),
        ),
        *(_study(b, part, m) for b in BACKBONES for part in _PARTS for m in _METHODS),
        *(
            Recipe(
                name=f"peft/{tuner}",
                summary=f"peft's {tuner} on {'the norms' if tuner == NORMS else 'q and v'} of every block",
                adapter=PeftAdapter(tuner),
            )
            for tuner in known_tuners()
        ),
    ]
}

DEFAULT = "lora_late"

PLAIN = Recipe(name="plain", summary="the backbone as it came", adapter=Frozen(), context=0)
"""Answers points and boxes before anything was learned, and wherever a trained model does worse."""


_PEFT = "peft/"


def names() -> list[str]:
    """Names of all recipes; of peft's tuners those that fit."""
    fitting = {f"{_PEFT}{tuner}" for tuner in fitting_tuners()}
    return [name for name in _RECIPES if not name.startswith(_PEFT) or name in fitting]


def papers() -> list[str]:
    """Names of the recipes that a paper describes: those that have a form for reference."""
    return [name for name in _RECIPES if not name.startswith(_PEFT) and name not in ("lora", "lora_late", "unet")]


def families(recipes: Sequence[str]) -> list[str]:
    """Names of recipes, each family of similar ones as one pattern, for people to read."""
    patterns = {f"{_STUDY}/": f"{_STUDY}/BACKBONE/PART/METHOD", _PEFT: f"{_PEFT}TUNER"}
    shown = (next((p for prefix, p in patterns.items() if name.startswith(prefix)), name) for name in recipes)
    return [*dict.fromkeys(shown), "(all of them: samadapt recipes)"]


def get(name: str, **overrides: Any) -> Recipe:
    """The recipe of that name, with fields replaced.

    Raises:
        ConfigError: unknown name or field; the message lists the valid ones.
    """
    if name not in _RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", where="recipe", remedy=closest(name, names(), families(names())))
    if name.startswith(_PEFT) and name not in names():
        raise ConfigError(
            f"peft's {name.removeprefix(_PEFT)} does not adapt linear layers",
            where="recipe",
            remedy=f"These do: {', '.join(fitting_tuners())}.",
        )
    known = {f.name for f in fields(Recipe)} - {"name", "summary"}
    if unknown := sorted(set(overrides) - known):
        raise ConfigError(
            f"a recipe has no field {unknown[0]!r}", where="recipe", remedy=f"Its fields: {', '.join(sorted(known))}."
        )
    return replace(_RECIPES[name], **overrides)


STUDY_BLOCKS = (0, 1, 10, 11)
"""Blocks that finetune-SAM's code adapts by default, whatever the backbone's depth."""

_TINY_STAGES = {"lite_medsam", "mobile_sam"}


def reference(name: str) -> Recipe:
    """The recipe in the form of its paper's published code, to compare parameter counts and results with it.

    Raises:
        ConfigError: unknown name.
    """
    recipe = get(name)
    if name.startswith(f"{_STUDY}/"):
        return _study_reference(recipe)
    parts: dict[str, Any] = {
        part: replace(config, reference=True)
        for part in ("adapter", "side", "head")
        if (config := getattr(recipe, part)) is not None and hasattr(config, "reference")
    }
    if isinstance(recipe.head, SamHead) and name in ("samed", "cheap_lunch", "sam_lst"):
        parts["head"] = WidenedHead("upscaling" if name == "sam_lst" else "all")
    return replace(recipe, **parts)


def _study_reference(recipe: Recipe) -> Recipe:
    """finetune-SAM's code: a widened decoder, four blocks; of TinyViT it counts stages, so the last one is left out."""
    assert isinstance(recipe.head, SamHead)
    learns: Any = recipe.head.learns
    adapter, tiny = recipe.adapter, recipe.backbone in _TINY_STAGES
    blocks = tuple(range(2, 10)) if tiny else STUDY_BLOCKS
    if isinstance(adapter, BottleneckAdapter):
        adapter = replace(adapter, blocks=blocks, reference=True)
    elif isinstance(adapter, FullTuning):
        adapter = replace(adapter, reference=True)
    elif isinstance(adapter, LoraConfig):
        adapter = replace(adapter, blocks=blocks, stem=tiny)
    return replace(recipe, adapter=adapter, head=WidenedHead(learns, extra=1))


def configured(config: AppConfig) -> Recipe:
    """The recipe of ``config`` in its form, with its blocks, context, synthesis, seed and weights, where it sets them.

    Raises:
        ConfigError: the recipe has no form for reference, adapts no blocks, or has nothing that such weights are for.
    """
    recipe = get(config.recipe) if config.form == "own" else _published_form(config.recipe)
    if config.context is not None:
        recipe = replace(recipe, context=config.context)
    if config.seed is not None:
        recipe = replace(recipe, seed=config.seed)
    if config.synthesis is not None:
        recipe = replace(recipe, synthesis=config.synthesis)
    if config.synthetic_share is not None:
        if recipe.synthesis == "none":
            raise ConfigError(
                f"the recipe {recipe.name} makes no synthetic slices",
                where="synthetic_share",
                remedy="Set synthesis to exemplar or lesions, too.",
            )
        recipe = replace(recipe, synthetic_share=config.synthetic_share)
    if config.blocks is not None:
        if not hasattr(recipe.adapter, "blocks"):
            raise ConfigError(
                f"the recipe {recipe.name} leaves every block as it is", where="blocks", remedy="Omit it."
            )
        blocks = None if config.blocks == "all" else config.blocks
        recipe = replace(recipe, adapter=replace(recipe.adapter, blocks=blocks))  # type: ignore[call-arg]
    if config.clip is not None:
        head = _must_be(recipe.head, TextHead, "clip", recipe)
        recipe = replace(recipe, head=replace(head, clip=str(config.clip)))
    if config.ladder_weights is not None:
        side = _must_be(recipe.side, Ladder, "ladder_weights", recipe)
        recipe = replace(recipe, side=replace(side, weights=str(config.ladder_weights)))
    return recipe


def check(config: AppConfig) -> None:
    """Refuse before anything is read what ``build`` would refuse later.

    Raises:
        ConfigError: as ``configured``, or a block that the encoder does not have or that cannot be adapted.
    """
    recipe = configured(config)
    if isinstance(config.blocks, tuple):
        try:
            count(recipe, 1, config.backbone)
        except ConfigError as error:
            if error.where == "blocks":  # the others: a tuner of peft that needs weights to be built
                raise


def _published_form(name: str) -> Recipe:
    if name not in papers():
        raise ConfigError(
            f"the recipe {name} is of no paper", where="form", remedy=closest(name, papers(), families(papers()))
        )
    return reference(name)


_P = TypeVar("_P")


def _must_be(part: object, kind: type[_P], key: str, recipe: Recipe) -> _P:
    if not isinstance(part, kind):
        raise ConfigError(f"the recipe {recipe.name} has nothing that it is for", where=key, remedy="Omit it.")
    return part


def count(recipe: Recipe, classes: int, backbone: str, image_size: int | None = None) -> dict[str, Any]:
    """How many parameters a recipe trains. No weights are made.

    Args:
        recipe: any.
        classes: K, foreground classes.
        backbone: registry name, for a recipe that has none of its own.
        image_size: pixels; None takes the backbone's own.

    Returns:
        ``backbone``, ``trainable_parameters``, ``encoder_parameters`` (those of them in or beside the encoder),
        ``parameters`` (all that the model runs with), ``percent``, and ``takes_prompts``: whether the adapted model
        answers points and boxes, or leaves them to the plain one.

    Raises:
        ConfigError: the recipe does not fit the backbone, or is one of peft's tuners that need weights to be made.
    """
    import torch

    from samadapt import backbones
    from samadapt.backbones.registry import spec

    name = recipe.backbone or backbone
    labels, size = [f"structure {n}" for n in range(classes)], image_size or spec(name).image_size
    with torch.device("meta"):
        model = build(recipe, labels, backbones.build(name, size))
    sizes = {key: parameter.numel() for key, parameter in model.trainable().items()}
    trained, total = sum(sizes.values()), sum(parameter.numel() for parameter in model.parameters())
    return {
        "backbone": name,
        "trainable_parameters": trained,
        "encoder_parameters": sum(size for key, size in sizes.items() if not key.startswith("head.")),
        "parameters": total,
        "percent": 100 * trained / total,
        "takes_prompts": model.takes_prompts,
    }


def build(
    name: str | Recipe,
    labels: LabelMap | list[str] | tuple[str, ...],
    backbone: Backbone | str | None = None,
    weights: str | Path | None = None,
    image_size: int | None = None,
    **overrides: Any,
) -> AdaptedModel:
    """An untrained adapted model: every prompt is answered as by the base model.

    Args:
        name: a recipe or its name.
        labels: foreground classes, in the order of the logits.
        backbone: registry name, or a loaded backbone (adapted in place); None takes the recipe's, else LiteMedSAM.
        weights: base weights for a named backbone; see ``samadapt.backbones.load``.
        image_size: side of the square input in pixels for a named backbone.
        overrides: fields of the recipe to replace.
    """
    from samadapt import backbones
    from samadapt.data.labels import LabelMap
    from samadapt.model import AdaptedModel, ModelInfo

    recipe = get(name, **overrides) if isinstance(name, str) else replace(name, **overrides)
    chosen = backbone or recipe.backbone or BACKBONES[0]
    base = backbones.load(chosen, weights, image_size) if isinstance(chosen, str) else chosen
    label_map = labels if isinstance(labels, LabelMap) else LabelMap(tuple(labels))
    info = ModelInfo(recipe, label_map, base.name, base.weights_sha256, base.image_size)
    model = AdaptedModel(base, info)
    if recipe.side is not None and model.side is not None:
        recipe.side.pretrain(model.side)
    return model.eval()
