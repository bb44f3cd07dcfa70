"""A radiologist's hour in OHIF, in a real browser, on real CT and MR series, over each DICOMweb back end."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import requests

from pacs import pacs
from real_series import CT, DATA, MR, as_somebody_else, dice, stack, truth_of, voxel_of, written
from serving import PacsServer
from viewing import Viewer, assert_arrived, browser

__all__ = ["pacs"]

pytestmark = [pytest.mark.e2e, pytest.mark.requires_browser, pytest.mark.requires_data]

HALF = 30
"""The CT series shows its tumour in slices 17 to 42: cut in two, it makes two patients with a tumour each."""

QUICK = (
    ("labels", "tumour,lung"),
    ("recipe", "autosam_linear"),
    ("image_size", "64"),
    ("max_steps", "60"),
    ("max_train_minutes", "2.4"),
)
TRAINING_MS = 240_000


@pytest.fixture(scope="module")
def chromium():
    if not DATA.is_dir():
        pytest.skip("the data sets in ../shared/data are not here")
    with browser() as running:
        yield running


@pytest.fixture
def server(pacs, tmp_path):
    images = stack(CT / "dicom" / "image")
    pacs.upload(written(images[:HALF], tmp_path / "one"))
    pacs.upload(written(as_somebody_else(images[HALF:], "PAT2"), tmp_path / "two"))
    pacs.upload(MR / "dicom" / "image")
    running = PacsServer(pacs.url, tmp_path / "server", *QUICK).start()
    yield running
    running.stop()


@pytest.fixture
def viewer(chromium, server, pacs, request):
    made = Viewer(chromium, server.url, f"{request.node.originalname.removeprefix('test_')}-{pacs.name}")
    failed = request.session.testsfailed
    yield made
    if request.session.testsfailed > failed:
        made.picture("failed")
    made.page.context.close()
    assert made.errors == []


def train(viewer):
    viewer.press("Update model")
    progress = viewer.panel.locator(".samadapt-progress")
    condition = "node => /round/.test(node.textContent)"
    viewer.page.wait_for_function(condition, arg=progress.element_handle(), timeout=TRAINING_MS)
    viewer.picture("training")
    return viewer.says("The training has ended", TRAINING_MS)


def bundled_clicks(viewer, model, voxel):
    """The bundled panel's point prompts, as the panel wants them."""
    viewer.bundled.locator('label.tab-label:has-text("Point Prompts")').click()
    prompts = viewer.bundled.locator('.tab:has(label:has-text("Point Prompts"))')
    prompts.locator("select").first.select_option(model)
    prompts.locator("tr.clickable-row", has_text="tumour").click()
    viewer.go_to(voxel[2])
    viewer.point(voxel)
    viewer.wait_for_probe()
    prompts.locator("button.actionButton").first.click()


def test_the_loop(viewer, server, tmp_path):
    first_truth, second_truth = np.split(truth_of(CT), [HALF], axis=2)
    look_at_the_mr_series(viewer)

    viewer.open("PAT1")
    use_the_bundled_panel(viewer, voxel_of(first_truth))
    label_by_hand(viewer, first_truth)
    viewer.press("Submit label")
    viewer.says("The label is safe")
    viewer.picture("submitted")
    assert_arrived(viewer, server, tmp_path)
    labelled = viewer.series

    viewer.panel.get_by_label("Strategy").select_option("first")
    with viewer.page.expect_navigation():
        viewer.press("Next sample")
    viewer.wait_until_connected()
    viewer.panel.get_by_text("(first)").wait_for()
    viewer.picture("next-sample")
    assert viewer.series != labelled
    assert viewer.voxels().shape == second_truth.shape

    train(viewer)
    viewer.press("Segment")
    viewer.says("Mask of v0001")
    viewer.picture("mask-of-the-next-case")
    found = viewer.voxels() == viewer.names()["tumour"]
    print(f"Dice of the next case: {dice(found, second_truth):.2f}")
    assert dice(found, second_truth) > 0.2
    assert viewer.panel.get_by_text("Expected Dice").is_visible()
    least_sure = viewer.panel.get_by_role("group", name="Least sure").get_by_role("button").first
    least_sure.click()
    viewer.page.get_by_text(f"({least_sure.inner_text()}/{HALF})").first.wait_for()

    submit_edited_slices(viewer, server, second_truth, tmp_path)
    train(viewer)
    roll_back(viewer, server)


def look_at_the_mr_series(viewer):
    tumour = truth_of(MR)
    viewer.open("STS_001")
    assert viewer.voxels().shape == tumour.shape
    viewer.press("Segment")
    viewer.says("no label has been learned yet")
    voxel = voxel_of(tumour)
    viewer.choose("tumour")
    viewer.go_to(voxel[2])
    viewer.press("Click: slice")
    viewer.point(voxel)
    viewer.says("Done")
    viewer.press("Click: slice")
    found = viewer.voxels() == viewer.names()["tumour"]
    assert np.flatnonzero(found.any(axis=(0, 1))).tolist() == [voxel[2]]
    assert dice(found[:, :, voxel[2]], tumour[:, :, voxel[2]]) > 0.6
    viewer.picture("mr-click")


def use_the_bundled_panel(viewer, voxel):
    """Our panel is beside it, and it does what it did."""
    with viewer.page.expect_response(lambda reply: "/infer/samadapt?" in reply.url) as reply:
        viewer.bundled.locator('.tab:has(label:has-text("Auto-Segmentation")) button.actionButton').click()
    assert reply.value.ok
    value = viewer.names()["tumour"]
    bundled_clicks(viewer, "samadapt_click", voxel)
    viewer.wait_for_mask(f"mask.includes({value})")
    found = viewer.voxels() == value
    assert np.flatnonzero(found.any(axis=(0, 1))).tolist() == [voxel[2]]
    viewer.picture("bundled-2d")
    bundled_clicks(viewer, "samadapt_click_3d", voxel)
    viewer.wait_for_mask(f"mask.reduce((sum, v) => sum + (v === {value}), 0) > {2 * found.sum()}")
    viewer.picture("bundled-3d")
    viewer.bundled.locator('label.tab-label:has-text("Class Prompts")').click()
    prompts = viewer.bundled.locator('.tab:has(label:has-text("Class Prompts"))')
    prompts.locator("tr", has_text="tumour").locator("input[type=checkbox]").check()
    with viewer.page.expect_response(lambda reply: "/infer/samadapt?" in reply.url) as reply:
        prompts.locator("button.actionButton").first.click()
    assert reply.value.ok


def label_by_hand(viewer, tumour):
    """A stroke of the brush on another structure, and the tumour as experts drew it."""
    i, j, k = voxel_of(tumour)
    viewer.go_to(k)
    viewer.choose("lung")
    viewer.press("Brush")
    viewer.stroke([i - 20, j - 55, k], [i + 10, j - 60, k])
    lung = viewer.names()["lung"]
    viewer.wait_for_mask(f"mask.includes({lung})")
    viewer.press("Browse")
    mask = viewer.voxels()
    mask[mask != lung] = 0
    mask[tumour] = viewer.names()["tumour"]
    viewer.draw(mask)
    viewer.picture("labelled")


def submit_edited_slices(viewer, server, tumour, folder):
    """Only slices that were changed by hand since the model's mask came are labelled."""
    mask, changed = viewer.voxels(), [4, 5, 9]
    for k in changed:
        mask[:, :, k] = np.where(tumour[:, :, k], viewer.names()["tumour"], 0)
        mask[7, 11, k] = viewer.names()["lung"]
    viewer.draw(mask)
    viewer.panel.get_by_text("21, 25–26").wait_for()
    viewer.panel.get_by_role("radio", name="edited slices only").check()
    viewer.press("Submit label")
    said = viewer.says("The label is safe")
    assert "3 of 30 slices" in said
    assert assert_arrived(viewer, server, folder)["labelled_slices"] == changed
    viewer.panel.get_by_text("edited slices only: none").wait_for()


def versions(server):
    found = requests.get(f"{server.url}/samadapt/models", timeout=60).json()["versions"]
    return {version["version"]: version["in_service"] for version in found}


def roll_back(viewer, server):
    assert list(versions(server)) == ["v0001", "v0002"]
    use = viewer.panel.get_by_role("button", name="Put v0002 in service")
    if use.is_visible():  # the gate did not let it in by itself
        use.click()
        viewer.says("v0002 answers from now on")
    viewer.press("Roll back")
    viewer.says("v0001 answers from now on")
    assert versions(server) == {"v0001": True, "v0002": False}
    viewer.press("Segment")
    viewer.says("Mask of v0001")
    viewer.picture("rolled-back")


def test_what_goes_wrong_is_said(viewer, server):
    viewer.open("PAT1")
    viewer.press("Update model")
    said = viewer.says("no image is labelled yet")
    assert "Submit at least one label" in said

    os.kill(server.process.pid, signal.SIGSTOP)
    viewer.press("Next sample")
    viewer.panel.get_by_text("The server is busy").wait_for()
    viewer.picture("busy")
    with viewer.page.expect_navigation():
        os.kill(server.process.pid, signal.SIGCONT)
    viewer.wait_until_connected()

    server.stop()
    viewer.panel.get_by_text("The server is away").wait_for()
    viewer.press("Submit label")
    viewer.says("server is away")
    viewer.picture("away")
    server.start()
    viewer.panel.get_by_text("The server is away. This page").wait_for(state="hidden")


def test_names_stay_with_their_values_when_the_bundled_panel_connects_again(viewer, server):
    """It numbers structures by the alphabet, while what was drawn keeps its numbers."""
    viewer.open("PAT1")
    assert viewer.names() == {"lung": 1, "tumour": 2}
    server.stop()
    server.words[server.words.index("tumour,lung")] = "aorta,tumour,lung"
    server.start()
    viewer.bundled.locator(".settingsTable button").click()
    viewer.page.wait_for_function(
        "() => window.services.segmentationService.getSegmentation('1').config.segments[3]?.label === 'aorta'"
    )
    assert viewer.names() == {"lung": 1, "tumour": 2, "aorta": 3}


def test_the_panel_can_be_worked_with_the_keyboard(viewer):
    """From its first control to the submission by Tab alone, in the order in which they are seen."""
    viewer.open("PAT1")
    viewer.panel.locator("summary").first.focus()
    reached = []
    while reached[-1:] != ["Submit label"] and len(reached) < 30:
        viewer.page.keyboard.press("Tab")
        reached.append(viewer.page.evaluate("() => document.activeElement.textContent || document.activeElement.value"))
        assert viewer.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached[0] == "Segment"
    assert [name for name in reached if name in ("Add", "Brush", "Eraser")] == ["Add", "Brush", "Eraser"]
    assert reached[-1] == "Submit label"
    viewer.page.keyboard.press("Enter")
    viewer.says("The label is safe")
