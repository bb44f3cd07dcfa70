"""Pictures for the README: the loop in OHIF on the sample data, which may be shown to everybody.

    PYTHONPATH=lib:tests python tests/ohif/film.py

makes sample volumes, turns them into DICOM series, plays the loop in a browser, and writes docs/ohif-*.png and
docs/ohif-loop.webp.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from pydicom.uid import generate_uid

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "sample-data"), str(ROOT / "tests"), str(ROOT / "lib")]

import generate  # noqa: E402

from make_dicom import write_stack  # noqa: E402
from pacs import make  # noqa: E402
from serving import PacsServer  # noqa: E402
from viewing import Viewer, browser  # noqa: E402

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
LABELS = "lateral_ventricles,deep_grey_nuclei,brain_stem,cerebellum"
SHOWN = {"labelled": "ohif-label", "training": "ohif-training", "mask": "ohif-mask"}
TRAINING_MS = 600_000
FRAME_MS = 1800
FILM_WIDTH = 1000


def as_dicom(nifti: Path, folder: Path, patient: str) -> None:
    """A NIfTI volume as an axial MR series; the head's oblique pose is left out, as it is not what is shown."""
    image = nibabel.as_closest_canonical(nibabel.load(nifti))
    voxels = np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)  # DICOM's axes; slices, rows, columns
    # DICOM keeps numbers as 16 characters
    across, down, between = (round(float(size), 3) for size in image.header.get_zooms()[:3])
    write_stack(
        folder,
        voxels.astype(np.int16),
        [(0.0, 0.0, round(k * between, 3)) for k in range(len(voxels))],
        SOPClassUID=MR_IMAGE,
        Modality="MR",
        PatientID=patient,
        PatientName=patient,
        StudyInstanceUID=generate_uid(),
        FrameOfReferenceUID=generate_uid(),
        PixelSpacing=[down, across],
        SliceThickness=between,
    )


def truth(nifti: Path) -> np.ndarray:
    """The true label of a sample volume on its DICOM series' grid."""
    image = nibabel.as_closest_canonical(nibabel.load(nifti))
    return np.asarray(image.dataobj)[::-1, ::-1].astype(np.uint8)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium:
        work = Path(scratch)
        cohort = generate.generate(work / "studies", cases=4, progress=iter)
        names = sorted(path.name.removesuffix(".nii.gz") for path in cohort.folder.glob("case_*.nii.gz"))
        for name in names:
            as_dicom(cohort.folder / f"{name}.nii.gz", work / "dicom" / name, name)
        pacs = make("embedded").start()
        pacs.upload(work / "dicom")
        server = PacsServer(pacs.url, work / "server", ("labels", LABELS), ("max_train_minutes", "1.2")).start()
        try:
            film(play(Viewer(chromium, server.url, "film"), names, cohort.truth))
        finally:
            server.stop()
            pacs.stop()


def play(viewer: Viewer, names: list[str], truths: Path) -> dict[str, Path]:
    """The loop; a picture of each of its stations."""
    pictures = {}
    for name in names[:3]:
        viewer.open(name)
        draw(viewer, truth(truths / f"{name}.nii.gz"))
        viewer.go_to(12)
        pictures["labelled"] = viewer.picture("labelled")
        viewer.press("Submit label")
        viewer.says("The label is safe")
    pictures["submitted"] = viewer.picture("submitted")
    with viewer.page.expect_navigation():
        viewer.press("Next sample")
    viewer.wait_until_connected()
    pictures["next"] = viewer.picture("next")
    viewer.press("Update model")
    progress = viewer.panel.locator(".samadapt-progress").element_handle()
    moving = "node => /round ([5-9]|1)/.test(node.textContent)"
    viewer.page.wait_for_function(moving, arg=progress, timeout=TRAINING_MS)
    pictures["training"] = viewer.picture("training")
    viewer.says("The training has ended", TRAINING_MS)
    viewer.press("Segment")
    viewer.says("Mask of")
    viewer.go_to(12)
    pictures["mask"] = viewer.picture("mask")
    return pictures


def draw(viewer: Viewer, label: np.ndarray) -> None:
    """The page numbers structures by the alphabet; the sample data by labels.json."""
    values = np.array([0, *(viewer.names()[name] for name in LABELS.split(","))], np.uint8)
    viewer.draw(values[label])


def film(pictures: dict[str, Path]) -> None:
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    for station, name in SHOWN.items():
        few_colours = Image.open(pictures[station]).convert("P", palette=Image.Palette.ADAPTIVE)
        few_colours.save(docs / f"{name}.png", optimize=True)
    first, *others = [small(Image.open(path)) for path in pictures.values()]
    first.save(docs / "ohif-loop.webp", save_all=True, append_images=others, duration=FRAME_MS, loop=0, quality=70)


def small(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((FILM_WIDTH, round(image.height * FILM_WIDTH / image.width)))


if __name__ == "__main__":
    main()
