"""What the panel in OHIF does besides the loop, in one page: clicks in 3D, trainings that are paused, stopped and
refused, its place where OHIF has none for it, and OHIF's own way to store a mask."""

from __future__ import annotations

import json

import numpy as np
import pytest
import requests
from pydicom.uid import generate_uid

from make_dicom import write_stack
from pacs import make
from real_series import CT, DATA, dice, stack, truth_of, voxel_of, written
from serving import PacsServer
from viewing import Viewer, assert_arrived, browser

pytestmark = [pytest.mark.e2e, pytest.mark.requires_browser, pytest.mark.requires_data]

SHOWN = slice(17, 27)
"""Ten slices of the CT series, all of which show the tumour."""

EVERY = 3
CONF = (
    ("labels", "tumour,lung"),
    ("recipe", "unet"),
    ("image_size", "64"),
    ("max_steps", "40"),
    ("max_train_minutes", "1.9"),
    ("auto_train", str(EVERY)),
    ("embed_ahead", "false"),
)
TRAINING_MS = 240_000
LOADING_MS = 120_000
"""The first click waits for the model."""

PHANTOMS = {f"1.2.826.0.1.3680043.8.498.{n}": n for n in (1, 2, 3, 4)}
"""Series of as many patients, in the order in which the ledger takes them: the fourth is held out."""

SIZE = (48, 40, 6)


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    if not DATA.is_dir():
        pytest.skip("the data sets in ../shared/data are not here")
    running = make("embedded").start()
    folder = tmp_path_factory.mktemp("series")
    running.upload(written(stack(CT / "dicom" / "image")[SHOWN], folder / "ct"))
    for series, number in PHANTOMS.items():
        running.upload(write_patient(folder / f"phantom{number}", series, number))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def server(pacs, tmp_path_factory):
    running = PacsServer(pacs.url, tmp_path_factory.mktemp("server"), *CONF).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def page(server):
    with browser() as chromium:
        made = Viewer(chromium, server.url, "panel")
        made.open("PAT1")
        yield made


@pytest.fixture
def viewer(page, request):
    """The page, without a mask."""
    page.draw(np.zeros_like(page.voxels()))
    failed = request.session.testsfailed
    yield page
    if request.session.testsfailed > failed:
        page.picture(f"failed-{request.node.name}")
    assert page.errors == []


def drawn(number):
    """(I,J,K): 1 where the bright ball of a patient is, 2 where the dark bar."""
    i, j, k = np.indices(SIZE)
    ball = (i - 16 - 3 * number) ** 2 + (j - 22 + number) ** 2 + 9 * (k - 2.5) ** 2 < 90
    return (ball + 2 * ((j >= 33) & (abs(i - 20 - number) < 15))).astype(np.uint8)


def write_patient(folder, series, number):
    mask = drawn(number)
    voxels = np.random.default_rng(number).normal(0, 20, mask.shape) + np.array([0, 400, -400])[mask]
    positions = [(0.0, 0.0, 2.0 * k) for k in range(mask.shape[2])]
    uids = {"SeriesInstanceUID": series, "StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}
    return write_stack(folder, voxels.transpose(2, 1, 0), positions, PatientID=f"phantom{number}", **uids)


def submit(server, series, mask):
    """As the panel does it."""
    information = [{"name": "tumour", "idx": 1}, {"name": "lung", "idx": 2}]
    reply = requests.put(
        f"{server.url}/samadapt/label",
        params={"image": series},
        data={"params": json.dumps({"label_info": information, "shape": list(mask.shape)})},
        files={"label": ("label.bin", mask.tobytes(order="F"))},
        timeout=60,
    )
    assert reply.ok, reply.text


def is_training(server):
    return requests.get(f"{server.url}/info/", timeout=60).json()["train_stats"]["samadapt"]["state"] == "running"


def wait_for_news(viewer):
    """Until the panel has asked for the server's state once more."""
    with viewer.page.expect_response(lambda reply: reply.url.endswith("/info/")) as reply:
        pass
    reply.value.finished()


def test_trainings_are_paused_stopped_and_refused(viewer, server):
    start = viewer.panel.get_by_role("button", name="Update model", exact=True)
    stop = viewer.panel.get_by_role("button", name="Stop training", exact=True)
    pause = viewer.panel.get_by_label("Pause these trainings")

    with viewer.page.expect_response(lambda reply: "auto_train" in reply.url):
        pause.check()
    for series, number in PHANTOMS.items():
        submit(server, series, drawn(number))
    viewer.panel.get_by_text(f"after {EVERY} new labels (4 so far)").wait_for()
    wait_for_news(viewer)  # the server looks every two seconds, the panel every five
    assert not is_training(server)
    assert pause.is_checked()
    viewer.picture("paused")

    pause.uncheck()
    stop.wait_for()
    progress = viewer.panel.locator(".samadapt-progress").element_handle()
    viewer.page.wait_for_function("node => /case|round/.test(node.textContent)", arg=progress, timeout=TRAINING_MS)
    pause.check()
    stop.click()
    start.wait_for()
    assert not is_training(server)
    viewer.says("stopped before its end; the next training resumes it")
    viewer.picture("stopped")

    start.click()
    viewer.says("The training has ended", TRAINING_MS)
    viewer.panel.get_by_text("in service", exact=True).wait_for()
    refused = viewer.panel.locator(".samadapt-refused")
    assert refused.inner_text() == ""

    # Another recipe begins anew, and in four steps it cannot catch up with what is in service.
    hasty = {"recipe": "autosam_linear", "max_steps": "4"}
    queued = {"enqueue": "true"}  # the process of the last training may take a moment to end
    requests.post(f"{server.url}/train/samadapt", params=queued, json=hasty, timeout=60).raise_for_status()
    stop.wait_for()
    start.wait_for(timeout=TRAINING_MS)
    said = viewer.says("The training has ended: not published")
    assert "In service: v0001" in said
    assert "Not put in service" in refused.inner_text()
    assert "Dice" in refused.inner_text()
    rows = viewer.panel.locator("tbody tr").all_inner_texts()
    assert ["v0002" in rows[0], "v0001" in rows[1]] == [True, True]
    assert ["in service" in row for row in rows] == [False, True]
    viewer.picture("refused")

    method = viewer.panel.get_by_label("Method")
    assert method.input_value() == "unet"  # the server's own
    method.select_option("s_sam")
    viewer.panel.get_by_text("S-SAM: singular values").wait_for()
    viewer.picture("method")
    with viewer.page.expect_request(lambda request: request.url.endswith("/train/")) as asked:
        start.click()
    assert asked.value.post_data_json == {"samadapt": {"recipe": "s_sam"}}
    stop.click(timeout=TRAINING_MS)
    start.wait_for()
    method.select_option("unet")


def test_clicks_in_3d(viewer):
    truth = truth_of(CT)[:, :, SHOWN]
    voxel = voxel_of(truth)
    viewer.choose("tumour")
    viewer.go_to(voxel[2])
    viewer.press("Click: 3D")
    viewer.point(voxel)
    viewer.says("Done", LOADING_MS)
    found = viewer.voxels() == viewer.names()["tumour"]
    viewer.picture("click-3d")
    print(f"Dice after one click: {dice(found, truth):.2f}")
    assert dice(found, truth) > 0.6
    assert np.flatnonzero(found.any(axis=(0, 1))).size > 5

    outside = voxel_of(found & ~truth)
    viewer.go_to(outside[2])
    viewer.point(outside, shift=True)
    viewer.says("The model looks")
    viewer.says("Done")
    viewer.picture("click-3d-outside")
    mended = viewer.voxels() == viewer.names()["tumour"]
    print(f"Dice after a click on what is not part of it: {dice(mended, truth):.2f}")
    assert not mended[tuple(outside)]
    assert mended[tuple(voxel)]
    viewer.press("Click: 3D")


def test_the_panel_moves_to_a_corner_where_the_bundled_one_is_folded_away(viewer):
    viewer.page.locator('[data-cy="side-panel-header-right"]').click()
    viewer.page.locator("#samadapt-panel.samadapt-corner").wait_for()
    viewer.choose("lung")
    viewer.press("Submit label")
    viewer.says("The label is safe")
    viewer.picture("corner")
    viewer.page.locator('[data-cy="side-panel-header-right"]').click()
    viewer.page.locator("#samadapt-panel:not(.samadapt-corner) + .monaiLabelPanel .tabs").wait_for()
    viewer.picture("unfolded")


def test_the_seg_that_ohif_itself_stores_is_read_voxel_for_voxel(viewer, server, tmp_path):
    """No button of this mode leads there; but the command is OHIF's own, as are its dialog, its SEG and its STOW."""
    mask = np.zeros_like(viewer.voxels())
    mask[20:60, 30:50, 1:4] = viewer.names()["tumour"]
    mask[100:107, 150:153, 3] = viewer.names()["lung"]
    mask[5, 7, 0] = viewer.names()["lung"]
    viewer.draw(mask)
    viewer.page.evaluate(
        """() => {
            const dataSource = window.extensionManager.getActiveDataSource()[0];
            const options = { segmentationId: '1', dataSource };
            window.stored = window.commandsManager.runCommand('storeSegmentation', options, 'SEGMENTATION');
        }"""
    )
    viewer.page.get_by_role("button", name="Save").click()
    seg = viewer.page.evaluate("() => window.stored.then((report) => report.SOPInstanceUID)")
    assert np.array_equal(viewer.voxels(), mask)
    assert assert_arrived(viewer, server, tmp_path)["object"] == seg
