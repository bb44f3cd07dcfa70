"""What the panel says of a mask's worth, in a real browser, without a server."""

import mimetypes
from pathlib import Path

import pytest

from viewing import browser

PANEL = Path(__file__).resolve().parents[2] / "apps" / "samadapt" / "ohif"
HOST = "http://panel.invalid"

pytestmark = pytest.mark.requires_browser


@pytest.fixture
def page():
    with browser() as chromium:
        made = chromium.new_page()
        made.route(f"{HOST}/**", _file)
        made.goto(f"{HOST}/")
        yield made


def _file(route):
    name = route.request.url.removeprefix(f"{HOST}/")
    if not name:
        return route.fulfill(content_type="text/html", body="<!doctype html><div id=worth></div>")
    return route.fulfill(content_type=mimetypes.types_map[".js"], path=PANEL / name)


def test_what_was_not_found_has_no_figure(page):
    worth = {"dice": {"liver": 0.914}, "error": {"liver": 0.05}, "mean": 0.91, "not_found": ["<b>", "tumour"]}
    show = "async worth => (await import('/quality.js')).showQuality(document.getElementById('worth'), worth)"
    page.evaluate(show, {**worth, "unsure_slices": []})
    rows = [row.inner_text().split("\t") for row in page.get_by_role("row").all()]
    assert rows == [["liver", "0.91 \u00b1 0.05"], ["<b>", "not found"], ["tumour", "not found"]]
    page.evaluate(show, {"dice": {}, "error": {}, "mean": None, "not_found": ["liver"], "unsure_slices": []})
    assert [row.inner_text().split("\t") for row in page.get_by_role("row").all()] == [["liver", "not found"]]
