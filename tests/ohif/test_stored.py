"""The label that a case has already, in a real browser: it is shown, corrected, and replaced by nobody unseen."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pytest
import requests
from pydicom.uid import generate_uid

from phantoms import Kind, octants, write_phantom
from serving import ServeCommand
from viewing import Viewer, browser

pytestmark = [pytest.mark.e2e, pytest.mark.requires_browser]


@pytest.fixture
def server(tmp_path):
    """Two series of one study."""
    folder, study = tmp_path / "studies", generate_uid()
    for number in (1, 2):
        names = {"PatientID": "PAT1", "PatientName": "PAT1", "StudyInstanceUID": study, "SeriesNumber": number}
        write_phantom(folder / str(number), Kind(slices=12), (24, 40), SeriesInstanceUID=generate_uid(), **names)
    running = ServeCommand(folder, ("image_size", "64")).start()
    yield running
    running.stop()


@pytest.fixture
def viewer(server):
    with browser() as chromium:
        made = Viewer(chromium, server.url, "stored")
        yield made
        made.page.context.close()
        assert made.errors == []


def add(viewer, name):
    viewer.panel.get_by_label("New").fill(name)
    viewer.press("Add")


def label(server, series):
    answer = requests.get(f"{server.url}/samadapt/label", params={"image": series}, timeout=60)
    answer.raise_for_status()
    return answer.json()["label"]


def submit(server, series, mask, author):
    """Somebody else, by a program that does not say which label it stands on."""
    params = {"label_info": [{"name": "liver", "idx": 1}], "author": author}
    requests.put(
        f"{server.url}/samadapt/label",
        params={"image": series},
        data={"params": json.dumps(params)},
        files={"label": ("label.bin.gz", gzip.compress(mask.tobytes(order="F")))},
        timeout=60,
    ).raise_for_status()


def drawn(viewer, name="liver"):
    return viewer.voxels() == viewer.names()[name]


def test_a_label_is_shown_again_and_nobody_loses_work(viewer, server):
    viewer.open("PAT1")
    structures_are_named_once(viewer)
    mask = octants(viewer.voxels().shape, values=(viewer.names()["liver"],))
    mask[:, :, [k for k in range(mask.shape[2]) if k not in (2, 3)]] = 0
    viewer.draw(mask)
    the_page_is_not_left_with_changes(viewer, mask)
    viewer.panel.get_by_label("Your name").fill("Anna")
    viewer.panel.get_by_role("radio", name="edited slices only").check()
    viewer.press("Submit label")
    viewer.says("The label is safe")
    viewer.bundled.get_by_text("liver").first.wait_for(state="attached")  # it has been connected again
    viewer.page.locator('[data-cy="return-to-work-list"]').first.click()  # nothing is unsent, so nobody is asked
    viewer.page.wait_for_url(lambda url: "monai-label" not in url)

    asked = len(viewer.asks)
    viewer.open("PAT1")
    viewer.says("The label of Anna is shown")
    viewer.panel.get_by_text("Labelled by Anna on").wait_for()
    viewer.picture("shown-again")
    assert np.array_equal(drawn(viewer), mask > 0)
    viewer.panel.get_by_text("edited slices only: none").wait_for()
    assert len(viewer.asks) == asked

    somebody_else_labels_meanwhile(viewer, server, mask)
    versions_come_back(viewer, server)
    the_mask_stays_with_its_series(viewer)


def structures_are_named_once(viewer):
    add(viewer, "liver")
    add(viewer, "  LIVER ")
    viewer.says("There is “liver” already")
    assert list(viewer.names()) == ["liver"]
    add(viewer, "mistake")
    assert set(viewer.names()) == {"liver", "mistake"}
    viewer.press("Remove")
    viewer.says("“mistake” is removed")
    viewer.page.wait_for_timeout(1200)  # names are given back to values that lost them, twice a second
    assert list(viewer.names()) == ["liver"]
    assert viewer.panel.get_by_label("Structure").inner_text() == "liver"


def the_page_is_not_left_with_changes(viewer, mask):
    viewer.page.mouse.click(5, 500)  # browsers ask only people who have touched the page
    viewer.agrees = False
    for leave in (
        lambda: viewer.page.locator('[data-cy="return-to-work-list"]').first.click(no_wait_after=True),
        lambda: viewer.page.evaluate("() => window.history.back()"),
    ):
        before = len(viewer.asks)
        leave()
        wait_until(viewer, lambda known=before: len(viewer.asks) > known)
        assert len(viewer.asks) == before + 1
        viewer.page.wait_for_timeout(500)
        assert "monai-label" in viewer.page.url
        assert np.array_equal(viewer.voxels(), mask)
    viewer.agrees = True


def wait_until(viewer, condition):
    for _ in range(100):
        if condition():
            return
        viewer.page.wait_for_timeout(100)
    raise AssertionError("it did not happen")


def somebody_else_labels_meanwhile(viewer, server, mask):
    series, own = viewer.series, mask.copy()
    theirs = (octants(mask.shape, values=(1,)) > 0)[::-1].astype(np.uint8)
    submit(server, series, theirs, "Ben")
    own[5, 7, 9] = viewer.names()["liver"]
    viewer.draw(own)
    viewer.panel.get_by_role("radio", name="edited slices only").check()
    viewer.press("Submit label")
    question = viewer.panel.get_by_role("alertdialog")
    question.get_by_text("Ben submitted a label").wait_for()
    viewer.picture("another-label")
    assert label(server, series)["author"] == "Ben"
    viewer.press("Look at it first")
    question.get_by_text("This is the label of Ben").wait_for()
    assert np.array_equal(drawn(viewer), theirs > 0)
    viewer.press("Submit label")
    viewer.says("another label is shown")
    viewer.press("Back to mine")
    question.get_by_text("Ben submitted a label").wait_for()
    assert np.array_equal(viewer.voxels(), own)
    viewer.press("Replace it")
    viewer.says("The label is safe")
    stored = label(server, series)
    assert (stored["author"], stored["labelled_slices"]) == ("Anna", [2, 3, 9])  # the correction adds to Anna's first
    assert stored["slices"] == [2, 3, 9]
    question.wait_for(state="hidden")


def versions_come_back(viewer, server):
    listed = viewer.panel.locator("details", has_text="Versions of this label").last
    listed.get_by_text("Versions of this label").click()
    assert listed.locator("tr").count() == 3
    listed.get_by_role("button", name="Restore the label of Ben").click()
    viewer.says("counts again")
    viewer.picture("restored")
    stored = label(server, viewer.series)
    assert (stored["author"], stored["labelled_slices"]) == ("Anna", "all")  # she has chosen it
    assert np.flatnonzero(drawn(viewer).any(axis=(0, 1))).tolist() == stored["slices"]
    assert len(stored["slices"]) > 3


def the_mask_stays_with_its_series(viewer):
    """OHIF shows another series of the study in the same page, which has one mask."""
    changed = viewer.voxels()
    changed[1, 2, 6] = viewer.names()["liver"]
    viewer.draw(changed)
    series = viewer.page.locator('[data-cy="study-browser-thumbnail"]')
    elsewhere = viewer.panel.get_by_role("button", name="Label this series")
    series.nth(1).dblclick()
    elsewhere.wait_for()
    viewer.press("Submit label")
    viewer.says("belongs to another series")
    assert not viewer.panel.get_by_role("button", name="Load label").is_visible()
    series.nth(0).dblclick()
    elsewhere.wait_for(state="hidden")
    assert np.array_equal(viewer.voxels(), changed)
    viewer.panel.get_by_text(re.compile("edited slices only: [0-9]+$")).wait_for()  # what was changed is still known
    series.nth(1).dblclick()
    with viewer.page.expect_navigation():
        elsewhere.click()
    assert viewer.asks[-1] == ""  # the browser asked
    viewer.wait_until_connected()
    viewer.panel.get_by_text("Not labelled yet").wait_for()
