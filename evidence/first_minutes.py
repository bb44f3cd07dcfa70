"""A newcomer's first minutes: `samadapt demo`, and while it trains, a label in OHIF; then a retrained model.

    python evidence/first_minutes.py

does in a headless Chromium what the README says of the demo, and prints how many seconds after the command each
station was reached. This clicks once on each structure; what a person then mends with the brush, it puts there at once:
add that person's minutes, which the demo's training leaves. Screenshots go to build/screenshots.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "lib"), str(ROOT / "tests")]

from samadapt.data.labels import LabelMap  # noqa: E402
from viewing import Viewer, browser, label_on_series  # noqa: E402

TRAINING_MS = 600_000
INVITATION = re.compile(r"open (http\S+)/ohif/, click on one of (\w+)")
END_OF_LOOP = re.compile(r"Now you, in OHIF")


class Watch:
    """Prints what was reached, and when."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def reached(self, station: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"{int(seconds // 60)}:{int(seconds % 60):02}  {station}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium:
        watch = Watch()
        command = [sys.executable, "-m", "samadapt", "demo", "--folder", scratch]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            assert demo.stdout is not None
            url, case = wait_for(INVITATION, demo.stdout)
            watch.reached(f"the demo trains, and names {url}/ohif/ and {case}")
            viewer = Viewer(chromium, url, "first-minutes")
            play(viewer, case, Path(scratch), demo.stdout, watch)
        finally:
            demo.terminate()
            demo.wait(60)


def play(viewer: Viewer, case: str, folder: Path, said: IO[str], watch: Watch) -> None:
    """The way from the study list to the mask of a retrained model."""
    viewer.open(case)
    watch.reached(f"{case} is open in OHIF")
    truth = label_on_series(folder / "cohort" / f"{case}.nii.gz", folder / "cohort_truth" / f"{case}.nii.gz")
    labels = LabelMap.from_config((folder / "cohort" / "labels.json").read_text(encoding="utf-8"))
    click_on_each_structure(viewer, truth, labels)
    watch.reached("one click on each structure")
    viewer.picture("clicked")
    viewer.draw_by_name(truth, {name: labels.index(name) for name in labels.names})
    viewer.press("Submit label")
    viewer.says("The label is safe")
    watch.reached("the label is submitted")
    wait_for(END_OF_LOOP, said)
    watch.reached("the demo's loop has ended")
    viewer.press("Update model")
    viewer.says("The training has ended", TRAINING_MS)
    watch.reached(f"Update model: {viewer.panel.locator('.samadapt-status').inner_text()}")
    with viewer.page.expect_navigation():
        viewer.press("Next sample")
    viewer.wait_until_connected()
    viewer.press("Segment")
    viewer.says("Mask of")
    watch.reached("the next sample with the model's mask")
    viewer.picture("mask")


def click_on_each_structure(viewer: Viewer, truth: np.ndarray, labels: LabelMap) -> None:
    """Where a person would click: at the voxel of each structure that is farthest from its border."""
    viewer.press("Click: 3D")
    for name in viewer.names():
        voxel = innermost(truth == labels.index(name))
        viewer.choose(name)
        viewer.go_to(voxel[2])
        viewer.point(voxel)
        viewer.says("The model looks")
        viewer.says("Done")
    viewer.press("Click: 3D")


def innermost(mask: np.ndarray) -> list[int]:
    """The voxel farthest from the border within the slice k that shows most of the structure."""
    k = int(mask.sum(axis=(0, 1)).argmax())
    depth = ndimage.distance_transform_edt(np.pad(mask[..., k], 1))[1:-1, 1:-1]
    i, j = np.unravel_index(depth.argmax(), depth.shape)
    return [int(i), int(j), k]


def wait_for(words: re.Pattern[str], said: IO[str]) -> tuple[str, ...]:
    """Read what the demo says until ``words`` come; their groups."""
    heard = []
    for line in said:
        heard.append(line)
        if found := words.search(line):
            return found.groups()
    raise RuntimeError(f"the demo ended:\n{''.join(heard)}")


if __name__ == "__main__":
    main()
