"""The loop once, before the reader's eyes: a real server, the real client, sample volumes with known truth.

Of the host this uses nothing but its REST client, as any other program would.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import psutil
from filelock import FileLock, Timeout
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from samadapt.data.labels import LabelMap
from samadapt.data.volume import Geometry, Volume, read_label, read_volume
from samadapt.errors import InputError, StateError
from samadapt.evaluation.metrics import dice, mean, mean_by_class
from samadapt.project import Project
from samadapt.server import launch
from samadapt.terminal import Terminal, figure, table

GENERATOR = Path(__file__).resolve().parents[2] / "sample-data" / "generate.py"

HOST = "127.0.0.1"
FIRST_PORT = 8000
CASES = 14
ANNOTATED = 6
JUDGED = 4
"""Volumes that nobody labels; before and after are compared on them."""

FEW_STEPS = 60
"""With fewer training steps than this, the masks are poor for want of time, and the demo says so."""

IMAGE_SIZE = 64
"""Smaller than the automatic choice for these volumes: four times the training steps in the same minutes on a CPU."""

START_SECONDS = 600
"""Generous, for a busy machine; a server that dies is noticed at once."""

POLL_SECONDS = 1.0
LOG_LINES = 25


@dataclass
class Outcome:
    """What one run of the loop found; figures are means over the judged volumes, per structure.

    Attributes:
        free: volumes that are neither labelled nor judged: the reader's, to label in a viewer.
        before: Dice of the automatic masks before any training.
        boxes: Dice of the plain model given a person's box around each structure, on one slice of one volume.
        after: Dice of the automatic masks after training.
    """

    folder: Path
    url: str
    labelled: list[str] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    boxes: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    training_seconds: float = 0.0
    training_steps: int = 0
    picture: Path | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Shown:
    """One slice for the picture: ``k`` of a volume, and the masks (I,J) by column title."""

    case: str
    volume: Volume
    k: int
    columns: dict[str, np.ndarray]


class Demo:
    """A run of the demo; a context manager, because leaving it ends the server whatever happened.

    Args:
        folder: gets ``cohort/`` and ``cohort_truth/`` (made once) and ``run-N/`` for this run. Earlier runs stay.
        out: where to narrate.
        port: the server's; None takes 8000 or the next free one.
        minutes: longest training.

    Raises:
        StateError: the port is taken, another demo runs in the folder, or the server does not start.
    """

    def __init__(self, folder: Path, out: Terminal, port: int | None = None, minutes: float = 1.25) -> None:
        self._folder = folder.resolve()
        self._out = out
        self._port = _port(port)
        self._minutes = minutes
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Demo:
        with contextlib.ExitStack() as opened:
            opened.enter_context(_ended_by_signals())
            self._folder.mkdir(parents=True, exist_ok=True)
            opened.enter_context(_alone(self._folder))
            self._truth, images, self._labels = _cohort(self._folder)
            self._run = _next_run(self._folder)
            self._images = _copy_studies(images, self._labels, self._run / "studies")
            self._out.note(f"This run's folder: {self._run}")
            self._temporary = opened.enter_context(tempfile.TemporaryDirectory(prefix="samadapt-demo-"))
            self._server = opened.enter_context(_server(self._run, self._port, self._minutes, self._out))
            self._cleanup = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    def loop(self) -> Outcome:
        """Next sample, pre-label, submit, train, and a better mask on volumes that were never labelled."""
        started = time.monotonic()
        url = f"http://{HOST}:{self._port}"
        self._client = MONAILabelClient(url, tmpdir=self._temporary)
        outcome = Outcome(self._run, url)
        try:
            self._play(outcome)
        except (MONAILabelClientException, OSError) as error:
            # OSError: the connection broke, mostly because the server died
            message = getattr(error, "msg", None) or str(error)
            raise StateError(
                f"the server did not do as asked ({message}){_end_of(self._run / 'server.log')}",
                where=self._run / "server.log",
                remedy="Run: samadapt doctor",
            ) from error
        outcome.seconds = time.monotonic() - started
        self._tell(outcome)
        return outcome

    def stay(self) -> None:
        """Keep the server up until Ctrl-C.

        Raises:
            StateError: the server ended by itself.
        """
        code = self._server.wait()
        raise _died(code, self._run / "server.log")

    def _play(self, outcome: Outcome) -> None:
        say = self._out.note
        say(f"\n1. The annotator asks for the next sample ({ANNOTATED} volumes to label).")
        first = self._next()
        say(f"   The server proposes {first}. What does the untrained model say about it?")
        _, params = self._infer("samadapt", first)
        say(f"   automatic: {params.get('message', 'a mask')}")
        self._prompted(first)

        say(f"\n2. The annotator labels {ANNOTATED} volumes. (The demo submits their true labels.)")
        image = first
        for _ in range(ANNOTATED):
            reply = self._submit(image)
            outcome.labelled.append(image)
            say(f"   {image} submitted{_warning(reply)}")
            image = self._next()
        unlabelled = [case for case in sorted(self._images) if case not in outcome.labelled]
        outcome.free, outcome.judged = unlabelled[:-JUDGED], unlabelled[-JUDGED:]
        shown = self._best_to_show(outcome.judged)

        say(f"\n3. Before training, on {', '.join(outcome.judged)}, which nobody labels:")
        before = {case: self._infer("samadapt", case)[0] for case in outcome.judged}
        outcome.before = self._dice(before)
        say(f"   automatic masks: mean Dice {figure(mean(outcome.before.values()))} (nothing learned, nothing found)")
        volume, truth = self._volume(shown), self._true_label(shown)
        k = _fullest_slice(truth)
        boxed = self._boxes(shown, truth, k)
        outcome.boxes = dice(boxed, truth[..., k], self._labels)
        say(f"   a person's box around each structure, one slice: {figure(mean(outcome.boxes.values()))}")

        say(f"\n4. Training on the {ANNOTATED} labels, at most {self._minutes:g} minutes (POST, then GET /train/).")
        say(f"   You need not wait: open {_ohif(outcome)}, click on one of {', '.join(outcome.free)},")
        say("   then on MONAI Label, and begin to label it (Click: 3D marks an object).")
        outcome.training_seconds = self._train()
        outcome.training_steps = int(Project(self._run / "studies").status().get("step", 0))
        say(f"   {outcome.training_steps} steps, {outcome.training_seconds:.0f} s with start and checks")

        say("\n5. The same volumes again:")
        after = {case: self._infer("samadapt", case)[0] for case in outcome.judged}
        outcome.after = self._dice(after)
        columns = {
            "automatic, before": before[shown][..., k],
            "a box for each, before": boxed,
            "automatic, after": after[shown][..., k],
            "truth": truth[..., k],
        }
        outcome.picture = self._run / "before_after.png"
        draw(_Shown(shown, volume, k, columns), self._labels, outcome.picture)

    def _next(self) -> str:
        reply = self._client.next_sample("random", {})
        if "id" not in reply:
            raise InputError(f"the server has no next sample ({reply})", where=self._run / "studies")
        return str(reply["id"])

    def _volume(self, case: str) -> Volume:
        return read_volume(self._images[case])

    def _true_label(self, case: str) -> np.ndarray:
        return read_label(self._truth[case], self._volume(case).geometry)

    def _infer(self, model: str, case: str, **params: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """The reply's mask (I,J,K) and its params."""
        file, reply = self._client.infer(model, case, params)
        try:
            return read_label(file, self._volume(case).geometry), reply
        finally:
            Path(file).unlink(missing_ok=True)

    def _prompted(self, case: str) -> None:
        """Show that a box already answers, on the largest structure."""
        truth = self._true_label(case)
        value = int(np.bincount(truth.reshape(-1), minlength=2)[1:].argmax()) + 1
        name = self._labels.names[value - 1]
        started = time.monotonic()
        found, _ = self._infer("samadapt_click_3d", case, roi=_box(truth == value), label=name)
        score = dice(found, (truth == value).astype(np.uint8), LabelMap((name,)))[name]
        self._out.note(
            f"   a box around the {_spoken(name)}: Dice {figure(score)} in {time.monotonic() - started:.0f} s"
        )

    def _boxes(self, case: str, truth: np.ndarray, k: int) -> np.ndarray:
        """(I,J): what the plain model finds in a box around each structure of slice ``k``."""
        result = np.zeros(truth.shape[:2], np.uint8)
        for value, name in enumerate(self._labels.names, start=1):
            here = truth[..., k] == value
            if here.any():
                roi = [*_box(here), k, k]
                found, _ = self._infer("samadapt_click", case, roi=roi, slice=k, label=name)
                result[(found[..., k] > 0) & (result == 0)] = value
        return result

    def _submit(self, case: str) -> dict[str, Any]:
        information = [{"name": name, "idx": index} for name, index in self._labels.to_dict().items()]
        return self._client.save_label(case, str(self._truth[case]), params={"label_info": information})

    def _train(self) -> float:
        """Start, follow, wait; returns seconds.

        Raises:
            StateError: the training failed.
        """
        started = time.monotonic()
        self._client.train_start("samadapt", {})
        with self._out.bar("starting") as update:
            while True:
                task = self._client.train_status()
                progress = self._client.info()["train_stats"]["samadapt"]
                update(completed=progress["epoch"], total=progress["total_epochs"], description=progress["message"])
                if task["status"] not in ("SUBMITTED", "RUNNING"):
                    break
                time.sleep(POLL_SECONDS)
        if task["status"] != "DONE":
            raise StateError(
                f"the training ended with {task['status']}\n" + "\n".join(task.get("details", [])[-LOG_LINES:]),
                where=self._run / "server.log",
                remedy="Run: samadapt doctor",
            )
        self._out.note(f"   {progress['message']}")
        return time.monotonic() - started

    def _dice(self, masks: dict[str, np.ndarray]) -> dict[str, float]:
        return mean_by_class([dice(mask, self._true_label(case), self._labels) for case, mask in masks.items()])

    def _best_to_show(self, cases: list[str]) -> str:
        """A volume whose slices were taken along k, so that the viewers' plane is the sharp one."""
        return next((case for case in cases if self._volume(case).geometry.acquisition_axis == 2), cases[0])

    def _tell(self, outcome: Outcome) -> None:
        rows = [
            [_spoken(name), figure(outcome.before[name]), figure(outcome.after[name])] for name in self._labels.names
        ]
        rows.append(["mean", figure(mean(outcome.before.values())), figure(mean(outcome.after.values()))])
        if outcome.training_steps < FEW_STEPS:
            self._out.note(
                f"   The training had only {outcome.training_steps} steps, too few to learn much: "
                "the machine is slow or busy. Give it more time: --minutes 10."
            )
        title = f"Dice on {len(outcome.judged)} volumes that were never labelled"
        self._out.result(
            outcome,
            "",
            table(title, ["structure", "before", "after"], rows),
            f"Picture: {outcome.picture}",
            *_next_steps(outcome),
        )


def draw(shown: _Shown, labels: LabelMap, path: Path) -> None:
    """A PNG with one slice, plain and under each of the masks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = ["#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6"]
    used = [colours[n % len(colours)] for n in range(len(labels.names))]
    picture = shown.volume.array[0, ..., shown.k]
    low, high = np.percentile(picture, [1, 99.5])
    panels = {f"{shown.case}, slice {shown.k}": np.zeros(picture.shape, np.uint8), **shown.columns}
    sheet = Figure(figsize=(3 * len(panels), 3.9), facecolor="white")
    FigureCanvasAgg(sheet)
    for axes, (title, mask) in zip(sheet.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(_upright(picture, shown.volume.geometry), cmap="gray", vmin=low, vmax=high, aspect=_aspect(shown))
        overlay = np.ma.masked_equal(_upright(mask, shown.volume.geometry), 0)
        axes.imshow(
            overlay,
            cmap=ListedColormap(used),
            vmin=1,
            vmax=max(2, len(used)),
            alpha=0.55,
            aspect=_aspect(shown),
            interpolation="nearest",
        )
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        if not mask.any() and title in shown.columns:
            axes.text(0.5, 0.03, "empty", transform=axes.transAxes, ha="center", color="white")
    patches = [Patch(color=colour, label=_spoken(name)) for colour, name in zip(used, labels.names, strict=True)]
    sheet.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False)
    sheet.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.1, wspace=0.03)
    sheet.savefig(path, dpi=110)


def _upright(slice2d: np.ndarray, geometry: Geometry) -> np.ndarray:
    """(I,J) as rows and columns in the usual view: head or front up, the patient's right (or front) on the left."""
    turned = slice2d
    for axis, main in enumerate(_directions(geometry)):
        if geometry.affine[main, axis] > 0:  # the affine counts towards right, front and head; pictures count away
            turned = np.flip(turned, axis)
    return turned.T if _transposed(geometry) else turned


def _aspect(shown: _Shown) -> float:
    """Height of a pixel by its width."""
    first, second, _ = shown.volume.geometry.spacing
    return float(second / first if _transposed(shown.volume.geometry) else first / second)


def _transposed(geometry: Geometry) -> bool:
    """Whether the first axis runs across the picture rather than down."""
    first, second = _directions(geometry)
    return first < second


def _directions(geometry: Geometry) -> tuple[int, int]:
    """The body's axis (0 right, 1 front, 2 head) that each of the two slice axes follows most."""
    first, second = np.abs(geometry.affine[:3, :2]).argmax(axis=0)
    return int(first), int(second)


def _box(mask: np.ndarray) -> list[int]:
    """Low and high index along each axis, in turn."""
    bounds: list[int] = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        bounds += [int(inside[0]), int(inside[-1])]
    return bounds


def _fullest_slice(mask: np.ndarray) -> int:
    """The k that shows the most: square roots, so that several structures count more than one large one."""
    areas = [np.bincount(mask[..., k].reshape(-1), minlength=2)[1:] for k in range(mask.shape[2])]
    return max(range(mask.shape[2]), key=lambda k: float(np.sqrt(areas[k]).sum()))


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _warning(reply: dict[str, Any]) -> str:
    warnings = reply.get("warnings")
    return f" (the server remarks: {warnings})" if warnings else ""


def _ohif(outcome: Outcome) -> str:
    return f"{outcome.url}/ohif/"


def _next_steps(outcome: Outcome) -> list[str]:
    studies = outcome.folder / "studies"
    installed = Path(sys.executable).parent / "samadapt"
    program = str(installed) if installed.is_file() else f"{sys.executable} -m samadapt"
    return [
        "",
        f"Server:    {outcome.url} (every request, to try out); models and progress: {outcome.url}/info/",
        f"Log:       {outcome.folder / 'server.log'}",
        "",
        f"Now you, in OHIF: {_ohif(outcome)}",
        f"1. Click on a case that is not labelled ({', '.join(outcome.free)}), then on MONAI Label.",
        "2. In the panel samadapt: Segment; correct the mask with the brush; Submit label.",
        "3. Update model: it goes on from the demo's. Then Next sample, and Segment, for a case that nobody labelled.",
        "",
        f"3D Slicer, module MONAI Label: connect to {outcome.url}. Your own images:",
        f"  {program} serve --studies YOUR_FOLDER --conf labels=first,second",
        f"Dice and HD95 on the labels held out from training: {program} evaluate {studies}",
    ]


def _port(wanted: int | None) -> int:
    if wanted is not None:
        launch.require_free(HOST, wanted)
        return wanted
    port = next((port for port in range(FIRST_PORT, FIRST_PORT + 100) if launch.is_free(HOST, port)), None)
    if port is None:
        raise StateError(f"no free port from {FIRST_PORT} to {FIRST_PORT + 99}", remedy="Give --port.")
    return port


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two demos in one folder would make the same cohort at the same time."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise StateError(
            "another demo runs in this folder", where=folder, remedy="Stop it, or give --folder."
        ) from None


def _cohort(folder: Path) -> tuple[dict[str, Path], dict[str, Path], LabelMap]:
    """Make or reuse the sample volumes: true labels and images by case, and the label map."""
    cohort = _generator().generate(folder / "cohort", CASES)
    return cohort.truths, cohort.images, LabelMap.from_config(cohort.labels)


def _generator() -> ModuleType:
    """The script sample-data/generate.py, which lies beside the library and not in it."""
    spec = importlib.util.spec_from_file_location("samadapt_sample_data", GENERATOR)
    if spec is None or spec.loader is None or not GENERATOR.is_file():
        raise InputError(
            "the sample data's generator is missing", where=GENERATOR, remedy="Run from a complete checkout."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _next_run(folder: Path) -> Path:
    numbers = [int(path.name[4:]) for path in folder.glob("run-*") if path.name[4:].isdecimal()]
    run = folder / f"run-{max(numbers, default=0) + 1}"
    run.mkdir()
    return run


def _copy_studies(images: dict[str, Path], labels: LabelMap, studies: Path) -> dict[str, Path]:
    """A studies folder of this run's own, without the labels and models of earlier ones."""
    studies.mkdir()
    (studies / "labels.json").write_text(json.dumps(labels.to_dict(), indent=2) + "\n", encoding="utf-8")
    return {case: Path(shutil.copy(path, studies / path.name)) for case, path in images.items()}


@contextlib.contextmanager
def _server(run: Path, port: int, minutes: float, out: Terminal) -> Iterator[subprocess.Popen[bytes]]:
    """The real server over ``run/studies``; it and what it started are gone when the context is left."""
    words = [sys.executable, "-m", "samadapt", "serve", "--studies", str(run / "studies"), "--port", str(port)]
    words += ["--conf", f"max_train_minutes={minutes:g}", "--conf", f"image_size={IMAGE_SIZE}"]
    out.note(f"Starting: {' '.join(words[2:])}")
    log = run / "server.log"
    with open(log, "wb") as output:
        # a session of its own: Ctrl-C reaches this process only, which then ends the server in order
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=run,
            env=launch.environment(),
            start_new_session=True,
        )
    try:
        _wait_until_up(process, port, log)
        yield process
    finally:
        _end(process)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    client = MONAILabelClient(f"http://{HOST}:{port}")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _died(process.returncode, log)
        with contextlib.suppress(MONAILabelClientException, OSError):
            client.info()
            return
        time.sleep(0.3)
    raise StateError(
        f"the server does not answer after {START_SECONDS} s{_end_of(log)}",
        where=log,
        remedy="Run: samadapt doctor",
    )


def _died(code: int, log: Path) -> StateError:
    return StateError(f"the server ended (exit code {code}){_end_of(log)}", where=log, remedy="Run: samadapt doctor")


def _end_of(log: Path) -> str:
    """The last lines of a log, to stand in an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "; the end of its log:\n" + "\n".join(lines[-LOG_LINES:]) + "\n" if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server and its trainings to end; after ten seconds, make them."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that the server does not outlive the demo."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
