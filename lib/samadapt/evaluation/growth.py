"""What shows beside no rival: memory and time as studies grow, how long people wait, whether fast means other masks.

Each measurement is one figure with what is wanted of it. Memory is that of whole programs, started as people start
them: the largest resident size that the system saw.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from tqdm import tqdm

from samadapt import recipes
from samadapt.data.cases import Case, find_cases
from samadapt.data.geometry import Geometry
from samadapt.data.labels import LabelMap
from samadapt.data.slices import take_slice
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.errors import StateError
from samadapt.evaluation.apart import run_apart
from samadapt.evaluation.metrics import mean
from samadapt.evaluation.speed import reference_lite_medsam
from samadapt.inference.auto import segment
from samadapt.model import AdaptedModel
from samadapt.server import launch
from samadapt.training.slices import read_case

LABELS = LabelMap(("anterior", "posterior"))
FEW, MANY = 10, 200
SHORT, LONG = 64, 256
"""Slices of the volumes whose times are compared."""

COMPARED = 2
"""Test volumes whose masks from both encoders are compared."""

PATIENCE = 900.0
"""Seconds after which a program that has not done its part is given up."""

Measure = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
        name: what is measured.
        unit: of the value; empty for a ratio.
        wanted: the largest value that is good enough.
        measure: gives ``value`` and whatever else explains it.
    """

    name: str
    unit: str
    wanted: float
    measure: Measure


def figures(shared: Path, folder: Path) -> Iterator[Figure]:
    """All of them.

    Args:
        shared: the data sets.
        folder: for studies and models; what is in it is made anew.
    """
    data, folder = (shared / "hippocampus_mr").resolve(), folder.resolve()  # programs start elsewhere
    size = f"{FEW} -> {MANY} volumes"
    yield Figure(f"memory of a training, {size}", "", 1.1, lambda: _memory("train", data, folder))
    yield Figure(f"memory of encoding ahead, {size}", "", 1.1, lambda: _memory("embed", data, folder))
    yield Figure("server start to the first answer", "s", 15.0, lambda: _server_start(data, folder))
    yield Figure("training asked for to its first step", "s", 10.0, lambda: {"value": _waits(data, folder)[0]})
    yield Figure("training asked for to the preview's end", "s", 30.0, lambda: {"value": _waits(data, folder)[1]})
    yield Figure(f"seconds per slice, {SHORT} -> {LONG} slices", "", 1.1, _linear)
    yield Figure("Dice with our encoder beside the reference's, points", "", 0.002, lambda: _same_masks(data))


# ---- memory


def _memory(command: str, data: Path, folder: Path) -> dict[str, Any]:
    """Largest resident size of ``samadapt train`` or ``embed`` on many volumes, in parts of that on a few."""
    words = {"train": ["--labels", ",".join(LABELS.names), "--conf", "max_steps=20"], "embed": []}[command]
    words += ["--conf", "image_size=64"]
    log = folder / f"{command}.log"
    few, many = (_peak_gib([command, str(_studies(data, folder / command, n, n)), *words], log) for n in (FEW, MANY))
    return {"value": many / few, "gib_few": round(few, 3), "gib_many": round(many, 3)}


def _peak_gib(words: list[str], log: Path) -> float:
    """Largest resident size of one run of the command line."""
    ended = run_apart([sys.executable, "-m", "samadapt", *words], log, lambda: None)
    if ended.code:
        raise StateError(f"samadapt {' '.join(words)}: {ended.reason}", where=log)
    return ended.peak_gib


def _studies(data: Path, folder: Path, images: int, labelled: int) -> Path:
    """A new studies folder with the first ``images`` volumes, and the labels of the first ``labelled``."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "labels" / "final").mkdir(parents=True)
    for number, image in enumerate(sorted((data / "images").glob("*.nii.gz"))[:images]):
        shutil.copyfile(image, folder / image.name)
        if number < labelled:
            shutil.copyfile(data / "labels" / image.name, folder / "labels" / "final" / image.name)
    return folder


# ---- waiting


def _server_start(data: Path, folder: Path) -> dict[str, Any]:
    studies, seconds = _studies(data, folder / "server", 20, 0), []
    for _ in range(3):
        started = time.monotonic()
        with _server(studies):
            seconds.append(time.monotonic() - started)
    return {"value": statistics.median(seconds), "all": [round(s, 1) for s in seconds]}


@functools.cache
def _waits(data: Path, folder: Path) -> tuple[float, float]:
    """Seconds from ``POST /train/`` to the first step of the preview, and to the first of the full training.

    Eight labelled volumes; seven of them were trained on before, and what the server encodes when idle is encoded.
    """
    studies = _studies(data, folder / "waits", 20, 7)
    words = [str(studies), "--labels", ",".join(LABELS.names), "--conf", "max_train_minutes=2"]
    _peak_gib(["train", *words], folder / "before.log")
    _peak_gib(["embed", str(studies)], folder / "before.log")
    last = sorted((data / "images").glob("*.nii.gz"))[7].name
    shutil.copyfile(data / "labels" / last, studies / "labels" / "final" / last)
    with _server(studies, {"labels": ",".join(LABELS.names)}) as url:
        started = time.monotonic()
        requests.post(f"{url}/train/", json={}, timeout=60).raise_for_status()
        first = _until(url, ": step ") - started
        preview = _until(url, "training: ") - started
        requests.delete(f"{url}/train/", timeout=60)
    return first, preview


def _until(url: str, words: str) -> float:
    """When the training said ``words``, or went past them."""
    message, deadline = "", time.monotonic() + PATIENCE
    while words not in message and not message.startswith("training: "):
        if time.monotonic() > deadline:
            raise StateError(f"the training came no further than {message!r}", where=url)
        time.sleep(0.1)
        message = requests.get(f"{url}/info/", timeout=60).json()["train_stats"]["samadapt"]["message"]
    return time.monotonic()


@contextlib.contextmanager
def _server(studies: Path, conf: dict[str, str] | None = None) -> Iterator[str]:
    """The address of a server that has answered its first ``GET /info/``."""
    port = next(port for port in range(8100, 8200) if launch.is_free("127.0.0.1", port))
    words = launch.command(studies, port=port, conf=conf)
    with open(studies.parent / "server.log", "ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=launch.environment(), cwd=studies.parent)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise StateError("the server did not start", where=studies.parent / "server.log")
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{url}/info/", timeout=60).raise_for_status()
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


# ---- slices and masks


def _linear() -> dict[str, Any]:
    """Seconds per slice of a long volume, in parts of those of a short one; both take turns."""
    model = recipes.build(recipes.DEFAULT, LABELS, image_size=64)
    model.merge()
    model.describe(trained=True)
    values = np.random.default_rng(0).normal(100, 10, (1, 48, 48, LONG)).astype(np.float32)
    volumes = [
        Volume(values[..., :n], Geometry((48, 48, n), np.diag([1.0, 1.0, 1.0, 1.0])), "MR", Path("noise"))
        for n in (SHORT, LONG)
    ]
    seconds = np.array([[_seconds(lambda v=v: segment(model, v)) for v in volumes] for _ in range(4)])[1:]  # type: ignore[misc]
    short, long = seconds[:, 0] / SHORT, seconds[:, 1] / LONG
    return {"value": float(np.median(long / short)), "ms_per_slice": round(1000 * float(np.median(long)), 1)}


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _same_masks(data: Path) -> dict[str, Any]:
    """Largest change of a case's Dice when the embeddings come from the module that ships with LiteMedSAM.

    Boxes around each structure of each slice, for the model as it is and with an adapter in every block (of a fixed
    random size, merged into the weights, which both encoders then load).
    """
    cases = find_cases(data)[-COMPARED:]
    changes = {
        name: [_dice_change(model, case) for case in tqdm(cases, desc=f"  {name}: both encoders", unit="case")]
        for name, model in (("plain", _merged(0.0)), ("adapted", _merged(0.02)))
    }
    largest = {name: max(map(abs, values)) for name, values in changes.items()}
    return {"value": max(largest.values()), **{name: round(value, 6) for name, value in largest.items()}}


def _merged(size: float) -> AdaptedModel:
    """A model whose adapter was moved by noise of that standard deviation, merged."""
    model = recipes.build("lora", LABELS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if name.startswith("backbone."):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    model.merge()
    return model


@torch.inference_mode()
def _dice_change(model: AdaptedModel, case: Case) -> float:
    """Mean Dice in the model frame with our encoder, less that with the reference's."""
    reference = reference_lite_medsam().image_encoder.cpu()
    reference.load_state_dict(model.backbone.image_encoder.state_dict())
    reference.train().eval()  # only then does it look at its new position biases
    volume, truth, _ = read_case(case, LABELS)
    view = ModelView(volume, None, 1, model.info.image_size)
    turned = view.turn.forward(truth)
    scores: dict[str, list[float]] = {"ours": [], "reference": []}
    for index in range(0, len(view), 4):
        frame = np.asarray(view.frame.mask_to_model(take_slice(turned, view.axis, index)))
        images = view.images([index])
        embeddings = {"ours": model.embed(images), "reference": reference(images)}
        for label in np.unique(frame[frame > 0]):
            rows, columns = np.nonzero(frame == label)
            box = torch.tensor([[columns.min(), rows.min(), columns.max(), rows.max()]]).float()
            for name, embedding in embeddings.items():
                mask = model.prompt_masks(embedding, boxes=box)[0][0, 0] > 0
                scores[name].append(_overlap(mask.numpy(), frame == label))
    return mean(scores["ours"]) - mean(scores["reference"])


def _overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two masks of one size."""
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
