"""An adapted model: frozen backbone + adapter + head. One file in, one file out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from samadapt import __version__, backbones
from samadapt.adapters import inject_lora, merge_lora
from samadapt.adapters.lora import adapter_parameters
from samadapt.backbones import Backbone
from samadapt.data.labels import LabelMap
from samadapt.data.window import Window
from samadapt.errors import InputError, StateError, WeightsError
from samadapt.files import atomic_path
from samadapt.heads import SamDecoderHead
from samadapt.recipes import Recipe

FORMAT = "samadapt-model-1"


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says about itself.

    Attributes:
        recipe: how the model was built and trained.
        labels: its classes, in the order of its logits (background is logit 0).
        backbone: registry name of the base model.
        weights_sha256: hex SHA-256 of the base weights file.
        image_size: side S of the square input, pixels.
        context: neighbouring slices on each side that fill the input channels: 1 gives slices i-1, i, i+1; 0 the
            slice itself three times.
        window: intensity window; None for a model that has seen no data (each volume then gets its default).
        trained: whether it has learned ``labels`` from any case.
        answers_prompts: whether it answers clicks and boxes at least as well as its base does; else the base should.
        training: what it learned from: case ids, steps, seconds, figures. Free-form, JSON.
    """

    recipe: Recipe
    labels: LabelMap
    backbone: str
    weights_sha256: str
    image_size: int
    context: int = 0
    window: Window | None = None
    trained: bool = False
    answers_prompts: bool = True
    training: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The header that ``AdaptedModel.save`` writes."""
        value = {
            "format": FORMAT,
            "samadapt": __version__,
            "recipe": asdict(self.recipe),
            "labels": list(self.labels.names),
            "backbone": self.backbone,
            "weights_sha256": self.weights_sha256,
            "image_size": self.image_size,
            "context": self.context,
            "window": self.window.to_dict() if self.window else None,
            "trained": self.trained,
            "answers_prompts": self.answers_prompts,
            "training": self.training,
        }
        return json.dumps(value)

    @classmethod
    def from_json(cls, text: str, where: Path) -> ModelInfo:
        """Parse a header.

        Raises:
            InputError: the text is not a header of this format; ``where`` names the file in the message.
        """
        try:
            value = json.loads(text)
            if value["format"] != FORMAT:
                raise ValueError(f"unknown format {value['format']!r}")
            return cls(
                recipe=Recipe.from_dict(value["recipe"]),
                labels=LabelMap(tuple(value["labels"])),
                backbone=value["backbone"],
                weights_sha256=value["weights_sha256"],
                image_size=int(value["image_size"]),
                context=int(value["context"]),
                window=Window.from_dict(value["window"]) if value["window"] else None,
                trained=bool(value["trained"]),
                answers_prompts=bool(value.get("answers_prompts", True)),
                training=dict(value["training"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"not the header of a samadapt model ({error})",
                where=where,
                remedy="Give a file that `samadapt train` wrote, by this version or an earlier one.",
            ) from error


class AdaptedModel(nn.Module):
    """Embeds slices once, then answers with classes (no prompt) or with masks for points and boxes.

    Build one with ``samadapt.recipes.build`` or ``AdaptedModel.load``; the constructor changes ``backbone`` in place.

    Args:
        backbone: base model; its encoder gets the recipe's adapter and nothing else of it is ever trained.
        info: recipe, labels and the rest; see ``ModelInfo``.
    """

    def __init__(self, backbone: Backbone, info: ModelInfo) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.info = info
        self.first_trainable_block = inject_lora(backbone, info.recipe.adapter, info.recipe.seed)
        self._encoder_frozen = False
        self._merged_key: str | None = None
        self.head = SamDecoderHead(backbone.mask_decoder, len(info.labels.names), seed=info.recipe.seed)

    def embed(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1] -> (B,256,g,g)."""
        return self.backbone.embed(images)

    def tokens(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1] -> what enters the first trainable block, or the frozen encoder's embedding (B,256,g,g).

        No training changes it.
        """
        return self.embed(images) if self._encoder_frozen else self.backbone.tokens(images, self.first_trainable_block)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """What ``tokens`` gave -> (B,256,g,g)."""
        return tokens if self._encoder_frozen else self.backbone.embed_tokens(tokens, self.first_trainable_block)

    def class_logits(self, embeddings: Tensor) -> Tensor:
        """(B,256,g,g) -> (B,K+1,4g,4g), background first, without any prompt."""
        return self.head.class_logits(embeddings, self.backbone.prompt_encoder)

    def prompt_masks(
        self,
        embeddings: Tensor,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
        boxes: Tensor | None = None,
        mask_logits: Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Masks of N prompts.

        Args:
            embeddings: (N,256,g,g), or (1,256,g,g) shared by all prompts.
            points: (N,P,2) x and y in model-frame pixels.
            point_labels: (N,P) 1 inside, 0 outside, -1 no point.
            boxes: (N,4) x0, y0, x1, y1 in model-frame pixels.
            mask_logits: (N,1,4g,4g) logits of a previous mask.
            multimask: give SAM's three alternatives instead of its single mask.

        Returns:
            Logits (N,M,4g,4g) and predicted IoU (N,M); M is 1, or 3 with ``multimask``.
        """
        clicks = (points, point_labels) if points is not None else None
        sparse, dense = self.backbone.prompt_encoder(clicks, boxes, mask_logits)
        kept = slice(1, None) if multimask else slice(0, 1)
        return self.head.prompt_masks(embeddings, sparse, dense, self.backbone.prompt_encoder, kept)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1] -> (B,K+1,4g,4g) class logits."""
        return self.class_logits(self.embed(images))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that training may change, by name; all others stay byte for byte those of the base.

        Those that do not require gradients stay as they are for now (``freeze_encoder``).
        """
        adapter = {f"backbone.{name}": p for name, p in adapter_parameters(self.backbone).items()}
        return adapter | {f"head.{name}": p for name, p in self.head.named_parameters()}

    def freeze_encoder(self) -> None:
        """Leave the adapter as it is from now on; only the head gets gradients."""
        self._set_frozen(True)

    def release_encoder(self) -> None:
        """Undo ``freeze_encoder``."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        self._encoder_frozen = frozen
        for parameter in adapter_parameters(self.backbone).values():
            parameter.requires_grad_(not frozen)

    def merge(self) -> None:
        """Fold the adapter into plain encoder weights, in place, for inference at the base model's cost."""
        self._merged_key = self.encoder_key()
        merge_lora(self.backbone)

    @property
    def frozen_key(self) -> str:
        """Names what ``tokens`` computes; the same for every version that was trained with one recipe on one base."""
        if self._encoder_frozen:
            return self.encoder_key()
        return f"tokens {self.info.weights_sha256[:16]}-{self.first_trainable_block}"

    def encoder_key(self) -> str:
        """Names what ``embed`` computes; changes with every training step."""
        if self._merged_key is not None:
            return self._merged_key
        digest = hashlib.sha256(self.info.weights_sha256.encode())
        for name, parameter in sorted(adapter_parameters(self.backbone).items()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        return f"embedding {digest.hexdigest()[:32]}"

    def describe(self, **changes: Any) -> None:
        """Replace fields of ``info``."""
        self.info = replace(self.info, **changes)

    def save(self, path: str | Path) -> None:
        """Write every tensor that is not the base's, with ``info`` as JSON header, to one safetensors file, atomically.

        Raises:
            StateError: the adapter was merged, so it can no longer be told from the base.
        """
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.trainable().items()}
        if not any(name.startswith("backbone.") for name in tensors):
            raise StateError("a merged model cannot be saved", where=path, remedy="Save before merging.")
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"samadapt": self.info.to_json()})

    @classmethod
    def load(cls, path: str | Path, weights: str | Path | None = None) -> AdaptedModel:
        """Rebuild a saved model on its base, ready for inference.

        Args:
            path: file written by ``save``.
            weights: the base model's weights file; None finds them as ``samadapt.backbones.load`` does.

        Raises:
            InputError: ``path`` is missing or no model file.
            WeightsError: the base weights are not those that the model was trained on.
        """
        path = Path(path)
        info = read_info(path)
        backbone = backbones.load(info.backbone, weights=weights, image_size=info.image_size)
        if backbone.weights_sha256 != info.weights_sha256:
            raise WeightsError(
                f"trained on {info.backbone} weights with SHA-256 {info.weights_sha256[:12]}..., "
                f"but the weights here have {backbone.weights_sha256[:12]}...",
                where=path,
                remedy="Give the base weights that it was trained on (--conf weights PATH).",
            )
        model = cls(backbone, info)
        model.load_trained(path)
        return model.eval()

    def load_trained(self, path: str | Path) -> None:
        """Copy the tensors of a model file with the same recipe and labels into this model.

        Raises:
            InputError: the file's tensors are not this model's, by name or by shape.
        """
        own = self.trainable()
        with _open(Path(path)) as file:
            names = set(file.keys())
            if difference := names ^ set(own):
                raise InputError(
                    f"tensors do not fit the recipe, for instance {sorted(difference)[0]}",
                    where=path,
                    remedy="Load it with the recipe that its header names.",
                )
            with torch.no_grad():
                for name, parameter in own.items():
                    tensor = file.get_tensor(name)
                    if tensor.shape != parameter.shape:
                        raise InputError(
                            f"{name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}", where=path
                        )
                    parameter.copy_(tensor)


def read_info(path: str | Path) -> ModelInfo:
    """The header of a model file, without loading its tensors or its base.

    Raises:
        InputError: the file is missing, or no model file.
    """
    path = Path(path)
    with _open(path) as file:
        metadata = file.metadata() or {}
    return ModelInfo.from_json(metadata.get("samadapt", "{}"), where=path)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise InputError("no such model file", where=path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"not a readable safetensors file ({error})", where=path, remedy="Train again or restore it from a backup."
        ) from error
