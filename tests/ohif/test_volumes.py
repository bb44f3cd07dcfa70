"""NIfTI volumes in OHIF, in a real browser: what is drawn there is the label of the file, however its voxels lie."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine

from phantoms import octants
from samadapt.data.cases import find_cases
from samadapt.data.geometry import turn_to_series
from samadapt.data.labels import LabelMap
from samadapt.data.volume import read_volume
from samadapt.dicomweb.converted import folder_in, records
from samadapt.training.slices import read_case
from serving import ServeCommand
from viewing import Viewer, browser

pytestmark = [pytest.mark.e2e, pytest.mark.requires_browser]

TURNED = np.array([[0.8, -0.6, 0], [0.48, 0.64, -0.6], [0.36, 0.48, 0.8]])
GRIDS = {
    "left_handed": np.diag([0.75, -0.5, 2.0]),
    "slices_along_i": np.diag([3.0, 0.5, -0.75]),
    "oblique": TURNED @ np.diag([0.75, 0.5, 2.0]),
}
NAMES = ("brain_stem", "cerebellum")
"""OHIF's bundled panel colours by name, and gives these two nearly the same green."""


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    for name, directions in GRIDS.items():
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = directions, (-20.25, 13.5, 40.125)
        values = np.random.default_rng(3).normal(100, 10, (24, 40, 32)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
    return folder


def test_what_is_drawn_in_ohif_is_the_label_of_the_file(studies):
    server = ServeCommand(studies, ("labels", ",".join(NAMES)), ("image_size", "64")).start()
    try:
        with browser() as chromium:
            for case in GRIDS:
                viewer = Viewer(chromium, server.url, f"volumes-{case}")
                viewer.open(case)
                check(viewer, studies, case)
                if case == "left_handed":
                    check_next_sample(viewer, studies, case)
                if case == "oblique":
                    check_label_is_shown_again(viewer)
                viewer.page.context.close()
                assert viewer.errors == []
    finally:
        server.stop()


def check(viewer, studies, case):
    volume = read_volume(studies / f"{case}.nii.gz")
    turn = turn_to_series(volume.geometry)
    mask = octants(turn.turned.shape, values=(1, 2))
    for voxel in ([0, 0, 0], [3, 5, 7]):  # the page's voxels lie where those of the file's grid do
        place = np.array([-1, -1, 1]) * apply_affine(turn.turned.affine, voxel)
        assert viewer.world(voxel) == pytest.approx(place, abs=0.01)
    stem, cerebellum = (np.array(viewer.colours()[name]) for name in NAMES)
    assert np.linalg.norm(stem - cerebellum) > 90
    viewer.draw(mask)
    viewer.press("Submit label")
    viewer.says("The label is safe")
    assert np.array_equal(viewer.voxels(), mask)
    found = next(one for one in find_cases(studies) if one.id == case)
    label = read_case(found, LabelMap(NAMES))[1]
    assert np.array_equal(label, turn.back(mask))
    viewer.picture("submitted")


def check_label_is_shown_again(viewer):
    mask = viewer.voxels()
    viewer.page.reload()
    viewer.wait_until_connected()
    viewer.says("is shown")
    assert np.array_equal(viewer.voxels(), mask)


def check_next_sample(viewer, studies, case):
    viewer.press("Next sample")
    others = [record.series for record in records(folder_in(studies)) if record.case != case]
    viewer.page.wait_for_function(f"() => {others}.some((uid) => window.location.href.includes(uid))")
    viewer.wait_until_connected()
    viewer.picture("next")
    assert viewer.series in others
    viewer.panel.locator(".samadapt-reason p").wait_for()
