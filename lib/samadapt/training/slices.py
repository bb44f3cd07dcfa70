"""Training slices on disk, in the model frame, so that memory does not grow with the number of cases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from samadapt.data.augment import Augmentation
from samadapt.data.cases import Case
from samadapt.data.coverage import remap_covered
from samadapt.data.labels import IGNORE, LabelMap, RemapReport
from samadapt.data.slices import take_slice
from samadapt.data.view import LEVELS, ModelView, view_key
from samadapt.data.volume import Volume, read_label, read_volume
from samadapt.data.window import Window
from samadapt.errors import InputError
from samadapt.files import atomic_path, write_json

if TYPE_CHECKING:
    from samadapt.training.synthetic import SyntheticSlices

PREPARED = 4
"""Version of how slices are prepared and kept on disk: raise it with any change, and old ones are made anew."""

ANY_SLICE = 0.2
"""Share of slices drawn from all; the others show a class that is drawn first, so that rare classes are seen."""


def read_case(case: Case, labels: LabelMap) -> tuple[Volume, np.ndarray, RemapReport]:
    """The image, its label in the order of ``labels`` (uint8, native grid; ``IGNORE`` where nobody has labelled), and
    what the mapping by name reported.

    Raises:
        InputError: the case has no label, or image or label cannot be used.
    """
    if case.label is None:
        raise InputError("the case has no label", where=case.id)
    volume = read_volume(case.image)
    try:
        label = read_label(case.label, volume.geometry)
        mask, report = remap_covered(label, case.values, labels, case.coverage, volume.geometry.acquisition_axis)
    except InputError as error:
        raise InputError(error.what, where=f"label of {case.id}", remedy=error.remedy) from error
    return volume, mask, report


def shown_in(case: Case, labels: LabelMap) -> set[str]:
    """Names of the classes that a case's label shows; none where it cannot be read, which its training will tell."""
    try:
        mask = read_case(case, labels)[1]
    except InputError:
        return set()
    return {labels.names[index - 1] for index in np.unique(mask).tolist() if 0 < index <= len(labels)}


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """The slices of one case in one of its planes, in the model frame, memory-mapped.

    Attributes:
        id: case id.
        plane: 0 is the acquisition plane; the others count as ``Geometry.slice_axes`` does.
        key: changes with the files and everything that shaped the slices.
        images: uint8 (N,C,S,S); ``LEVELS`` is 1.0.
        labels: uint8 (N,S,S) model label indices; ``IGNORE`` where nobody has labelled.
        slices_of: class index -> indices of the slices that show it.
        areas: class index -> its pixels in each of these.
        learned_from: indices of the slices that a training draws from; wholly unlabelled ones are not among them.
        context: see ``ModelInfo.context``.
        remark: what was odd about the names in its label; empty where all fitted.
        partly: what is not labelled, for people; empty where everything is.
        unknown: indices of the classes that nobody has looked for: the background may be any of them.
        view_key: see ``samadapt.data.view.view_key``; unlike ``key`` it stays when the label is changed.
    """

    id: str
    plane: int
    key: str
    view_key: str
    images: np.ndarray
    labels: np.ndarray
    slices_of: dict[int, list[int]]
    areas: dict[int, list[int]]
    learned_from: Sequence[int]
    context: int
    remark: str
    partly: str
    unknown: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """(3,S,S) float32 in [0,1]."""
        return kept_image(self.images, index, self.context)

    def label(self, index: int) -> Tensor:
        """(S,S) int64."""
        return torch.from_numpy(np.array(self.labels[index])).long()

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """``image`` and ``label`` of one slice."""
        return self.image(index), self.label(index)

    def unknown_on(self, index: int) -> tuple[int, ...]:
        """Classes that the background of one slice may be: the same for all slices of a case."""
        return self.unknown


def prepare(
    cases: Sequence[Case],
    labels: LabelMap,
    window: Window,
    context: int,
    size: int,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    planes: str = "acquisition",
) -> list[PreparedCase]:
    """Write the slices of every case once (a second call finds them), forget those of other settings, and open them.

    With ``planes`` "all" there may be three for each case, see ``Geometry.slice_axes``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = [_key(case, labels, window, size, planes) for case in cases]
    forget_others(folder, keys)
    prepared = []
    for number, (case, key) in enumerate(zip(cases, keys, strict=True), start=1):
        if not (folder / f"{key}.json").is_file():
            _write(case, labels, window, size, planes, folder / key)
        prepared += _open(case.id, folder / key, window, context, size)
        if progress:
            progress(number, len(cases))
    return prepared


def partly_labelled(prepared: Sequence[PreparedCase]) -> list[str]:
    """One sentence about the cases of which not everything is labelled; none where there are no such cases."""
    cases = [case for case in prepared if case.plane == 0]
    partly = [case for case in cases if case.partly]
    if not partly:
        return []
    slices, labelled = sum(map(len, cases)), sum(len(case.learned_from) for case in cases)
    return [
        f"{len(partly)} of {len(cases)} labelled cases are labelled in part: {labelled} of {slices} slices are "
        f"labelled, and {sum(bool(case.unknown) for case in cases)} cases do not speak of every structure"
    ]


def few_slices(case: PreparedCase, count: int, seed: int) -> PreparedCase:
    """The case, but a training draws from ``count`` of its slices alone: the few-shot protocol of the finetune-SAM
    study (arXiv 2404.09957, n slices of n patients).

    Args:
        case: one that shows no structure stays as it is.
        count: at least 1; fewer where fewer slices show a structure.
        seed: of the draw, together with the case's id.
    """
    shown = sorted({index for indices in case.slices_of.values() for index in indices})
    if not shown:
        return case
    state = np.frombuffer(hashlib.sha256(f"{seed} {case.id}".encode()).digest(), np.uint32)
    return with_slices(case, np.random.default_rng(state).permutation(shown)[:count].tolist())


def with_slices(case: PreparedCase, chosen: Iterable[int]) -> PreparedCase:
    """The case, but a training draws from the slices ``chosen`` alone, whatever the others show."""
    chosen = sorted(chosen)
    kept: dict[int, dict[int, int]] = {}
    for label, indices in case.slices_of.items():
        areas = dict(zip(indices, case.areas[label], strict=True))
        if here := {index: area for index, area in areas.items() if index in chosen}:
            kept[label] = here
    return replace(
        case,
        key=f"{case.key} {chosen}",
        slices_of={label: list(areas) for label, areas in kept.items()},
        areas={label: list(areas.values()) for label, areas in kept.items()},
        learned_from=chosen,
    )


@dataclass(frozen=True)
class Draw:
    """One slice of a batch.

    Attributes:
        case: where it is from; a bank of synthetic slices is drawn from like a case.
        index: which slice.
        copy: which of its augmented copies; None is the slice as it is.
    """

    case: PreparedCase | SyntheticSlices
    index: int
    copy: int | None


class SliceSampler:
    """Draws augmented batches. Batch n depends on the seed and on n alone, so a resumed training draws the same.

    Args:
        cases: at least one.
        size: S.
        batch_size: slices per batch.
        seed: of all draws.
        copies: augmented copies of each slice that there are to draw from; by default practically endless, and 0 draws
            the slices as they are.
        synthetic: slices to draw beside those of the cases. Each has one augmented copy, as it is new already.

    Attributes:
        seed: as given.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        size: int,
        batch_size: int,
        seed: int,
        copies: int = 2**31,
        synthetic: SyntheticSlices | None = None,
    ) -> None:
        self._cases = [case for case in cases if case.learned_from]
        self._augment = Augmentation(size)
        self._batch_size = batch_size
        self.seed = seed
        self._copies = copies
        self._synthetic = synthetic
        self._classes = sorted({label for case in cases for label in case.slices_of})

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) float32 in [0,1] and labels (B,S,S) int64 of step ``number``."""
        return stack(self.load(draw) for draw in self.draws(number))

    def draws(self, number: int) -> list[Draw]:
        """What batch ``number`` is made of."""
        random = np.random.default_rng([self.seed, number])
        return [self._draw(random) for _ in range(self._batch_size)]

    def load(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Image (3,S,S) and label (S,S) of a draw; the same draw is the same image, always."""
        image, label = draw.case.pair(draw.index)
        if draw.copy is None:
            return image, label
        name = f"{self.seed} {draw.case.view_key} {draw.index} {draw.copy}"
        return self._augment(image, label, seed=int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))

    def _draw(self, random: np.random.Generator) -> Draw:
        bank = self._synthetic
        if bank is not None and random.random() < bank.share:
            return Draw(bank, int(random.integers(len(bank))), 0 if self._copies else None)
        cases, label = self._cases, None
        if self._classes and random.random() >= ANY_SLICE:
            label = self._classes[random.integers(len(self._classes))]
            cases = [case for case in cases if label in case.slices_of]
        case = cases[random.integers(len(cases))]
        choices = case.learned_from if label is None else case.slices_of[label]
        index = int(choices[random.integers(len(choices))])
        return Draw(case, index, int(random.integers(self._copies)) if self._copies else None)


def unknown_classes(draws: Sequence[Draw], labels: LabelMap) -> Tensor | None:
    """What ``class_loss`` takes as ``unknown`` for a batch: (B,K+1) bool, None where every class was looked for."""
    found = [draw.case.unknown_on(draw.index) for draw in draws]
    if not any(found):
        return None
    return torch.tensor([[n in indices for n in range(len(labels) + 1)] for indices in found])


def stack(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images, or what stands for them, and labels, each as one batch."""
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(labels)


def _key(case: Case, labels: LabelMap, window: Window, size: int, planes: str) -> str:
    """Hex name of a case's prepared slices: changes with the files and with everything that shapes the slices."""
    files = [path for path in (case.image, case.label) if path is not None]
    named, covered = sorted((case.values or {}).items()), astuple(case.coverage)
    return slices_key(files, [named, covered, labels.names, window.to_dict(), size, planes])


def _write(case: Case, labels: LabelMap, window: Window, size: int, planes: str, stem: Path) -> None:
    volume, mask, report = read_case(case, labels)
    written = []
    for plane, axis in enumerate(volume.geometry.slice_axes(planes)):
        view = ModelView(volume, window, context=0, size=size, native_axis=axis)
        written.append(_write_plane(volume, mask, view, _images(stem, plane), _labels(stem, plane)))
    record = {
        "case": case.id,
        "remark": "" if report.clean else str(report),
        "partly": report.partly,
        "unknown": [labels.index(name) for name in report.unknown],
        "digest": volume.digest,
        "planes": written,
    }
    write_json(stem.with_suffix(".json"), record)


def _write_plane(volume: Volume, mask: np.ndarray, view: ModelView, images: Path, labels: Path) -> dict[str, Any]:
    turned = view.turn.forward(mask)
    frames = [view.frame.mask_to_model(take_slice(turned, view.axis, i)) for i in range(len(view))]
    save_array(images, kept_images(volume, view))
    save_array(labels, np.stack(frames))
    shown = {label: [i for i, frame in enumerate(frames) if (frame == label).any()] for label in _present(frames)}
    areas = {label: [int((frames[i] == label).sum()) for i in indices] for label, indices in shown.items()}
    height, width = view.frame.content  # the padding around it is background
    labelled = [i for i, frame in enumerate(frames) if (frame[:height, :width] != IGNORE).any()]
    return {"slices_of": shown, "areas": areas, "learned_from": labelled, "axis": view.axis}


def _open(case_id: str, stem: Path, window: Window, context: int, size: int) -> list[PreparedCase]:
    """One for each plane."""
    record = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    found = []
    for plane, own in enumerate(record["planes"]):
        images, labels = (np.load(path(stem, plane), mmap_mode="r", allow_pickle=False) for path in (_images, _labels))
        slices_of, areas = (
            {int(label): numbers for label, numbers in own[name].items()} for name in ("slices_of", "areas")
        )
        found.append(
            PreparedCase(
                id=case_id,
                plane=plane,
                key=f"{stem.name}.{plane}",
                view_key=view_key(record["digest"], window, context, size, own["axis"]),
                images=images,
                labels=labels,
                slices_of=slices_of,
                areas=areas,
                learned_from=own["learned_from"],
                context=context,
                remark=record["remark"],
                partly=record["partly"],
                unknown=tuple(record["unknown"]),
            )
        )
    return found


def _images(stem: Path, plane: int) -> Path:
    return stem.with_suffix(f".{plane}.images.npy")


def _labels(stem: Path, plane: int) -> Path:
    return stem.with_suffix(f".{plane}.labels.npy")


def kept_images(volume: Volume, view: ModelView) -> np.ndarray:
    """All slices of ``view``, made without context, as they are kept: uint8 (N,C,S,S); ``LEVELS`` is 1.0."""
    channels = 3 if volume.is_colour else 1
    return np.stack([(view.image(i)[:channels] * LEVELS).round().byte().numpy() for i in range(len(view))])


def kept_image(images: np.ndarray, index: int, context: int) -> Tensor:
    """One slice of what ``kept_images`` gave, with its neighbours as ``ModelInfo.context`` says: (3,S,S) in [0,1]."""
    if images.shape[1] == 3:
        stack = images[index]
    else:
        neighbours = np.clip([index - context, index, index + context], 0, len(images) - 1)
        stack = images[neighbours, 0]
    return torch.from_numpy(np.array(stack)).float() / LEVELS


def slices_key(files: Sequence[Path], shaped_by: Sequence[Any]) -> str:
    """Hex name of prepared slices: changes with the files they are made from and with ``shaped_by`` (JSON)."""
    states = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    return hashlib.sha256(json.dumps([PREPARED, states, *shaped_by]).encode()).hexdigest()[:24]


def forget_others(folder: Path, keys: Collection[str]) -> None:
    """Remove the prepared slices of other names than ``keys``, and what a killed process left half-written."""
    for stale in folder.iterdir():
        if stale.name.split(".")[0] not in keys:
            stale.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, array, allow_pickle=False)


def _present(frames: Iterable[np.ndarray]) -> list[int]:
    found: set[int] = set()
    for frame in frames:
        found.update(int(label) for label in np.unique(frame))
    return sorted(found - {0, IGNORE})
