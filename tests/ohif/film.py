"""The README's film: the loop in OHIF on the sample data, which may be shown to everybody.

    PYTHONPATH=lib:tests python tests/ohif/film.py

makes sample volumes, serves them as `samadapt serve` does, plays the loop in a browser, and writes docs/ohif-loop.webp.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "sample-data"), str(ROOT / "tests"), str(ROOT / "lib")]

import generate  # noqa: E402

from serving import ServeCommand  # noqa: E402
from viewing import Viewer, browser, label_on_series  # noqa: E402

LABELLED = 4
CAPTIONS = {
    "labelled": "A case is labelled with brush and clicks",
    "submitted": "Submit label: it is safe, and counts from now on",
    "next": "Next sample: the image whose label teaches most, and why",
    "training": "Update model: the training and its progress",
    "mask": "Segment: the model's mask of a case that nobody has labelled",
}
CONF = (("max_train_minutes", "2"), ("image_size", "64"))
TRAINING_MS = 900_000
FRAME_MS = 3000
FILM_WIDTH = 1000
CAPTION_HEIGHT = 44
BACKGROUND = "#0b1d38"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium:
        work = Path(scratch)
        cohort = generate.generate(work / "studies", cases=LABELLED + 2, progress=iter)
        server = ServeCommand(cohort.folder, *CONF).start()
        try:
            film(play(Viewer(chromium, server.url, "film"), cohort))
        finally:
            server.stop()


def play(viewer: Viewer, cohort: generate.Cohort) -> dict[str, Path]:
    """The loop; a picture of each of its stations."""
    pictures = {}
    for name in sorted(cohort.images)[:LABELLED]:
        truth = label_on_series(cohort.images[name], cohort.truths[name])
        viewer.open(name)
        viewer.draw_by_name(truth, cohort.labels)
        viewer.go_to(fullest_slice(truth))
        wait_for_a_clear_view(viewer)
        pictures["labelled"] = viewer.picture("labelled")
        viewer.press("Submit label")
        viewer.says("The label is safe")
    pictures["submitted"] = viewer.picture("submitted")
    wait_until_prepared(viewer)
    with viewer.page.expect_navigation():
        viewer.press("Next sample")
    viewer.wait_until_connected()
    viewer.panel.locator(".samadapt-reason p").wait_for()
    wait_for_a_clear_view(viewer)
    pictures["next"] = viewer.picture("next")
    viewer.press("Update model")
    progress = viewer.panel.locator(".samadapt-progress").element_handle()
    moving = "node => /round ([5-9]|1)/.test(node.textContent)"
    viewer.page.wait_for_function(moving, arg=progress, timeout=TRAINING_MS)
    pictures["training"] = viewer.picture("training")
    viewer.says("The training has ended", TRAINING_MS)
    viewer.press("Segment")
    viewer.says("Mask of")
    viewer.go_to(fullest_slice(viewer.voxels()))
    pictures["mask"] = viewer.picture("mask")
    return pictures


def wait_for_a_clear_view(viewer: Viewer) -> None:
    """Until OHIF's messages no longer cover a corner."""
    viewer.page.get_by_text("Connected to MONAI Label").first.wait_for(state="hidden")


def wait_until_prepared(viewer: Viewer) -> None:
    """Until the encoder has seen every image, which takes as long as somebody labels the next one."""
    ahead = viewer.panel.locator(".samadapt-ahead").element_handle()
    done = "node => { const [a, b] = node.textContent.match(/\\d+/g) || [0, 1]; return a === b; }"
    viewer.page.wait_for_function(done, arg=ahead, timeout=TRAINING_MS)


def fullest_slice(mask: np.ndarray) -> int:
    """The k in which most structures are drawn; of several, the one with most voxels."""
    return max(range(mask.shape[2]), key=lambda k: (np.unique(mask[..., k]).size, np.count_nonzero(mask[..., k])))


def film(pictures: dict[str, Path]) -> None:
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    first, *others = [captioned(Image.open(path), CAPTIONS[station]) for station, path in pictures.items()]
    first.save(docs / "ohif-loop.webp", save_all=True, append_images=others, duration=FRAME_MS, loop=0, quality=80)


def captioned(image: Image.Image, words: str) -> Image.Image:
    """The picture, smaller, below its caption."""
    height = round(image.height * FILM_WIDTH / image.width)
    sheet = Image.new("RGB", (FILM_WIDTH, height + CAPTION_HEIGHT), BACKGROUND)
    sheet.paste(image.convert("RGB").resize((FILM_WIDTH, height), Image.Resampling.LANCZOS), (0, CAPTION_HEIGHT))
    place = (FILM_WIDTH // 2, CAPTION_HEIGHT // 2)
    ImageDraw.Draw(sheet).text(place, words, fill="white", anchor="mm", font=ImageFont.load_default(size=22))
    return sheet


if __name__ == "__main__":
    main()
