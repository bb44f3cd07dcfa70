"""An adapted model: frozen backbone + adapter + head. One file in, one file out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from samadapt import __version__, backbones
from samadapt.adapters.side import pack, unpack
from samadapt.backbones import Backbone
from samadapt.data.labels import LabelMap
from samadapt.data.window import Window
from samadapt.errors import ConfigError, InputError, StateError, WeightsError
from samadapt.files import atomic_path
from samadapt.recipes import Recipe

FORMAT = "samadapt-model-1"

ADAPTED = "embedding"
"""What the cache calls the embeddings of an encoder that has learned."""


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
        planes: in which a volume is looked at, see ``Geometry.slice_axes``; what several say is averaged.
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
    planes: str = "acquisition"
    window: Window | None = None
    trained: bool = False
    answers_prompts: bool = True
    training: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The header that ``AdaptedModel.save`` writes."""
        value = {
            "format": FORMAT,
            "samadapt": __version__,
            "recipe": self.recipe.to_dict(),
            "labels": list(self.labels.names),
            "backbone": self.backbone,
            "weights_sha256": self.weights_sha256,
            "image_size": self.image_size,
            "context": self.context,
            "planes": self.planes,
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
                planes=str(value.get("planes", "acquisition")),
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
    """Embeds slices once, then answers: classes, and where its head can, masks for points and boxes.

    Build one with ``samadapt.recipes.build`` or ``AdaptedModel.load``; the constructor changes ``backbone`` in place.

    Args:
        backbone: base model; its encoder gets the recipe's adapter and nothing else of it is ever trained.
        info: recipe, labels and the rest; see ``ModelInfo``.
    """

    def __init__(self, backbone: Backbone, info: ModelInfo) -> None:
        super().__init__()
        recipe = info.recipe
        self.backbone = backbone.requires_grad_(False)
        self.info = info
        self.first_trainable_block = recipe.adapter.inject(backbone, recipe.seed)
        if recipe.side is not None and self.first_trainable_block is not None:
            raise ConfigError("a side network needs a frozen encoder", where="side", remedy="Choose one of the two.")
        self.side = recipe.side.build(backbone, recipe.seed) if recipe.side else None
        self.head = recipe.head.build(backbone, info.labels, recipe.seed)
        self._trainable = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        self._encoder_frozen = False
        self._merged = False
        self._fixed_key: str | None = None

    def embed(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1] -> (B,256,g,g), or whatever the head reads."""
        return self._finish(self._begin(images))

    def tokens(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1] -> what no training changes, batch first: all that ``embed_tokens`` needs.

        The tokens that enter the first trainable block; of a frozen encoder the embedding (B,256,g,g), and with a side
        network that and the images as one vector each.
        """
        return self.embed(images) if self._encoder_frozen else self._begin(images)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """What ``tokens`` gave -> (B,256,g,g)."""
        return tokens if self._encoder_frozen else self._finish(tokens)

    def _begin(self, images: Tensor) -> Tensor:
        if self.head.reads_images:
            return images
        if self.first_trainable_block is not None:
            return self.backbone.tokens(images, self.first_trainable_block)
        embeddings = self.backbone.embed(images)
        return embeddings if self.side is None else pack(embeddings, images)

    def _finish(self, tokens: Tensor) -> Tensor:
        if self.first_trainable_block is not None:
            return self.backbone.embed_tokens(tokens, self.first_trainable_block)
        return tokens if self.side is None else self.side(*unpack(tokens, self.backbone))

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

        Raises:
            StateError: the recipe's head takes neither points nor boxes.
        """
        if not self.takes_prompts:
            raise StateError(
                f"{self.info.recipe.name} answers no points or boxes", remedy="Let the plain model answer."
            )
        clicks = (points, point_labels) if points is not None else None
        sparse, dense = self.backbone.prompt_encoder(clicks, boxes, mask_logits)
        kept = slice(1, None) if multimask else slice(0, 1)
        return self.head.prompt_masks(embeddings, sparse, dense, self.backbone.prompt_encoder, kept)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1] -> (B,K+1,4g,4g) class logits."""
        return self.class_logits(self.embed(images))

    @property
    def takes_prompts(self) -> bool:
        """Whether ``prompt_masks`` answers points and boxes."""
        return "box" in self.head.prompts

    @property
    def learns_encoder(self) -> bool:
        """Whether training changes embeddings, and not the head alone."""
        return any(not name.startswith("head.") for name in self._trainable)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that training may change, by name; all others stay byte for byte those of the base.

        Those that do not require gradients stay as they are for now (``freeze_encoder``).
        """
        parameters = dict(self.named_parameters())
        return {name: parameters[name] for name in self._trainable if name in parameters}

    def learned_buffers(self) -> dict[str, Tensor]:
        """Tensors that are no parameters and may change in training all the same, by name: the statistics of norms."""
        kept = self.kept()
        return {name: buffer for name, buffer in self.named_buffers() if name in kept}

    def kept(self) -> dict[str, Tensor]:
        """Every tensor that differs from the base or cannot be rebuilt from it, by name: what a model file holds."""
        copied = {f"head.{name}" for name in self.head.copied()}
        own = {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if name.startswith(("head.", "side.")) and name not in copied
        }
        return self.trainable() | own

    def freeze_encoder(self) -> None:
        """Leave the adapter and the side network as they are from now on; only the head gets gradients."""
        self._set_frozen(True)

    def release_encoder(self) -> None:
        """Undo ``freeze_encoder``."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        self._encoder_frozen = frozen
        self._fixed_key = self.encoder_key() if frozen else None
        for name, parameter in self.trainable().items():
            if not name.startswith("head."):
                parameter.requires_grad_(not frozen)

    def merge(self) -> None:
        """Fold the adapter into plain encoder weights where it can be, in place, for inference at the base's cost."""
        self._fixed_key = self.encoder_key()
        self._merged = True
        self.info.recipe.adapter.merge(self.backbone)

    @property
    def frozen_key(self) -> str:
        """Names what ``tokens`` computes; the same for every version that was trained with one recipe on one base."""
        if self._encoder_frozen:
            return self.encoder_key()
        if self.head.reads_images:
            return "images"
        entered = "neck" if self.first_trainable_block is None else self.first_trainable_block
        images = "" if self.side is None else "-images"
        return f"tokens {self.info.weights_sha256[:16]}-{entered}{images}"

    def encoder_key(self) -> str:
        """Names what ``embed`` computes; changes with every training step that changes it."""
        if self._fixed_key is not None:
            return self._fixed_key
        if not self.learns_encoder:
            return self.frozen_key
        digest = hashlib.sha256(self.info.weights_sha256.encode())
        for name, tensor in sorted(self.kept().items()):
            if not name.startswith("head."):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return f"{ADAPTED} {digest.hexdigest()[:32]}"

    def describe(self, **changes: Any) -> None:
        """Replace fields of ``info``."""
        self.info = replace(self.info, **changes)

    def save(self, path: str | Path) -> None:
        """Write every tensor that is not the base's, with ``info`` as JSON header, to one safetensors file, atomically.

        Raises:
            StateError: the adapter was merged, so it can no longer be told from the base.
        """
        if self._merged:
            raise StateError("a merged model cannot be saved", where=path, remedy="Save before merging.")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.kept().items()}
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
                remedy="Give the base weights it was trained on: --weights FILE, for a server --conf weights FILE.",
            )
        model = cls(backbone, info)
        model.load_trained(path)
        return model.eval()

    def load_trained(self, path: str | Path) -> None:
        """Copy the tensors of a model file with the same recipe and labels into this model.

        Raises:
            InputError: the file's tensors are not this model's, by name or by shape.
        """
        own = self.kept()
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


def read_info_if_readable(path: str | Path) -> ModelInfo | None:
    """``read_info``; None where the file is missing or damaged."""
    try:
        return read_info(path)
    except InputError:
        return None


def _open(path: Path) -> Any:
    if not path.is_file():
        raise InputError("no such model file", where=path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"not a readable safetensors file ({error})",
            where=path,
            remedy="Put another version in service (samadapt models rollback), train again, or restore it.",
        ) from error
