"""What is wrong with this installation or this studies folder, and how to mend it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from samadapt.config import AppConfig
from samadapt.errors import SamAdaptError

if TYPE_CHECKING:
    import numpy as np

    from samadapt.data.cases import Case
    from samadapt.data.labels import LabelMap

STATUSES = ("ok", "warning", "problem")

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"

STUDIES_SECONDS = 12.0
"""Longest time spent on reading images; the rest of a large folder is left unread, and that is said."""

LEFT_OUT_SHOWN = 10
"""So many DICOM files that cannot be served are named."""

_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([^\s#;]+))?")
_GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: "ok", "warning" (works, but not as it should) or "problem" (something will fail).
        what: the finding, one phrase.
        remedy: how to mend it; empty where nothing is wrong.
    """

    name: str
    status: str
    what: str
    remedy: str = ""


def examine(
    config: AppConfig, studies: Path | None = None, progress: Callable[[str], None] | None = None
) -> list[Check]:
    """Look at everything, in the order in which things fail.

    Args:
        config: which backbone and weights to check.
        studies: a studies folder to check as well.
        progress: called with what is looked at now.
    """
    say = progress or (lambda text: None)
    checks: list[Check] = []
    say("versions")
    checks += [_python(), *_packages()]
    say("weights")
    checks.append(_weights(config))
    say("device")
    checks += [_device(config), _memory(), _disk(studies or Path.cwd())]
    if studies is not None:
        say("studies folder")
        checks += _studies(studies, config, say)
    return checks


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] <= (3, 11):
        return Check("Python", "ok", version)
    return Check(
        "Python", "problem", f"{version}; the pinned packages need 3.10 or 3.11", "Make .venv with Python 3.11."
    )


def _packages() -> Iterator[Check]:
    """One check for all packages if they are as pinned, else one for each that is not."""
    install = f"Run: {sys.executable} -m pip install -r {REQUIREMENTS}"
    try:
        lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        yield Check("packages", "warning", f"{REQUIREMENTS} is not there, so versions cannot be compared")
        return
    pins = [(match.group(1), match.group(2)) for line in lines if (match := _PIN.match(line.strip()))]
    wrong = [check for name, wanted in pins if (check := _package(name, wanted, install))]
    yield from wrong or [Check("packages", "ok", f"{len(pins)} as in requirements.txt")]


def _package(name: str, wanted: str | None, install: str) -> Check | None:
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "problem", "not installed", install)
    if wanted and installed != wanted:
        return Check(name, "problem", f"{installed} is installed, {wanted} is needed", install)
    return None


def _weights(config: AppConfig) -> Check:
    name = f"weights of {config.backbone}"
    try:
        from samadapt.backbones import spec, weights

        source = spec(config.backbone).source
        if (
            config.weights is None
            and weights.locate(source) is None
            and (source.url or "SAMADAPT_WEIGHTS_URL" in os.environ)
        ):
            return Check(
                name,
                "warning",
                "not here yet",
                "They are downloaded when first needed; --conf weights=FILE uses a file.",
            )
        file = weights.resolve(source, config.weights)
    except SamAdaptError as error:
        return Check(name, "problem", f"{error.where or config.backbone}: {error.what}", error.remedy or "")
    except ImportError as error:
        return Check(name, "problem", f"cannot be looked for: {error}", f"Run: pip install -r {REQUIREMENTS}")
    checked = (
        "SHA-256 as published" if file.sha256 == source.sha256 else f"your own file, SHA-256 {file.sha256[:12]}..."
    )
    return Check(name, "ok", f"{file.path}, {checked}")


def _device(config: AppConfig) -> Check:
    try:
        import torch
        import torchvision  # noqa: F401 - a torchvision that does not match torch fails right here
    except (ImportError, RuntimeError, OSError) as error:
        remedy = "Install torch and torchvision of one release from the same index."
        return Check("device", "problem", f"torch or torchvision cannot be imported: {error}", remedy)
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / _GIB
        return Check("device", "ok", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    cores = f"no GPU, {psutil.cpu_count() or 1} CPU cores (torch {torch.__version__})"
    if config.backbone == "lite_medsam":
        return Check("device", "ok", f"{cores}: trainings take minutes")
    remedy = "Use --conf backbone=lite_medsam, a small --conf image_size, or a machine with a GPU."
    return Check("device", "warning", f"{cores}: {config.backbone} is slow here", remedy)


def _memory() -> Check:
    free = psutil.virtual_memory().available / _GIB
    status = "problem" if free < 2 else "warning" if free < 4 else "ok"
    remedy = "" if status == "ok" else "Close other programs; a training takes 2 to 4 GiB."
    return Check("memory", status, f"{free:.1f} GiB free", remedy)


def _disk(folder: Path) -> Check:
    place = next((path for path in (folder, *folder.resolve().parents) if path.is_dir()), Path.cwd())
    free = shutil.disk_usage(place).free / _GIB
    status = "problem" if free < 0.5 else "warning" if free < 5 else "ok"
    remedy = "" if status == "ok" else "Free some space: training slices, models and downloads go there."
    return Check("disk", status, f"{free:.1f} GiB free at {place}", remedy)


def _studies(studies: Path, config: AppConfig, say: Callable[[str], None]) -> Iterator[Check]:
    try:
        from samadapt.data.cases import assume, find_cases

        cases = assume(find_cases(studies), config.coverage)
    except SamAdaptError as error:
        yield Check("studies", "problem", f"{error.where or studies}: {error.what}", error.remedy or "")
        return
    if not cases:
        formats = "NIfTI, NRRD, MHA, PNG, JPEG or DICOM folders"
        yield Check("studies", "problem", f"no image in {studies}", f"Put images there: {formats}.")
        return
    yield from _left_out(studies)
    yield from _not_in_pacs(studies)
    labelled = sum(case.label is not None for case in cases)
    yield Check("studies", "ok", f"{len(cases)} images, {labelled} labelled, in {studies}")
    if not os.access(studies, os.W_OK):
        yield Check(
            "studies", "problem", f"{studies} cannot be written to", "Labels and models go there: change its rights."
        )
    yield from _records(studies, cases)
    yield _cache(studies, config)
    yield from _orphans(studies, {case.id for case in cases})
    yield from _cases(studies, cases, config, say)


def _left_out(studies: Path) -> Iterator[Check]:
    """The DICOM files that `samadapt serve` does not show, and why."""
    from samadapt.dicomweb.index import Index
    from samadapt.server.launch import needs_dicomweb

    if not needs_dicomweb(studies):
        return
    with tempfile.TemporaryDirectory() as folder:
        index = Index([studies], Path(folder) / "index.sqlite")
        index.update()
        problems = {**index.problems(), **index.conflicts()}
    for path, reason in list(problems.items())[:LEFT_OUT_SHOWN]:
        yield Check("DICOM", "warning", f"{path}: {reason}", "It is not served: export it again, or take it out.")
    if (more := len(problems) - LEFT_OUT_SHOWN) > 0:
        yield Check("DICOM", "warning", f"{more} more files", "`samadapt serve` names each in its log.")


def _not_in_pacs(studies: Path) -> Iterator[Check]:
    """Labels that count here, and that the DICOMweb server has not got yet."""
    from samadapt.dicomweb.child import store_folder
    from samadapt.server.outbox import outbox_folder, waiting_in

    for store in (studies, store_folder(studies)):
        for one in waiting_in(outbox_folder(store)):
            what = f"the label of {one.image} by {one.author or 'somebody unnamed'}, {one.time}, is not in the PACS yet"
            yield Check("PACS", "warning", what, "It counts here; a running server goes on sending it.")


def _records(studies: Path, cases: Sequence[Case]) -> Iterator[Check]:
    """What samadapt itself keeps: label map, ledger, progress, published model. A broken one hides no other."""
    for name, look in (
        ("labels.json", _written_labels),
        ("ledger", partial(_ledger, cases)),
        ("training", _training),
        ("model", _model),
    ):
        try:
            yield from look(studies)
        except SamAdaptError as error:
            yield Check(name, "problem", f"{error.where}: {error.what}", error.remedy or "")


def _cache(studies: Path, config: AppConfig) -> Check:
    """How much of their budget the encoder's results take."""
    from samadapt.data.slice_cache import SliceCache
    from samadapt.project import Project

    cache = SliceCache(Project(studies).cache, config.cache_gib)
    used = f"{cache.filled() * config.cache_gib:.2f} of {config.cache_gib:g} GiB"
    if cache.full():
        remedy = "What was used longest ago makes room; raise --conf cache_gib if images are encoded again and again."
        return Check("cache", "warning", f"{used}: it is full", remedy)
    return Check("cache", "ok", used)


def _written_labels(studies: Path) -> Iterator[Check]:
    labels = _label_map(studies)
    if labels:
        yield Check("labels.json", "ok", ", ".join(labels.names))


def _ledger(cases: Sequence[Case], studies: Path) -> Iterator[Check]:
    from samadapt.project import Project
    from samadapt.training.ledger import HELD_OUT_EVERY, Ledger

    if Ledger(Project(studies).ledger).nothing_held_out(cases):
        what = f"nothing is held out although {HELD_OUT_EVERY} patients or more are labelled: no training is compared"
        yield Check("ledger", "warning", what, "Label one patient more, who will be held out; see `samadapt cases`.")


def _training(studies: Path) -> Iterator[Check]:
    from samadapt.project import Project

    if Project(studies).status().get("state") == "interrupted":
        yield Check("training", "warning", "the last one was stopped before its end", "Train again: it goes on there.")


def _model(studies: Path) -> Iterator[Check]:
    from samadapt.model import read_info
    from samadapt.project import Project

    published = Project(studies).published()
    if published:
        yield Check("model", "ok", f"{published.name} knows {', '.join(read_info(published).labels.names)}")


def _label_map(studies: Path) -> LabelMap | None:
    """What labels.json in the folder says; None where there is none."""
    from samadapt.data.labels import LabelMap

    path = studies / "labels.json"
    return LabelMap.from_json(path) if path.is_file() else None


def _learned(studies: Path) -> LabelMap | None:
    """The published model's; None before the first."""
    from samadapt.model import read_info
    from samadapt.project import Project

    published = Project(studies).published()
    return read_info(published).labels if published else None


def _orphans(studies: Path, ids: set[str]) -> Iterator[Check]:
    from samadapt.data.volume import image_suffix

    folder = studies / "labels" / "final"
    for path in sorted((folder if folder.is_dir() else studies / "labels").glob("[!.]*")):
        suffix = image_suffix(path.name)
        if path.is_file() and suffix and path.name[: -len(suffix)] not in ids:
            yield Check(path.name, "warning", "a label without an image of that name", "Rename it like its image.")


def _cases(studies: Path, cases: Sequence[Case], config: AppConfig, say: Callable[[str], None]) -> Iterator[Check]:
    """Read image and label of each case, labelled ones first, until the time is up."""
    labels = config.labels
    if labels is None:
        with contextlib.suppress(SamAdaptError):  # a broken labels.json or model has been reported already
            labels = _label_map(studies) or _learned(studies)
    deadline = time.monotonic() + STUDIES_SECONDS
    ordered = sorted(cases, key=lambda case: case.label is None)
    wrong = 0
    for number, case in enumerate(ordered):
        if number and time.monotonic() > deadline:
            unread = f"only {number} of {len(cases)} were read in {STUDIES_SECONDS:.0f} s"
            yield Check("cases", "warning", unread, "The others are read, and refused by name, when they are used.")
            break
        say(f"case {number + 1} of {len(cases)}")
        for check in _case(case, labels):
            wrong += check.status != "ok"
            yield check
    if not wrong:
        yield Check("cases", "ok", "every image and label that was read can be used")


def _case(case: Case, labels: LabelMap | None) -> Iterator[Check]:
    from samadapt.data.volume import read_label, read_volume

    try:
        geometry = read_volume(case.image).geometry
        if case.label is None:
            return
        label = read_label(case.label, geometry)
    except SamAdaptError as error:
        yield Check(case.id, "problem", f"{error.where}: {error.what}", error.remedy or "Mend or remove the file.")
        return
    if not label.any():
        yield Check(case.id, "warning", "the label is empty", "Label a structure, or remove the label.")
    elif case.values is None and labels is None:
        remedy = "Put a labels.json beside the images, or submit the label with label_info."
        yield Check(case.id, "warning", "the label's values have no names", remedy)
    else:
        yield from _names(case, label, geometry.acquisition_axis, labels)


def _names(case: Case, label: np.ndarray, axis: int, labels: LabelMap | None) -> Iterator[Check]:
    """Values or names that the label map does not have; without a label map, values that have no name. And what of the
    image the label does not speak of."""
    from samadapt.data.coverage import remap_covered
    from samadapt.data.labels import LabelMap, class_names

    named = class_names((case.values or {}).values())
    if not (labels or named):
        yield Check(case.id, "warning", "the label names no structure", "Submit it with a segment of some structure.")
        return
    known = labels or LabelMap(tuple(named))
    try:
        _, report = remap_covered(label, case.values, known, case.coverage, axis)
    except SamAdaptError as error:
        yield Check(case.id, "problem", f"{error.where}: {error.what}", error.remedy or "Submit that label again.")
        return
    if report.partly:
        yield Check(case.id, "ok", report.partly)
    if report.extra or report.unknown_values:
        remedy = f"They train as background. The label map: {', '.join(known.names)}."
        yield Check(case.id, "warning", str(report), remedy)
