"""A pytest plugin: with SAMADAPT_REQUIRE_ALL=1 no test that needs something from outside may be skipped.

Tests say what they need by a marker: ``requires_browser``, ``requires_pacs``, ``requires_data``. A developer's machine
without it skips them; CI, where everything has to be there, fails instead.
"""

from __future__ import annotations

import os

import pytest

NEEDS = {
    "requires_browser": "needs a headless browser",
    "requires_pacs": "needs Orthanc with DICOMweb",
    "requires_data": "needs the data sets in ../shared/data",
}


def pytest_configure(config: pytest.Config) -> None:
    for marker, meaning in NEEDS.items():
        config.addinivalue_line("markers", f"{marker}: {meaning}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Turn the skip of such a test into a failure that says what is missing."""
    report = yield
    needs = [marker for marker in NEEDS if item.get_closest_marker(marker)]
    required = os.environ.get("SAMADAPT_REQUIRE_ALL") == "1"
    if required and needs and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{needs[0]}: may not be skipped with SAMADAPT_REQUIRE_ALL=1 ({reason})"
    return report
