"""OHIF in a real browser: opens it, and does in it what a person does."""

from __future__ import annotations

import base64
import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests

from samadapt.data.geometry import turn_to_series
from samadapt.data.volume import read_label, read_volume
from serving import Server

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = ROOT / "build" / "screenshots"
CHROMIUM = shutil.which("chromium")

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000

# What OHIF's page offers to scripts; the panel's segmentation has the id "1".
MASK = "window.services.segmentationService.getLabelmapVolume('1')"
IMAGE = "[...window.cornerstone.cache.getVolumes()].find(v => v.volumeId.startsWith('cornerstoneStreaming'))"


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: chromium)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield running
        running.close()


class Viewer:
    """OHIF's MONAI Label mode with both panels.

    Args:
        browser: from ``browser``.
        url: the server's.
        name: what its screenshots begin with.

    Attributes:
        page: playwright's.
        panel: our panel; ``bundled``: the one that comes with OHIF.
        errors: exceptions in the page that nobody caught.
        asks: what the page wanted confirmed; "" is the browser's own question before it leaves a page.
        agrees: whether everything is confirmed, or nothing.
    """

    def __init__(self, browser: Any, url: str, name: str) -> None:
        self.url = url
        self.page = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.panel = self.page.locator("#samadapt-panel")
        self.bundled = self.page.locator(".monaiLabelPanel")
        self.errors: list[str] = []
        self.asks: list[str] = []
        self.agrees = True
        self._name = name
        self._shots = 0
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", self._confirm)

    def _confirm(self, dialog: Any) -> None:
        self.asks.append(dialog.message)
        if self.agrees:
            dialog.accept()
        else:
            dialog.dismiss()

    # ---- the way to a series

    def open(self, patient: str) -> None:
        """From the study list to the MONAI Label mode of a patient's study."""
        self.page.goto(f"{self.url}/ohif/", wait_until="domcontentloaded")
        self.page.get_by_text(patient, exact=True).first.click()
        self.page.locator('a[href*="monai-label"]').first.click()
        self.wait_until_connected()

    def wait_until_connected(self) -> None:
        """Until the series is loaded and there is a mask to draw in."""
        self.bundled.locator(".tabs").wait_for()
        self.page.wait_for_function(f"() => window.services?.segmentationService.getSegmentations().length && {MASK}")
        self.page.wait_for_function(f"() => {IMAGE}?.loadStatus?.loaded")
        notice = self.page.get_by_text("Confirm and Hide")
        if notice.is_visible():
            notice.click()

    def picture(self, title: str) -> Path:
        """Keep what is on the screen among the build's outputs."""
        self._shots += 1
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{self._name}-{self._shots:02}-{title}.png"
        self.page.screenshot(path=path)
        return path

    # ---- what is shown

    @property
    def series(self) -> str:
        return str(
            self.page.evaluate(
                f"() => window.cornerstone.metaData.get('instance', {IMAGE}.imageIds[0]).SeriesInstanceUID"
            )
        )

    def voxels(self) -> np.ndarray:
        """The page's mask, (I,J,K)."""
        text, size = self.page.evaluate(
            f"""() => {{
                const data = {MASK}.voxelManager.getCompleteScalarDataArray();
                let text = '';
                for (let n = 0; n < data.length; n += 8192) text += String.fromCharCode(...data.subarray(n, n + 8192));
                return [btoa(text), [...{MASK}.dimensions]];
            }}"""
        )
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(size, order="F").copy()

    def draw(self, mask: np.ndarray) -> None:
        """Set the page's mask (I,J,K) by OHIF's own interface, as its tools do."""
        text = base64.b64encode(mask.astype(np.uint8).tobytes(order="F")).decode()
        self.page.evaluate(
            f"""(text) => {{
                {MASK}.voxelManager.setCompleteScalarDataArray(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
                const {{ Events }} = window.cornerstoneTools.Enums;
                const {{ triggerEvent, eventTarget }} = window.cornerstone;
                triggerEvent(eventTarget, Events.SEGMENTATION_DATA_MODIFIED, {{ segmentationId: '1' }});
            }}""",
            text,
        )

    def draw_by_name(self, mask: np.ndarray, values: Mapping[str, int]) -> None:
        """``draw`` a mask whose structures have other ``values`` than the page gives them."""
        table = np.zeros(256, np.uint8)
        for name, value in values.items():
            table[value] = self.names()[name]
        self.draw(table[mask])

    def names(self) -> dict[str, int]:
        """The page's structures: name -> voxel value."""
        segments = self.page.evaluate("() => window.services.segmentationService.getSegmentation('1').segments")
        return {segment["label"]: segment["segmentIndex"] for segment in segments.values()}

    def colours(self) -> dict[str, list[int]]:
        """Of every structure in the active view: red, green, blue."""
        return self.page.evaluate(
            """() => {
              const { segmentationService, viewportGridService } = window.services;
              const viewport = viewportGridService.getState().activeViewportId;
              const segments = Object.values(segmentationService.getSegmentation('1').segments).filter(Boolean);
              const color = ({ segmentIndex }) => segmentationService.getSegmentColor(viewport, '1', segmentIndex);
              return Object.fromEntries(segments.map((one) => [one.label, [...color(one)].slice(0, 3)]));
            }"""
        )

    def world(self, voxel: list[int]) -> list[float]:
        """Where a voxel of the page's image lies, in DICOM's patient coordinates."""
        return list(self.page.evaluate(f"(voxel) => [...{IMAGE}.imageData.indexToWorld(voxel)]", voxel))

    def slice(self) -> int:
        """The slice k that the axial view shows."""
        return int(
            self.page.evaluate(
                f"""() => {{
                    const view = window.services.cornerstoneViewportService.getCornerstoneViewport('mpr-axial');
                    return Math.round({IMAGE}.imageData.worldToIndex(view.getCamera().focalPoint)[2]);
                }}"""
            )
        )

    # ---- what people do

    def press(self, name: str) -> None:
        self.panel.get_by_role("button", name=name, exact=True).click()

    def says(self, words: str, patience_ms: int = PATIENCE_MS) -> str:
        """Wait until the panel's live region has these words, in capitals or not; all of what it says then."""
        text = self.panel.locator(".samadapt-status")
        node = text.element_handle()
        condition = "([node, words]) => node.textContent.toLowerCase().includes(words)"
        self.page.wait_for_function(condition, arg=[node, words.lower()], timeout=patience_ms)
        return str(text.inner_text())

    def choose(self, structure: str) -> None:
        self.panel.get_by_label("Structure").select_option(label=structure)

    def point(self, voxel: list[int], *, shift: bool = False) -> None:
        """Click at a voxel of the slice that the axial view shows."""
        x, y = self._on_screen(voxel)
        self.page.mouse.move(x, y)
        with self._held("Shift" if shift else None):
            self.page.mouse.click(x, y)

    def stroke(self, start: list[int], end: list[int]) -> None:
        """Drag from voxel to voxel of the slice that the axial view shows."""
        self.page.mouse.move(*self._on_screen(start))
        self.page.mouse.down()
        self.page.mouse.move(*self._on_screen(end), steps=5)
        self.page.mouse.up()

    def wait_for_mask(self, condition: str) -> None:
        """Until ``condition`` holds, in JavaScript, of ``mask``, the page's voxels."""
        self.page.wait_for_function(
            f"() => {{ const mask = {MASK}.voxelManager.getCompleteScalarDataArray(); return {condition}; }}"
        )

    def wait_for_probe(self) -> None:
        """Until OHIF has taken a click with the bundled panel's tool; it waits whether it becomes a double click."""
        self.page.wait_for_function("() => window.cornerstoneTools.annotation.state.getAllAnnotations().length > 0")

    def go_to(self, k: int) -> None:
        """Scroll the views to slice k by OHIF's own interface."""
        self.page.evaluate(
            f"""(k) => {{
                const views = window.cornerstone.getRenderingEngines().flatMap((engine) => engine.getViewports());
                for (const view of views) {{
                    const [i, j] = {IMAGE}.imageData.worldToIndex(view.getCamera().focalPoint);
                    view.jumpToWorld({IMAGE}.imageData.indexToWorld([i, j, k]));
                    view.render();
                }}
            }}""",
            k,
        )

    def _on_screen(self, voxel: list[int]) -> tuple[float, float]:
        x, y = self.page.evaluate(
            f"""(voxel) => {{
                const view = window.services.cornerstoneViewportService.getCornerstoneViewport('mpr-axial');
                const [x, y] = view.worldToCanvas({IMAGE}.imageData.indexToWorld(voxel));
                const {{ left, top }} = view.element.getBoundingClientRect();
                return [left + x, top + y];
            }}""",
            voxel,
        )
        return x, y

    @contextlib.contextmanager
    def _held(self, key: str | None) -> Iterator[None]:
        if key:
            self.page.keyboard.down(key)
        yield
        if key:
            self.page.keyboard.up(key)


def label_on_series(image: Path, label: Path) -> np.ndarray:
    """(I,J,K): the label of a volume on the grid of the series that OHIF shows of it."""
    geometry = read_volume(image).geometry
    return turn_to_series(geometry).forward(read_label(label, geometry))


def stored(server: Server, series: str, folder: Path) -> tuple[nibabel.Nifti1Image, dict[str, int], dict[str, Any]]:
    """The label as training reads it: image, name -> value, and what else is known of it."""
    asked = {"label": series, "tag": "final"}
    reply = requests.get(f"{server.url}/datastore/label", params=asked, timeout=60)
    reply.raise_for_status()
    path = folder / f"{series}.nii.gz"
    path.write_bytes(reply.content)
    info = requests.get(f"{server.url}/datastore/label/info", params=asked, timeout=60).json()
    return nibabel.load(path), {entry["name"]: entry["idx"] for entry in info["label_info"]}, info


def assert_arrived(viewer: Viewer, server: Server, folder: Path) -> dict[str, Any]:
    """What is in the store equals what the page shows: voxel for voxel, name for name, place for place."""
    image, names, info = stored(server, viewer.series, folder)
    shown = viewer.voxels()
    assert names == viewer.names()
    assert np.array_equal(np.asarray(image.dataobj), shown)
    for voxel in ([0, 0, 0], [shown.shape[0] - 1, 3, 5]):
        place = np.array([-1, -1, 1]) * nibabel.affines.apply_affine(image.affine, voxel)  # to DICOM's directions
        assert place == pytest.approx(viewer.world(voxel), abs=0.01)
    return info
