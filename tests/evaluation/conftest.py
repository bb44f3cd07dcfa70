"""What tests of several measurements need."""

import pytest

from viewing import browser


class Offline:
    """A page in a real browser that has no network.

    Attributes:
        page: playwright's.
        complaints: what the browser's console said of errors, and what the page asked the network for.
    """

    def __init__(self, chromium):
        context = chromium.new_context(offline=True)
        self.page = context.new_page()
        self.complaints = []
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda asked: asked.url.startswith("http") and self.complaints.append(asked.url))

    def pictures(self):
        """Of every picture that the page shows, whether it could be drawn."""
        self.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        drawn = "all => all.map(one => one.complete && one.naturalWidth > 0)"
        return self.page.locator("img").evaluate_all(drawn)


@pytest.fixture
def offline():
    with browser() as chromium:
        yield Offline(chromium)
